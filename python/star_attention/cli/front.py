"""A front and its ranks, which are processes of their own: what `serve` and `chat` share."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention.cli.options import engine_of, star_config_of
from star_attention.cli.ranks import arguments, start_ranks
from star_attention.distributed import world_size
from star_attention.distributed.launch import mpirun_command
from star_attention.errors import UserError

if TYPE_CHECKING:
    from star_attention.models.tokenizer import Tokenizer
    from star_attention.serve.process import EngineProcess

_HOST_FOLDER = "STAR_ATTENTION_HOST_FOLDER"


def run_with_ranks(options: dict[str, Any], run_front: Callable[[], int]) -> int:
    """Runs what this process is to be: ranks that a front started, rank 0 of somebody else's
    mpirun, which starts a front, or the front, which starts its ranks. The exit code.

    Raises:
        UserError: the extra `serve` is missing.
    """
    from star_attention.serve.meeting import meeting_of_rank0

    if meeting := meeting_of_rank0():
        _serve_front(meeting.wait_for_front(), options)
        return 0
    with _host_folder(options):
        if world_size() > 1:
            return _serve_own_front(options)
        _check_installed()
        return run_front()


def _check_installed() -> None:
    try:
        import star_attention.serve.app  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing: pip install 'star-attention-trt[serve]'"
        ) from None


def engine_maker(
    options: dict[str, Any], tokenizer: Tokenizer
) -> Callable[[Callable[[int], None]], EngineProcess]:
    """Makes the engine of a front, of what is to be called with an exit code if its ranks cannot
    serve.

    Args:
        tokenizer: whose end tokens end answers, beside the model's.

    Raises:
        UserError: options are wrong, there are fewer cores than ranks, or no mpirun.
    """
    from star_attention.serve.meeting import OuterRanks, OwnRanks
    from star_attention.serve.process import EngineProcess

    star_config_of(options), engine_of(options)
    processes = (options["ranks"] or 1) * options["tp"]
    ranks: OwnRanks | OuterRanks = OuterRanks()
    if not OuterRanks.are_here():
        if processes > 1:
            mpirun_command(processes, options["oversubscribe"])
        ranks = OwnRanks(functools.partial(start_ranks, processes, options["oversubscribe"]))
    return lambda on_end: EngineProcess(
        ranks,
        options["restarts"],
        options["stuck_timeout"],
        on_end,
        frozenset(tokenizer.eos_token_ids),
    )


@contextmanager
def _host_folder(options: dict[str, Any]) -> Iterator[None]:
    """Where ranks that this process starts find the host tier."""
    from star_attention.serve.host_tier import host_tier

    gib, processes = options["host_cache_gib"], (options["ranks"] or 1) * options["tp"]
    if not gib or _HOST_FOLDER in os.environ:
        yield
        return
    with host_tier(gib, processes) as folder:
        os.environ[_HOST_FOLDER] = str(folder)
        yield


def _serve_front(connection: Any, options: dict[str, Any]) -> None:
    from star_attention.serve.rank0 import RankOptions, serve_front

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides what an interrupt means
    gap, disk = options["max_gap"], options["disk_cache_gib"] and options["context_dir"]
    serve_front(
        connection,
        RankOptions(
            options["model"],
            star_config_of(options),
            engine_of(options),
            gap and gap / 1e3,
            host_folder=os.environ.get(_HOST_FOLDER),
            disk_folder=disk and str(Path(disk).resolve() / "blocks"),
            host_cache_gib=options["host_cache_gib"],
            disk_cache_gib=options["disk_cache_gib"],
        ),
    )


def _serve_own_front(options: dict[str, Any]) -> int:
    """Under mpirun rank 0 starts the front, which ends with it."""
    from star_attention.serve.meeting import Meeting, OuterRanks

    meeting = Meeting.somewhere()
    command = [sys.executable, "-m", "star_attention", *arguments()]
    front = subprocess.Popen(
        command,
        env={**os.environ, **OuterRanks.variables(meeting)},
        start_new_session=True,  # mpirun would end it before it has told its clients
    )
    signal.signal(signal.SIGTERM, lambda *_: front.terminate())
    try:
        if connection := meeting.wait_for_front(lambda: front.poll() is None):
            with connection:
                _serve_front(connection, options)
    finally:
        meeting.is_over()
        code = front.wait()
    return code if code >= 0 else 1
