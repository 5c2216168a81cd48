"""Starting a command again as ranks, and what its ranks are handed.

Arguments and texts are handed over in memory that lives as long as the program that started the
ranks: mpirun takes some arguments for its own, does not pass standard input on reliably, and what
was read from a pipe cannot be read twice.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from star_attention.cli import terminal
from star_attention.distributed import world_size
from star_attention.distributed.launch import RankJob, run_ranks
from star_attention.errors import UserError

_HANDED = "STAR_ATTENTION_HANDED"
_OUTPUT = "STAR_ATTENTION_OUTPUT"
_COMMAND = (sys.executable, "-m", "star_attention")


def arguments() -> list[str]:
    """The command line."""
    return _handed().get("arguments", sys.argv[1:])


def is_started_again() -> bool:
    """Whether a `star-attn` has started this one, and has checked the command line."""
    return _HANDED in os.environ


def handed_texts(kind: str) -> list[str] | None:
    """The texts that the program which started the ranks has read, as `run_as_ranks` calls them."""
    return _handed().get(kind)


def print_where_started() -> None:
    """What this rank prints goes to where the program that started the ranks writes, instead of
    through mpirun, which passes over what cannot be written."""
    if _OUTPUT in os.environ:
        with contextlib.suppress(OSError):  # a socket
            os.dup2(os.open(os.environ[_OUTPUT], os.O_WRONLY | os.O_APPEND), 1)


def check_ranks(ranks: int | None, tp: int) -> None:
    """Raises UserError if mpirun started another number of processes than `ranks` take."""
    processes = (ranks or 1) * tp
    if ranks is not None and processes != world_size() > 1:
        raise UserError(
            f"--ranks {ranks} with --tp {tp} takes {processes} processes, but mpirun started "
            f"{world_size()}: leave --ranks away"
        )


def needs_ranks(ranks: int | None, tp: int) -> bool:
    """Whether the command is to be started again."""
    return world_size() == 1 and (ranks or 1) * tp > 1


def run_as_ranks(
    processes: int,
    oversubscribe: bool,
    *,
    more: Sequence[str] = (),
    **texts: Sequence[str],
) -> int:
    """Runs this command line, and `more`, under mpirun; its exit code.

    Args:
        texts: for `handed_texts`, by their kind.
    """
    environment = {terminal.INTERACTIVE: "1"} if terminal.is_interactive() else {}
    environment[_OUTPUT] = f"/proc/{os.getpid()}/fd/1"
    environment |= _hand_over(arguments=[*arguments(), *more], **texts)
    return run_ranks(_COMMAND, processes, oversubscribe, **environment)


def start_ranks(processes: int, oversubscribe: bool, variables: dict[str, str]) -> RankJob:
    """Starts this command line as so many processes, with these variables in their environment, in
    a session of their own."""
    variables = {**variables, **_hand_over(arguments=arguments())}
    return RankJob(_COMMAND, processes, oversubscribe, apart=True, **variables)


def _hand_over(**values: Sequence[str]) -> dict[str, str]:
    """Keeps `values` in memory for processes with the variables that this returns."""
    memory = os.memfd_create("star-attn")
    with os.fdopen(os.dup(memory), "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(values, file)
    return {_HANDED: f"/proc/{os.getpid()}/fd/{memory}"}


@functools.cache
def _handed() -> dict[str, Any]:
    name = os.environ.get(_HANDED)
    if name is None:
        return {}
    with open(name, encoding="utf-8", errors="surrogateescape") as file:
        return json.load(file)
