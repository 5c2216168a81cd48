"""`star-attn ask`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from star_attention.cli import terminal
from star_attention.cli.options import (
    check_run,
    check_sampling,
    check_text,
    engine_of,
    engine_options,
    model_options,
    refuse_idle,
    run_options,
    sampling_of,
    sampling_options,
    star_config_of,
    take_model,
)
from star_attention.cli.ranks import check_ranks, handed_texts, needs_ranks, run_as_ranks
from star_attention.errors import UserError, say
from star_attention.models.checkpoint import find_model
from star_attention.runtime.sampling import finite

if TYPE_CHECKING:
    from star_attention.llm import LLM, Answer


@click.command()
@model_options
@click.option(
    "--context-file",
    "context_files",
    multiple=True,
    required=True,
    help="Text to read; -: standard input. Several are read one after the other.",
)
@click.option(
    "--question", "questions", multiple=True, required=True, help="Several are asked together."
)
@click.option("--system", help="The system message, for models with a chat template.")
@run_options
@engine_options
@sampling_options
@click.option(
    "--logprobs",
    type=click.IntRange(0),
    help="With --json: log-probabilities of each token, and of so many likeliest ones.",
)
@click.option("--strict", is_flag=True, help="Refuse text longer than the model was made for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ask(ranks: int | None, oversubscribe: bool, **options: Any) -> None:
    """Read a long text once and answer questions about it."""
    take_model(options)
    check_ranks(ranks, options["tp"])
    find_model(options["model"], options["load_format"] != "dummy")
    star_config_of(options), engine_of(options)
    check_run(options)
    check_sampling(options)
    if not options["as_json"]:
        refuse_idle("without --json", "logprobs")
    for question in options["questions"]:
        if not question.strip():
            raise UserError("--question is empty: ask something")
        check_text("--question", question)
    check_text("--system", options["system"] or "")
    texts = handed_texts() or _read_texts(options.pop("context_files"))
    if needs_ranks(ranks, options["tp"]):
        sys.exit(run_as_ranks((ranks or 1) * options["tp"], oversubscribe, texts=texts))
    _ask(texts, **options)


def _ask(
    texts: Sequence[str],
    model: str,
    questions: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    from star_attention.llm import LLM

    params, config = sampling_of(options), star_config_of(options)
    engine = asdict(engine_of(options))
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    texts_as = {name: options[name] for name in ("template", "strict", "system", "allow_special")}
    llm = LLM(model, config, **texts_as, **engine)
    with terminal.progress(not as_json) as on_progress:
        context = llm.encode(
            "\n".join(texts), on_progress=on_progress, questions=questions, params=params
        )

    answers = {}
    streams = not as_json and len(questions) == 1
    for piece in llm.stream(context, questions, params):
        answers[piece.index] = piece.answer
        if streams:
            click.echo(piece.text, nl=False)
    if streams:
        click.echo()
    ranks = llm.report()
    if as_json:
        result = {
            "model": model,
            "attention": config.attention,
            "plan": terminal.plan_as_json(context.plan),
            "answers": [_as_json(llm, answers[index]) for index in range(len(questions))],
            "ranks": ranks,
        }
        click.echo(json.dumps(result, indent=2))
        return
    if not streams:
        for index in range(len(questions)):
            click.secho(questions[index], bold=True)
            click.echo(answers[index].text + "\n")
    terminal.print_run(ranks)


def _as_json(llm: LLM, answer: Answer) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token_id": token, "text": llm.token_text(token), "logprob": finite(logprob)}

    found = {**asdict(answer), "logprobs": None}
    if answer.logprobs is not None:
        found["logprobs"] = [
            {**entry(token, each.token), "top": [entry(*top) for top in each.top]}
            for token, each in zip(answer.token_ids, answer.logprobs, strict=True)
        ]
    return found


def _read_texts(names: Sequence[str]) -> list[str]:
    if names.count("-") > 1:
        raise UserError("--context-file - can be given once")
    return [_read_text(name) for name in names]


def _read_text(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"--context-file {name} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--context-file {name} is not UTF-8 text: use a text file") from None
    if "\0" in text:
        raise UserError(f"--context-file {name} is binary: use a text file")
    if not text.strip():
        raise UserError(f"--context-file {name} is empty: give it some text")
    return text
