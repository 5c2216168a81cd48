"""The program `star-attn`."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from star_attention.cli.ranks import arguments, print_where_started
from star_attention.distributed import world_size
from star_attention.errors import RankError, UserError, say

if TYPE_CHECKING:
    from star_attention.runtime.job import Job

# Where each command is: its module is imported when it is used.
_COMMANDS = {
    "ask": ("ask", "ask"),
    "build": ("build", "build"),
    "chat": ("chat", "chat"),
    "eval": ("evals", "evals"),
    "export": ("export", "export"),
    "info": ("info", "info"),
    "plan": ("plan", "plan"),
    "serve": ("serve", "serve"),
    "trtllm": ("trtllm", "trtllm"),
    "tune": ("evals", "tune"),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, command = _COMMANDS[name]
        return getattr(importlib.import_module(f"star_attention.cli.{module}"), command)


def _option_name(name: str) -> str:
    """Names of options may be spelled with `-` or, as TensorRT-LLM has them, with `_`."""
    return name.replace("_", "-")


@click.group(
    cls=_LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": _option_name,
    },
)
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


def main() -> None:
    """Runs the command; under mpirun on rank 0, for which the other ranks work."""
    if world_size() > 1:
        _job()
        print_where_started()
    try:
        code = cli(arguments() or ["--help"], standalone_mode=False)
        if sys.stdout:
            sys.stdout.flush()
        if code:
            _end(code)
    except BrokenPipeError:
        _drop_output()
        _end(1)
    except OSError as error:
        _drop_output()
        what = "the output" if error.filename is None else error.filename
        _fail(f"{what} cannot be read or written: {error.strerror or error}")
    except UserError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(error.format_message())
    except (RankError, MemoryError) as error:
        _fail(str(error), code=1)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _end(130)


def _drop_output() -> None:
    """What standard output did not take is not tried again when Python ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int = 2) -> NoReturn:
    say(f"error: {message}")
    _end(code)


def _end(code: int) -> NoReturn:
    if world_size() > 1:
        _job().stop(code)
    sys.exit(code)


def _job() -> Job:
    from star_attention.runtime.job import current_job

    return current_job()
