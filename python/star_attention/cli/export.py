"""`star-attn export`."""

from __future__ import annotations

from pathlib import Path

import click

from star_attention.cli.options import Choice
from star_attention.engines.tensorrt.onnx import EXPORT_DTYPES, export_graph
from star_attention.models.checkpoint import find_model


@click.command()
@click.option("--model", required=True, help="As for `ask`.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to write to; in the model's own, weights stay in the safetensors files.",
)
@click.option(
    "--dtype",
    type=Choice(EXPORT_DTYPES),
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
    path = export_graph(find_model(model), output_dir, dtype, gemm_plugin=gemm_plugin)
    click.echo(f"Written: {path}")
