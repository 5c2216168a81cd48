"""`star-attn ask`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from star_attention.cli import terminal
from star_attention.cli.options import (
    check_run,
    check_text,
    engine_of,
    engine_options,
    model_options,
    refuse_idle,
    run_options,
    sampling_of,
    star_config_of,
    take_model,
)
from star_attention.cli.ranks import check_ranks, handed_texts, needs_ranks, run_as_ranks
from star_attention.errors import UserError, say
from star_attention.models.checkpoint import find_model


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
@click.option("--max-tokens", default=128, show_default=True, help="Tokens of an answer at most.")
@click.option(
    "--temperature", default=0.0, show_default=True, help="0: always the likeliest token."
)
@click.option("--top-k", default=0, help="Choose among the k likeliest tokens only.")
@click.option(
    "--top-p", default=1.0, help="Choose among the likeliest that reach this probability."
)
@click.option("--seed", default=0, show_default=True, help="Of the random choice.")
@click.option("--stop", multiple=True, help="Text that ends an answer.")
@click.option("--strict", is_flag=True, help="Refuse text longer than the model was made for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ask(ranks: int | None, oversubscribe: bool, **options: Any) -> None:
    """Read a long text once and answer questions about it."""
    take_model(options)
    check_ranks(ranks, options["tp"])
    find_model(options["model"], options["load_format"] != "dummy")
    star_config_of(options), engine_of(options), sampling_of(options)
    check_run(options)
    if not options["temperature"]:
        refuse_idle("with --temperature 0", "top_k", "top_p", "seed")
    for question in options["questions"]:
        if not question.strip():
            raise UserError("--question is empty: ask something")
        check_text("--question", question)
    check_text("--system", options["system"] or "")
    for stop in options["stop"]:
        check_text("--stop", stop)
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
            "answers": [asdict(answers[index]) for index in range(len(questions))],
            "ranks": ranks,
        }
        click.echo(json.dumps(result, indent=2))
        return
    if not streams:
        for index in range(len(questions)):
            click.secho(questions[index], bold=True)
            click.echo(answers[index].text + "\n")
    terminal.print_run(ranks)


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
