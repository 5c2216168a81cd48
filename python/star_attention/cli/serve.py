"""`star-attn serve`."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from star_attention.cli.options import (
    Number,
    check_run,
    engine_of,
    engine_options,
    model_options,
    refuse_idle,
    run_options,
    star_config_of,
    take_model,
)
from star_attention.cli.ranks import arguments, check_ranks, start_ranks
from star_attention.distributed import world_size
from star_attention.distributed.launch import mpirun_command
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model

_HOST_FOLDER = "STAR_ATTENTION_HOST_FOLDER"
_KEYS = "STAR_ATTENTION_API_KEYS"
_POSITIVE = Number(min=0, min_open=True)


@click.command()
@model_options
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    help="What clients call the model; may be given several times.  [default: the model's name]",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to serve; 0.0.0.0: all interfaces.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0: any that is free.",
)
@run_options
@engine_options
@click.option(
    "--max-gap",
    type=_POSITIVE,
    help="Milliseconds between two tokens of an answer while contexts are read.  "
    "[default: 3 times what it is while none is]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Tokens of an answer, if a request does not say.",
)
@click.option(
    "--max-context-tokens",
    type=click.IntRange(1),
    help="Longer contexts are refused.  [default: what model and KV cache take]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Answers that wait or run at once; further ones get a 429.",
)
@click.option(
    "--max-body-mib",
    type=_POSITIVE,
    default=32.0,
    show_default=True,
    help="Size of a request's body.",
)
@click.option(
    "--max-contexts",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Named contexts at most.",
)
@click.option(
    "--request-timeout",
    type=_POSITIVE,
    default=600.0,
    show_default=True,
    help="Seconds a request may take.",
)
@click.option(
    "--api-key-file",
    type=click.Path(dir_okay=False),
    help=f"Keys that open the API, one a line; or ${_KEYS}, with commas.  [default: it is open]",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="Host name, beside localhost, under which a server on loopback is reached; "
    "may be given several times.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="Site, such as https://example.org, whose pages may use the API; "
    "may be given several times.",
)
@click.option(
    "--host-cache-gib",
    type=Number(min=0),
    default=0.0,
    show_default=True,
    help="Memory of each rank for contexts that have left its GPU; 0: none.",
)
@click.option(
    "--disk-cache-gib",
    type=Number(min=0),
    default=64.0,
    show_default=True,
    help="What each rank may keep in --context-dir.",
)
@click.option(
    "--context-dir",
    type=click.Path(file_okay=False),
    help="Where contexts are kept over a restart.",
)
@click.option(
    "--restart",
    "restarts",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="How often ranks that are lost are started again (not under mpirun).",
)
@click.option(
    "--stuck-timeout",
    type=_POSITIVE,
    default=12.0,
    show_default=True,
    help="Seconds after which ranks that say nothing are ended, and started again.",
)
@click.option(
    "--shutdown-timeout",
    type=Number(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that requests in flight have to end after SIGTERM.",
)
def serve(**options: Any) -> int:
    """Serve a model over HTTP, as OpenAI's API, with a page at /."""
    try:
        from star_attention.serve.meeting import meeting_of_rank0
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing: pip install 'star-attention-trt[serve]'"
        ) from None
    take_model(options)
    check_ranks(options["ranks"], options["tp"])
    check_run(options)
    if not options["context_dir"]:
        refuse_idle("without --context-dir", "disk_cache_gib")
    if meeting := meeting_of_rank0():
        _serve_front(meeting.wait_for_front(), options)
        return 0
    if world_size() > 1:
        with _host_folder(options):
            return _serve_own_front(options)
    with _host_folder(options):
        return _run_front(options)


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


def _run_front(options: dict[str, Any]) -> int:
    from star_attention.models.tokenizer import Tokenizer
    from star_attention.serve.auth import read_api_keys
    from star_attention.serve.division import DENSE_TOKENS
    from star_attention.serve.meeting import OuterRanks, OwnRanks
    from star_attention.serve.options import ServeOptions
    from star_attention.serve.process import EngineProcess
    from star_attention.serve.run import run_front

    config, engine = star_config_of(options), engine_of(options)
    path = find_model(options["model"], engine.load_format != "dummy")
    processes = (options["ranks"] or 1) * engine.tp
    ranks: OwnRanks | OuterRanks = OuterRanks()
    if not OuterRanks.are_here():
        if processes > 1:
            mpirun_command(processes, options["oversubscribe"])
        ranks = OwnRanks(functools.partial(start_ranks, processes, options["oversubscribe"]))

    tokenizer = Tokenizer(path, options["template"], allow_special=options["allow_special"])

    def make_engine(on_end: Callable[[int], None]) -> EngineProcess:
        return EngineProcess(
            ranks,
            options["restarts"],
            options["stuck_timeout"],
            on_end,
            frozenset(tokenizer.eos_token_ids),
        )

    serve_options = ServeOptions(
        model_names=options["names"] or (Path(options["model"]).name,),
        host=options["host"],
        block_tokens=config.block_size or DENSE_TOKENS,
        max_tokens=options["max_tokens"],
        max_context_tokens=options["max_context_tokens"],
        max_queue=options["max_queue"],
        max_body_mib=options["max_body_mib"],
        request_timeout=options["request_timeout"],
        api_keys=read_api_keys(options["api_key_file"] and Path(options["api_key_file"])),
        allowed_hosts=options["allowed_hosts"],
        cors_origins=options["cors_origins"],
        context_dir=options["context_dir"] and Path(options["context_dir"]),
        max_contexts=options["max_contexts"],
    )
    return run_front(
        make_engine, tokenizer, serve_options, options["port"], options["shutdown_timeout"]
    )
