"""`star-attn eval` and `star-attn tune`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from star_attention.cli import terminal
from star_attention.cli.options import (
    PRESET_OPTIONS,
    TOKENS,
    Choice,
    Number,
    check_preset,
    engine_of,
    engine_options,
    kv_dtype_option,
    llm_options_of,
    preset_option,
    refuse_idle,
    text_options,
)
from star_attention.cli.ranks import check_ranks, is_started_again, needs_ranks, run_as_ranks
from star_attention.config import (
    ANCHOR_MODES,
    ATTENTION_METHODS,
    MAX_SELECTED_PAGES,
    StarConfig,
)
from star_attention.distributed import world_size
from star_attention.engines.options import DTYPES
from star_attention.errors import UserError, say
from star_attention.evals.tune import ANCHORS, BLOCKS, COSTS, TASKS
from star_attention.plan import make_plan

if TYPE_CHECKING:
    from star_attention.evals.prompts import PromptTokenizer
    from star_attention.evals.runner import Method, OnSample, Run
    from star_attention.evals.sample import Task
    from star_attention.evals.tune import Cost
    from star_attention.models.config import ModelConfig


class _List(click.ParamType):
    """Values between commas, each of another type or one of `words`."""

    name = "list"

    def __init__(self, item: click.ParamType | None, words: Sequence[str] = ()) -> None:
        self._item, self._words = item, words

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not parts:
            self.fail("name at least one", param, ctx)
        known = [part in self._words or self._item is None for part in parts]
        return tuple(
            part if is_word else self._item.convert(part, param, ctx)
            for part, is_word in zip(parts, known, strict=True)
        )


NAMES = _List(None)
LENGTHS = _List(TOKENS)
METHODS = _List(Choice(ATTENTION_METHODS))
BLOCK_SIZES = _List(TOKENS, ("whole", "half", "quarter", "eighth"))
ANCHOR_SIZES = _List(TOKENS, ("block", "half", "quarter", "eighth", "page"))
SELECTED_PAGES = _List(click.IntRange(0, MAX_SELECTED_PAGES))
# What `--preset` sets, at every length.
_PRESETS = {
    "paper": {"block_size": ("quarter",), "anchor_size": ("block",), "selected_pages": (0,)}
}


def run_options(
    samples: int = 500, blocks: str = "quarter", anchors: str = "block"
) -> Callable[[Callable], Callable]:
    """The options of everything that asks a model."""
    options = [
        click.option(
            "--model",
            required=True,
            help="A Hugging Face folder or name in its cache, a GGUF file, or smollm2.",
        ),
        click.option(
            "--samples",
            type=click.IntRange(1),
            default=samples,
            show_default=True,
            help="Of each task at most.",
        ),
        click.option("--seed", default=42, show_default=True, help="Of generated samples."),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path, file_okay=False, exists=True),
            help="Folder of the benchmark's files; docs/evals.md names them.",
        ),
        click.option(
            "--attention",
            type=METHODS,
            default="dense,star",
            show_default=True,
            help="Side by side: dense, ring, star.",
        ),
        preset_option,
        click.option(
            "--block-size",
            type=BLOCK_SIZES,
            default=blocks,
            show_default=True,
            help="whole, half, quarter or eighth of the length, or tokens; star runs with each.",
        ),
        click.option(
            "--anchor-size",
            type=ANCHOR_SIZES,
            default=anchors,
            show_default=True,
            help="block, or half, quarter or eighth of it, page, or tokens; star runs with each.",
        ),
        click.option(
            "--selected-pages",
            type=SELECTED_PAGES,
            default="0",
            show_default=True,
            help="Pages of earlier blocks that each page of rows chooses to see besides; star runs "
            "with each number.",
        ),
        click.option(
            "--anchor-mode", type=Choice(ANCHOR_MODES), default="broadcast", show_default=True
        ),
        click.option("--tokens-per-block", type=TOKENS, default=128, show_default=True),
        kv_dtype_option,
        click.option(
            "--ranks",
            type=click.IntRange(1),
            help="Ranks to run on; mpirun is started for you.  [default: 1]",
        ),
        click.option("--oversubscribe", is_flag=True, help="Allow more ranks than cores."),
        text_options,
        engine_options,
        click.option(
            "--results",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder to write to, and to go on from.  [default: results/BENCHMARK-MODEL]",
        ),
        click.option(
            "--report/--no-report", default=True, help="Print the table and draw at the end."
        ),
    ]

    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def tasks_option(default: str = "all") -> Callable:
    return click.option(
        "--tasks", type=NAMES, default=default, show_default=True, help="Names, or all."
    )


def lengths_option(default: str | None, explanation: str) -> Callable:
    return click.option(
        "--lengths", type=LENGTHS, default=default, show_default=True, help=explanation
    )


times_option = click.option(
    "--times/--no-times",
    default=True,
    help="Record what samples took, or not: where others use the machine as well.",
)

_INCLUSIVE = "Tokens of prompt and answer together: 4096,8K."


@click.group("eval")
def evals() -> None:
    """Measure accuracy: dense, ring and star attention side by side.

    A run that was stopped goes on when it is started again.

    \b
    Try:  star-attn eval ruler --model smollm2 --lengths 1024 --samples 3
          star-attn eval report results/ruler-smollm2
    """


@evals.command()
@tasks_option()
@lengths_option("4096", _INCLUSIVE)
@run_options()
@times_option
def ruler(**options: Any) -> None:
    """RULER's 13 tasks, generated."""
    _evaluate("ruler", options)


@evals.command()
@tasks_option()
@lengths_option("4096", _INCLUSIVE)
@run_options()
@times_option
def babilong(**options: Any) -> None:
    """BABILong qa1 to qa5, from public files or generated."""
    _evaluate("babilong", options)


@evals.command()
@tasks_option()
@lengths_option(None, "Longer texts lose their middle.  [default: no limit]")
@run_options()
@times_option
def infinitebench(**options: Any) -> None:
    """InfiniteBench, ten tasks, from its public files."""
    _evaluate("infinitebench", options)


@evals.command("aa-lcr")
@run_options()
@times_option
def aa_lcr(**options: Any) -> None:
    """AA-LCR's questions over long documents, scored without a judge."""
    _evaluate("aa-lcr", {**options, "tasks": ("all",), "lengths": None})


@evals.command()
@click.option(
    "--file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON Lines: input_context, input_query, output.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@run_options()
@times_option
def custom(**options: Any) -> None:
    """Your own contexts, questions and answers."""
    _evaluate("custom", {**options, "tasks": ("all",), "lengths": None})


@evals.command()
@click.argument("results", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--plots/--no-plots", default=True, help="Draw PNG files into the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(results: Path, plots: bool, as_json: bool) -> None:
    """Compare the configurations in a folder of results."""
    if as_json:
        from star_attention.evals import report as comparison
        from star_attention.evals.results import load_results

        rows = comparison.compare(load_results(results))
        click.echo(json.dumps(comparison.as_json(rows), indent=2))
        return
    _report(results, plots)


@click.command()
@click.option("--length", type=TOKENS, required=True, help=_INCLUSIVE)
@click.option(
    "--min-retention",
    type=Number(0, 1, min_open=True),
    default=0.97,
    show_default=True,
    help="Share of the baseline's accuracy to keep.",
)
@click.option(
    "--cost",
    type=Choice(COSTS),
    default="measured",
    show_default=True,
    help="The time of phase 1 that counts: as it was here, or as star-attn plan predicts it for "
    "H200s.",
)
@tasks_option(TASKS)
@run_options(samples=10, blocks=BLOCKS, anchors=ANCHORS)
def tune(length: int, min_retention: float, cost: Cost, **options: Any) -> None:
    """Find the block and anchor size and the selected pages for a length: a grid of them on tasks
    of RULER."""
    default = Path("results", f"tune-{length}-{Path(options['model']).name}")
    options["results"] = options["results"] or default
    options |= {"lengths": (length,), "times": True}

    def choose(results: Path) -> None:
        from star_attention.evals.report import compare
        from star_attention.evals.results import load_results
        from star_attention.evals.tune import print_choice

        rows = compare(load_results(results))
        print_choice(rows, min_retention, _model_config(options), cost)

    _evaluate("ruler", options, choose, distinct=True)


def _evaluate(
    benchmark: str,
    options: dict[str, Any],
    report: Callable[[Path], None] | None = None,
    distinct: bool = False,
) -> None:
    """Runs all configurations, each on its ranks, and reports; exit code 1 if all samples of one
    failed.

    Args:
        report: instead of the comparison.
        distinct: at a single length, leave out configurations whose answers an earlier one has.
    """
    from star_attention.models.checkpoint import find_model

    ranks, tp = options["ranks"] or 1, options["tp"]
    check_ranks(options["ranks"], tp)
    options["results"] = options["results"] or Path(
        "results", f"{benchmark}-{Path(options['model']).name}"
    )
    check_preset(options)
    options |= _PRESETS.get(options["preset"], {})
    methods = _methods(options, distinct)
    if benchmark != "custom":
        _check_names(benchmark, options["tasks"])
    find_model(options["model"], options["load_format"] != "dummy")
    engine_of(options)
    if "star" not in options["attention"] and not is_started_again():
        when = f"with --attention {','.join(options['attention'])}"
        refuse_idle(when, "preset", *PRESET_OPTIONS, "anchor_mode")
    if benchmark == "custom":
        refuse_idle("with one's own questions", "data_dir", "seed")
    if benchmark == "aa-lcr":
        refuse_idle("with AA-LCR, which is not generated", "seed")
    try:
        if needs_ranks(options["ranks"], tp):
            code = run_as_ranks(ranks * tp, options["oversubscribe"], more=["--no-report"])
            if code not in (0, 1):
                sys.exit(code)
            failed = code == 1
        else:
            failed = _run(benchmark, methods, options)
    except KeyboardInterrupt:
        say("stopped: the same command goes on from here")
        raise
    if options["report"]:
        (report or _report)(options["results"])
    if failed:
        raise click.exceptions.Exit(1)


def _methods(options: dict[str, Any], distinct: bool) -> list[Method]:
    """The configurations. Raises UserError for sizes that do not fit a length, and for selected
    pages beside an anchor mode that they do not go with."""
    from star_attention.evals.runner import Method

    methods = [Method(name) for name in ("dense", "ring") if name in options["attention"]]
    division = options["anchor_mode"], options["tokens_per_block"]
    if "star" in options["attention"]:
        axes = options["block_size"], options["anchor_size"], options["selected_pages"]
        methods += dict.fromkeys(Method("star", str(b), str(a), n) for b, a, n in product(*axes))
        StarConfig(anchor_mode=division[0], selected_pages=max(options["selected_pages"]))
    for length in options["lengths"] or ():
        configs = [method.config(length, *division) for method in methods]
        if distinct:
            configs = [_as_it_counts(config, length) for config in configs]
            return [m for i, m in enumerate(methods) if configs.index(configs[i]) == i]
    return methods


def _as_it_counts(config: StarConfig, length: int) -> StarConfig:
    """Without selected pages where no block has any to choose from."""
    plan = make_plan(length, config)
    return config if any(map(plan.candidates, plan.blocks)) else replace(config, selected_pages=0)


def _check_names(benchmark: str, tasks: Sequence[str]) -> None:
    known = _benchmark(benchmark).TASKS
    for name in tasks:
        if name not in known and name != "all":
            raise UserError(f"--tasks: {name!r} is not one of all, {', '.join(known)}")


def _run(benchmark: str, methods: Sequence[Method], options: dict[str, Any]) -> bool:
    """What is pending, with all ranks that there are. Whether all samples of a run failed."""
    from star_attention.evals.results import locked

    prompts, tasks, configurations = _prepare(
        benchmark, methods, options, world_size() // options["tp"]
    )
    with locked(options["results"]):
        runs = _open_runs(tasks, methods, configurations, options)
        pending = sum(len(run.pending(task)) for run in runs for task in run.tasks)
        if pending:
            _answer(prompts, runs, pending, options)
    reasons = {run.results.label: run.first_failure() for run in runs}
    failed = [name for name, reason in reasons.items() if reason]
    if failed:
        reason = " ".join(reasons[failed[0]].split())
        say(f"error: every sample of {', '.join(failed)} failed, the first: {reason}")
    return bool(failed)


def _answer(
    prompts: PromptTokenizer, runs: Sequence[Run], pending: int, options: dict[str, Any]
) -> None:
    """Loads the model and has it answer."""
    from star_attention.evals.runner import evaluate
    from star_attention.llm import LLM

    llm = LLM(
        options["model"],
        StarConfig(tokens_per_block=options["tokens_per_block"], kv_dtype=options["kv_dtype"]),
        template=options["template"],
        allow_special=options["allow_special"],
        **llm_options_of(options),
    )
    longest = max((task.length or 0 for run in runs for task in run.tasks), default=0)
    if longest > llm.model_config.max_position:
        say(
            f"warning: the model was made for {llm.model_config.max_position} tokens, "
            f"not {longest}: answers may get worse"
        )
    with warnings.catch_warnings(), _progress(pending) as on_sample:
        warnings.simplefilter("ignore", UserWarning)  # that line, again for each sample
        evaluate(llm, prompts, runs, on_sample)


def _prepare(
    benchmark: str, methods: Sequence[Method], options: dict[str, Any], ranks: int
) -> tuple[PromptTokenizer, list[Task], list[dict[str, Any]]]:
    """The prompts, what is asked, and each method's configuration, with all checks that need no
    model."""
    from star_attention.evals.prompts import PromptTokenizer
    from star_attention.models.checkpoint import find_model

    path = find_model(options["model"], options["load_format"] != "dummy")
    special = options["allow_special"]
    prompts = PromptTokenizer(path, options["template"], allow_special=special)
    device, dtype = _device_and_dtype(path, options)
    if benchmark == "custom":
        from star_attention.evals.custom import load_task

        tasks, data = [load_task(options["file"], options["max_tokens"])], options["file"].name
    else:
        tasks, data = _load_tasks(_benchmark(benchmark), prompts, options)
    shared = {
        "benchmark": benchmark,
        "data": data,
        **{name: options[name] for name in ("model", "template", "allow_special", "seed")},
        "device": device,
        "dtype": dtype,
        "quantization": None if (asked := options["quantization"]) == "auto" else asked,
        **{name: options[name] for name in ("tokens_per_block", "anchor_mode")},
        "ranks": ranks,
        **({} if options["kv_dtype"] == "auto" else {"kv_dtype": options["kv_dtype"]}),
    }
    return prompts, tasks, [{**shared, **method.configuration} for method in methods]


def _open_runs(
    tasks: Sequence[Task],
    methods: Sequence[Method],
    configurations: Sequence[dict[str, Any]],
    options: dict[str, Any],
) -> list[Run]:
    from star_attention.evals.results import open_results
    from star_attention.evals.runner import Run

    division = {name: options[name] for name in ("anchor_mode", "tokens_per_block")}
    return [
        Run(
            open_results(options["results"], configuration),
            tasks,
            options["samples"],
            partial(method.config, **division),
            options["times"],
        )
        for method, configuration in zip(methods, configurations, strict=True)
    ]


def _device_and_dtype(path: Path, options: dict[str, Any]) -> tuple[str, str]:
    """What the model runs on, as results say it, and computes in."""
    from star_attention.models.checkpoint import is_engine_folder

    if is_engine_folder(path):
        from star_attention.engines.tensorrt.read import read_engine_config

        return "tensorrt", read_engine_config(path).dtype
    return options["device"], options["dtype"] or DTYPES[options["device"]][0]


def _model_config(options: dict[str, Any]) -> ModelConfig:
    from star_attention.models.checkpoint import find_model, is_engine_folder, open_checkpoint

    path = find_model(options["model"], options["load_format"] != "dummy")
    if is_engine_folder(path):
        from star_attention.engines.tensorrt.read import read_engine_config

        return read_engine_config(path).model
    return open_checkpoint(path, with_weights=False).config


def _load_tasks(
    benchmark: ModuleType, prompts: PromptTokenizer, options: dict[str, Any]
) -> tuple[list[Task], str]:
    """The asked tasks at all lengths; of `all`, those that have their files and room."""
    from star_attention.evals.sample import UnavailableError

    wanted, data_dir = options["tasks"], options["data_dir"]
    lengths = options["lengths"] or (None,)
    tasks, left_out = [], {}
    for name in benchmark.TASKS if "all" in wanted else wanted:
        for length in lengths:
            try:
                task = benchmark.load_task(name, prompts, length, options["seed"], data_dir)
                tasks.append(task)
            except UnavailableError as error:
                if "all" not in wanted:
                    raise
                left_out[f"{name} is left out: {error}"] = error
    for line in left_out:
        say(line)
    if not tasks:
        raise next(iter(left_out.values()))
    for note in dict.fromkeys(task.note for task in tasks if task.note):
        say(note)
    tasks.sort(key=lambda task: lengths.index(task.length))
    return tasks, benchmark.data_label(data_dir)


def _benchmark(name: str) -> ModuleType:
    from star_attention.evals import aa_lcr, babilong, infinitebench, ruler

    return {
        "ruler": ruler,
        "babilong": babilong,
        "infinitebench": infinitebench,
        "aa-lcr": aa_lcr,
    }[name]


@contextmanager
def _progress(pending: int) -> Iterator[OnSample]:
    """A bar with the running accuracy on an interactive terminal, a line per task elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    def state(run: Run, task: Task) -> str:
        records = [
            record
            for (length, name, _), record in run.results.records.items()
            if (length, name) == (task.length, task.name)
        ]
        scores = [record["score"] for record in records if "error" not in record]
        accuracy = f"{100 * sum(scores) / len(scores):.1f} %" if scores else "no answers"
        failed = f", {len(records) - len(scores)} failed" if len(scores) < len(records) else ""
        length = "" if task.length is None else f"{task.length:,} tokens, "
        return (
            f"{run.results.label}: {length}{task.name}: {accuracy} of {len(scores)} samples{failed}"
        )

    if not terminal.is_interactive():

        def on_sample(run: Run, task: Task, record: dict[str, Any]) -> None:
            if not run.pending(task) or record["index"] == task.indices[: run.samples][-1]:
                say(state(run, task))

        yield on_sample
        return
    console = Console(stderr=True, force_terminal=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console, transient=True) as bar:
        task_id = bar.add_task("first sample", total=pending)
        yield lambda run, task, record: bar.update(task_id, advance=1, description=state(run, task))


def _report(folder: Path, plots: bool = True) -> None:
    from star_attention.evals.plots import draw
    from star_attention.evals.report import compare, print_report
    from star_attention.evals.results import load_results

    found = load_results(folder)
    rows = compare(found)
    print_report(found, rows)
    if plots:
        files = ["predictions (.jsonl)", "scores (.json)", *(p.name for p in draw(rows, folder))]
        click.echo(f"In {folder}: {', '.join(files)}")
