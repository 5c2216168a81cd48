"""`star-attn serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from star_attention.cli.front import engine_maker, run_with_ranks
from star_attention.cli.options import (
    Number,
    check_run,
    engine_options,
    model_options,
    refuse_idle,
    run_options,
    take_model,
)
from star_attention.cli.ranks import check_ranks
from star_attention.models.checkpoint import find_model

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
    take_model(options)
    check_ranks(options["ranks"], options["tp"])
    check_run(options)
    if not options["context_dir"]:
        refuse_idle("without --context-dir", "disk_cache_gib")
    return run_with_ranks(options, lambda: _run_front(options))


def _run_front(options: dict[str, Any]) -> int:
    from star_attention.models.tokenizer import Tokenizer
    from star_attention.serve.auth import read_api_keys
    from star_attention.serve.division import DENSE_TOKENS
    from star_attention.serve.options import ServeOptions
    from star_attention.serve.run import run_front

    path = find_model(options["model"], options["load_format"] != "dummy")
    tokenizer = Tokenizer(path, options["template"], allow_special=options["allow_special"])
    serve_options = ServeOptions(
        model_names=options["names"] or (Path(options["model"]).name,),
        host=options["host"],
        block_tokens=options["block_size"] or DENSE_TOKENS,
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
        engine_maker(options, tokenizer),
        tokenizer,
        serve_options,
        options["port"],
        options["shutdown_timeout"],
    )
