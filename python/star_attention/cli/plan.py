"""`star-attn plan`."""

from __future__ import annotations

import json
from typing import Any

import click

from star_attention.cli import terminal
from star_attention.cli.options import TOKENS, division_options
from star_attention.config import StarConfig
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.plan import make_plan


@click.command()
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
    if model is not None:
        from star_attention.models.checkpoint import find_model, open_checkpoint

        shape, name = open_checkpoint(find_model(model)).config, model
    division_plan = make_plan(context, StarConfig(**division), ranks, shape)
    if as_json:
        click.echo(json.dumps(terminal.plan_as_json(division_plan, shape), indent=2))
    else:
        terminal.print_plan(division_plan, shape, name)
    if plot:
        from star_attention.cli.plot import plot_plan

        plot_plan(division_plan, plot)
        if not as_json:
            click.echo(f"Drawn into {plot}")
