"""`star-attn ask`."""

from __future__ import annotations

import functools
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
    PRESET_OPTIONS,
    check_run,
    check_sampling,
    check_text,
    engine_of,
    engine_options,
    llm_options_of,
    model_options,
    refuse_idle,
    run_options,
    sampling_of,
    sampling_options,
    star_config_of,
    take_model,
)
from star_attention.cli.ranks import check_ranks, handed_texts, needs_ranks, run_as_ranks
from star_attention.cli.texts import read_texts
from star_attention.errors import UserError, say
from star_attention.models.checkpoint import find_model
from star_attention.runtime.sampling import finite

if TYPE_CHECKING:
    from star_attention.llm import LLM, Answer

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@model_options
@click.option(
    "--context-file",
    "context_files",
    multiple=True,
    help="Text to read; -: standard input. Several are read one after the other.",
)
@click.option("--question", "questions", multiple=True, help="Several are asked together.")
@click.option("--question-file", help="Questions, one a line; -: standard input.")
@click.option(
    "--save-context", type=_FOLDER, help="Keep what was read in this folder, for --load-context."
)
@click.option(
    "--load-context", type=_FOLDER, help="Ask what was saved, instead of reading a --context-file."
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
@click.option("--quiet", is_flag=True, help="Print the answers only.")
def ask(ranks: int | None, oversubscribe: bool, **options: Any) -> None:
    """Read a long text once and answer questions about it."""
    take_model(options)
    check_ranks(ranks, options["tp"])
    find_model(options["model"], options["load_format"] != "dummy")
    check_run(options)
    star_config_of(options), engine_of(options)
    check_sampling(options)
    if options["as_json"]:
        refuse_idle("with --json", "quiet")
    else:
        refuse_idle("without --json", "logprobs")
    check_text("--system", options["system"] or "")
    context_files, question_file = options.pop("context_files"), options.pop("question_file")
    _check_context(context_files, options)
    if question_file == "-" and "-" in context_files:
        raise UserError("standard input has one text: give - to one option only")
    questions = handed_texts("questions") or [
        *_checked("--question", options["questions"]),
        *_questions_of(question_file),
    ]
    if not questions:
        raise UserError("there is no question: give --question or --question-file")
    texts = handed_texts("contexts") or read_texts("--context-file", context_files)
    if needs_ranks(ranks, options["tp"]):
        processes = (ranks or 1) * options["tp"]
        sys.exit(run_as_ranks(processes, oversubscribe, contexts=texts, questions=questions))
    _ask(texts, **{**options, "questions": questions})


def _check_context(context_files: Sequence[str], options: dict[str, Any]) -> None:
    """Raises UserError for options that do not tell one context."""
    folder = options["load_context"]
    if bool(context_files) == bool(folder):
        raise UserError("give --context-file or --load-context, one of them")
    if options["attention"] == "ring":
        refuse_idle("with --attention ring, whose KV is kept nowhere", "save_context")
    if not folder:
        return
    kept = ("preset", "anchor_mode", "attention", "system", "save_context", *PRESET_OPTIONS)
    refuse_idle("with --load-context, which is as it was saved", *kept)
    if not (folder / "contexts").is_dir():
        raise UserError(f"--load-context {folder}: no context there: --save-context makes one")


def _questions_of(name: str | None) -> list[str]:
    if name is None:
        return []
    (text,) = read_texts("--question-file", [name])
    return [line for line in text.splitlines() if line.strip()]


def _checked(option: str, texts: Sequence[str]) -> Sequence[str]:
    for text in texts:
        if not text.strip():
            raise UserError(f"{option} is empty: ask something")
        check_text(option, text)
    return texts


def _ask(
    texts: Sequence[str],
    model: str,
    questions: Sequence[str],
    as_json: bool,
    quiet: bool,
    save_context: Path | None,
    load_context: Path | None,
    **options: Any,
) -> None:
    from star_attention.llm import LLM

    params, config = sampling_of(options), star_config_of(options)
    engine = llm_options_of(options)
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    texts_as = {name: options[name] for name in ("template", "strict", "system", "allow_special")}
    llm = LLM(model, config, context_dir=save_context or load_context, **texts_as, **engine)
    read = llm.load if load_context else functools.partial(llm.encode, "\n".join(texts))
    with terminal.progress(not (as_json or quiet)) as on_progress:
        context = read(on_progress=on_progress, questions=questions, params=params)

    answers = {}
    streams = not as_json and len(questions) == 1
    for piece in llm.stream(context, questions, params):
        answers[piece.index] = piece.answer
        if streams:
            click.echo(piece.text, nl=False)
    if streams:
        click.echo()
    if save_context:
        llm.save(context)
    if as_json:
        result = {
            "model": model,
            "attention": context.config.attention,
            "plan": terminal.plan_as_json(context.plan),
            "answers": [_as_json(llm, answers[index]) for index in range(len(questions))],
            "ranks": llm.report(),
        }
        click.echo(json.dumps(result, indent=2))
        return
    if not streams:
        for index, question in enumerate(questions):
            _print_answer(question, answers[index].text, quiet)
    if not quiet:
        terminal.print_run(llm.report())


def _print_answer(question: str, text: str, quiet: bool) -> None:
    if quiet:
        click.echo(text)
    else:
        click.secho(question, bold=True)
        click.echo(text + "\n")


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
