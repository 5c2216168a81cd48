"""The program `star-attn`."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from star_attention.cli.ask import ask
from star_attention.cli.build import build
from star_attention.cli.evals import evals, tune
from star_attention.cli.export import export
from star_attention.cli.info import info
from star_attention.cli.plan import plan
from star_attention.cli.ranks import arguments
from star_attention.cli.trtllm import trtllm
from star_attention.distributed import world_size
from star_attention.errors import RankError, UserError, say
from star_attention.runtime.job import current_job


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


for command in (plan, ask, export, build, info, evals, tune, trtllm):
    cli.add_command(command)


def main() -> None:
    """Runs the command; under mpirun on rank 0, for which the other ranks work."""
    if world_size() > 1:
        current_job()
    try:
        if code := cli(arguments() or ["--help"], standalone_mode=False):
            _end(code)
    except UserError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(error.format_message())
    except (RankError, MemoryError) as error:
        _fail(str(error), code=1)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _end(130)


def _fail(message: str, code: int = 2) -> NoReturn:
    say(f"error: {message}")
    _end(code)


def _end(code: int) -> NoReturn:
    if world_size() > 1:
        current_job().stop(code)
    sys.exit(code)
