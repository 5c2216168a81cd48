"""`star-attn plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from star_attention.cli import terminal
from star_attention.cli.options import TOKENS, Choice, check_preset, division_options
from star_attention.config import ATTENTION_METHODS, StarConfig
from star_attention.models.config import SHAPES
from star_attention.plan import make_plan
from star_attention.predict import Rates


def _rate(option: str, what: str) -> Callable[[Callable], Callable]:
    field = option.removeprefix("--").replace("-", "_")
    return click.option(
        option,
        type=click.FloatRange(min=0, min_open=True),
        default=getattr(Rates, field),
        show_default=True,
        help=f"Measured rate: {what}.",
    )


@click.command()
@click.option("--context", type=TOKENS, required=True, help="Tokens of the context.")
@click.option("--ranks", type=int, default=1, show_default=True, help="Ranks to spread it over.")
@division_options
@click.option("--attention", type=Choice(ATTENTION_METHODS), default="star", show_default=True)
@click.option("--model", help="Weigh the work for this model instead of --shape.")
@click.option(
    "--shape",
    type=Choice(list(SHAPES)),
    default="llama-3.1-8b",
    show_default=True,
    help="Weigh the work for a model of this shape.",
)
@_rate("--gemm-tflops", "TFLOP/s of a rank's projections")
@_rate("--attention-tflops", "TFLOP/s of a rank's attention")
@_rate("--link-gbs", "GB/s that a rank receives from the others")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw who sees what into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    context: int,
    ranks: int,
    model: str | None,
    shape: str,
    gemm_tflops: float,
    attention_tflops: float,
    link_gbs: float,
    plot: str | None,
    as_json: bool,
    **division: Any,
) -> None:
    """Show how a context would be cut into blocks and spread over ranks, what it costs, and how
    long phase 1 would take at measured rates.

    The default rates are those of NVIDIA H200s linked by NVLink, in bfloat16 (docs/results.md).
    """
    check_preset(division)
    config = SHAPES[shape]
    if model is not None:
        from star_attention.models.checkpoint import find_model, open_checkpoint

        config = open_checkpoint(find_model(model), with_weights=False).config
    division_plan = make_plan(context, StarConfig(**division), ranks, config)
    rates = Rates(gemm_tflops, attention_tflops, link_gbs)
    if as_json:
        predictions = terminal.predictions_as_json(division_plan, rates)
        click.echo(json.dumps(terminal.plan_as_json(division_plan) | predictions, indent=2))
    else:
        terminal.print_plan(division_plan, model or shape, rates)
    if plot:
        from star_attention.cli.plot import plot_plan

        plot_plan(division_plan, plot)
        if not as_json:
            click.echo(f"Drawn into {plot}")
