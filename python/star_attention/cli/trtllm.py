"""`star-attn trtllm`: engines by TensorRT-LLM's trtllm-build."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from star_attention.cli.options import TOKENS, Choice
from star_attention.config import ANCHOR_MODES, StarConfig
from star_attention.errors import UserError
from star_attention.trtllm import engine_folder
from star_attention.trtllm.settings import (
    MODEL_CLASSES,
    MODEL_FILE,
    check_flags,
    check_model,
    check_version,
)

_FOLDER = click.Path(path_type=Path, file_okay=False)
_MAX_NUM_TOKENS = "8192"  # trtllm-build's default


@click.group()
def trtllm() -> None:
    """Engines by TensorRT-LLM's own trtllm-build (releases 1.0 to 1.2)."""


@trtllm.command("model-file")
def model_file() -> None:
    """Print the path for trtllm-build's --model_cls_file."""
    click.echo(MODEL_FILE)


def finish_options(command: Callable) -> Callable:
    options = [
        click.option("--star_block_size", type=TOKENS, help="Of contexts asked without one."),
        click.option("--star_anchor_size", type=TOKENS, help="Likewise."),
        click.option("--star_anchor_mode", type=Choice(ANCHOR_MODES), help="Likewise."),
        click.option("--tokenizer_dir", type=_FOLDER, help="The model's Hugging Face folder."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@trtllm.command(context_settings={"ignore_unknown_options": True})
@click.option("--checkpoint_dir", type=click.Path(path_type=Path), required=True)
@click.option("--output_dir", type=_FOLDER, default="engine_outputs", show_default=True)
@click.option("--tokens_per_block", type=TOKENS, default=128, show_default=True, help="64 or 128.")
@finish_options
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def build(
    checkpoint_dir: Path,
    output_dir: Path,
    tokens_per_block: int,
    tokenizer_dir: Path | None,
    flags: tuple[str, ...],
    **star: Any,
) -> None:
    """Run trtllm-build with Star Attention's model class, then `finish`. FLAGS are trtllm-build's
    other ones, passed on as they are."""
    given = _as_dict(flags)
    for flag in ("model_cls_file", "model_cls_name"):
        if flag in given:
            raise UserError(
                f"--{flag} is {given[flag]}: leave it away, Star Attention brings its own model "
                "class; other classes take trtllm-build itself, without --star_... flags"
            )
    check_flags(given)
    block, anchor = star["star_block_size"], star["star_anchor_size"]
    StarConfig(block, anchor, tokens_per_block=tokens_per_block)
    most = given.get("max_num_tokens", _MAX_NUM_TOKENS)
    if block and most.isdecimal() and block > int(most):
        raise UserError(f"--max_num_tokens is {most}: use at least --star_block_size, {block}")
    pretrained = _read_config(checkpoint_dir)
    check_model(pretrained)
    command = [_trtllm_build(), "--checkpoint_dir", str(checkpoint_dir)]
    command += ["--model_cls_file", str(MODEL_FILE)]
    command += ["--model_cls_name", MODEL_CLASSES[pretrained["architecture"]]]
    command += ["--output_dir", str(output_dir), "--tokens_per_block", str(tokens_per_block)]
    code = subprocess.call([*command, *flags])
    if code:
        sys.exit(code)
    if "dry_run" not in given:
        engine_folder.finish(output_dir, tokenizer_dir, **star)


@trtllm.command()
@click.option("--engine_dir", type=_FOLDER, required=True)
@finish_options
def finish(engine_dir: Path, tokenizer_dir: Path | None, **star: Any) -> None:
    """Complete the folder of an engine that trtllm-build made with --model_cls_file."""
    engine_folder.finish(engine_dir, tokenizer_dir, **star)


def _trtllm_build() -> str:
    """The program, of a release that Star Attention knows."""
    program = shutil.which("trtllm-build")
    try:
        check_version(version("tensorrt_llm"))
    except PackageNotFoundError:
        program = None
    if program is None:
        raise UserError(
            "TensorRT-LLM is not installed: use its container, pip install tensorrt_llm==1.2.0, or "
            "star-attn build, which needs none"
        )
    return program


def _read_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint if checkpoint.suffix == ".json" else checkpoint / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--checkpoint_dir {checkpoint} is not convert_checkpoint.py's output: {error}"
        ) from None


def _as_dict(flags: tuple[str, ...]) -> dict[str, str]:
    """Flag -> value of a command line; "true" where there is none."""
    result, name = {}, ""
    for word in flags:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            result[name] = value or "true"
        elif name:
            result[name] = word
    return result
