"""`star-attn build`. Options are trtllm-build's where they mean the same."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from star_attention.cli.options import TOKENS, Choice, Number
from star_attention.engines.tensorrt.build import (
    BUILD_DTYPES,
    BUILD_QUANTIZATIONS,
    GEMM_PLUGIN,
    BuildOptions,
    build_engine,
    limits_for,
)
from star_attention.models.checkpoint import find_model, open_checkpoint


@click.command()
@click.option(
    "--model",
    "--checkpoint_dir",
    required=True,
    help="A Hugging Face folder (safetensors) or name in its cache, a GGUF file, or smollm2.",
)
@click.option(
    "--output_dir",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The engine's folder; one that is an engine's already is replaced.",
)
@click.option("--dtype", type=Choice(BUILD_DTYPES), default="float16", show_default=True)
@click.option(
    "--gemm_plugin",
    type=Choice(GEMM_PLUGIN),
    default="auto",
    show_default=True,
    help="Projections by cuBLAS where TensorRT adds up in float16, or always by TensorRT.",
)
@click.option(
    "--quantization",
    type=Choice(BUILD_QUANTIZATIONS),
    default="none",
    show_default=True,
    help="fp8: projections compute in it, and take half of the memory.",
)
@click.option("--max_batch_size", type=int, default=8, show_default=True, help="Questions at once.")
@click.option(
    "--max_input_len",
    type=TOKENS,
    help="Tokens of context and question.  [default: max_seq_len less 1024 for the answer]",
)
@click.option(
    "--max_seq_len",
    type=TOKENS,
    help="Tokens of context, question and answer.  [default: what the model was made for]",
)
@click.option(
    "--max_num_tokens",
    type=TOKENS,
    help="Tokens in one pass, at least a block; activations take memory for so many.  "
    "[default: a block, or a quarter of max_seq_len]",
)
@click.option(
    "--tokens_per_block",
    type=TOKENS,
    default=128,
    show_default=True,
    help="Tokens a page of the KV cache holds.",
)
@click.option("--block_size", type=TOKENS, help="Of contexts that are asked without --block-size.")
@click.option("--anchor_size", type=TOKENS, help="Likewise.")
@click.option("--cp_size", type=int, help="Ranks that it runs on.  [default: any number]")
@click.option(
    "--optimization_level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="How long TensorRT looks for the fastest kernels.",
)
@click.option(
    "--timing_cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What TensorRT timed, kept between builds.  [default: in the user's cache folder]",
)
@click.option(
    "--workspace_gib",
    type=Number(0, min_open=True),
    help="Memory that a kernel may use.  [default: any]",
)
@click.option("--workers", type=int, help="Threads that build.")
def build(model: str, output_dir: Path, **options: Any) -> None:
    """Build a TensorRT engine: one for all ranks, to be asked with `ask --engine_dir`."""
    how = {field.name: options.pop(field.name) for field in fields(BuildOptions)}
    build_options = BuildOptions(**how)
    path = find_model(model)
    limits = limits_for(open_checkpoint(path).config, **options)
    console = Console(stderr=True)
    with console.status("reading the model") as status:
        config = build_engine(path, output_dir, limits, build_options, status.update)
    projections = "projections in FP8, " if build_options.is_fp8 else ""
    click.echo(
        f"Written: {output_dir}, for {config.gpu}, TensorRT {config.tensorrt}, {config.dtype}, "
        f"{projections}up to {limits.max_seq_len:,} tokens\n"
        f"Ask it: star-attn ask --engine_dir {output_dir} --context-file ... --question ..."
    )
