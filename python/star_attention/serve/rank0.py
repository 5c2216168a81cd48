"""Rank 0 of a server: loads the model on all ranks and serves its front."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from star_attention.config import StarConfig
from star_attention.engines.base import ModelEngine
from star_attention.engines.loader import division_of
from star_attention.engines.options import EngineOptions, free_memory
from star_attention.models.checkpoint import find_model, is_engine_folder
from star_attention.models.fingerprint import fingerprint
from star_attention.runtime.job import current_job
from star_attention.runtime.leader import Leader
from star_attention.runtime.orders import OpenStore, Order
from star_attention.runtime.pace import Pace
from star_attention.runtime.store import TIERS, Store, open_store
from star_attention.runtime.tiers import Tier
from star_attention.serve.division import division_for
from star_attention.serve.loop import ServerLoop
from star_attention.serve.messages import Ready
from star_attention.serve.warm_up import warm_up

_CPU_SHARE, _CPU_MOST = 0.25, 4 << 30  # of free memory, and bytes, that all ranks' pages take


@dataclass(frozen=True)
class RankOptions:
    """How the ranks of a server serve.

    Attributes:
        max_gap: seconds between two tokens of an answer at most; None: `gap_factor` times what it
            is while nothing is read.
        host_folder, disk_folder: of the lower tiers of the KV cache; None: there is none.
        host_cache_gib, disk_cache_gib: what a rank may have there.
    """

    model: str
    config: StarConfig
    engine: EngineOptions
    max_gap: float | None = None
    gap_factor: float = 3.0
    host_folder: str | None = None
    disk_folder: str | None = None
    host_cache_gib: float = 0.0
    disk_cache_gib: float = 0.0


def serve_front(connection: Connection, options: RankOptions) -> None:
    """Until the front says stop or is gone.

    Raises:
        UserError: the model cannot be used.
    """
    job = current_job()
    path = find_model(options.model, options.engine.load_format != "dummy")
    config = division_of(path, options.config, options.engine)
    on_gpu = options.engine.device == "cuda" or is_engine_folder(path)
    engine_options = options.engine if on_gpu else _with_pages(options.engine, job.comm.size)
    number, worker, limits = job.load(path, config.tokens_per_block, engine_options)
    engine, num_ranks = worker.engine, worker.comm.size
    longest = engine.config.max_position
    execute = functools.partial(job.execute, number)
    page_bytes = engine.page_bytes * engine.config.num_layers
    store = _store(execute, path, options, engine)
    leader = Leader(
        execute,
        engine,
        num_ranks,
        limits,
        shares_blocks=True,
        store=store,
        pace=Pace(options.max_gap, options.gap_factor),
    )
    if on_gpu:
        warm_up(leader, division_for(1, config, num_ranks))
    ready = Ready(
        device="cuda" if on_gpu else "cpu",
        dtype=engine.dtype,
        num_ranks=num_ranks,
        max_tokens=min(longest, limits.seq_len or longest),
        kv_tokens=limits.pages * engine.kv_packing * config.tokens_per_block * num_ranks,
        tokens_per_block=config.tokens_per_block,
        page_bytes=page_bytes,
    )
    try:
        connection.send(ready)
    except ConnectionError:
        return  # the front has ended meanwhile
    ServerLoop(
        leader,
        connection,
        lambda tokens: division_for(tokens, config, num_ranks),
        frozenset(engine.config.eos_token_ids),
        limits.pages,
        page_bytes,
    ).run()
    job.unload(number)


def _store(
    execute: Callable[[Order], Any], path: Path, options: RankOptions, engine: ModelEngine
) -> Store | None:
    """The lower tiers; None: there are none."""
    folders: dict[Tier, str | None] = {"host": options.host_folder, "disk": options.disk_folder}
    sizes = {"host": options.host_cache_gib, "disk": options.disk_cache_gib}
    budgets = {tier: int(sizes[tier] * 2**30) for tier in TIERS if folders[tier]}
    if not budgets:
        return None
    order = OpenStore(path.name, fingerprint(path), folders["host"], folders["disk"])
    return open_store(execute, order, budgets, engine, options.engine.tp)


def _with_pages(options: EngineOptions, processes: int) -> EngineOptions:
    """A server's pages are bounded on the CPU too, where they would take what memory there is."""
    if options.kv_cache_gib is not None:
        return options
    room = min(int(_CPU_SHARE * free_memory()), _CPU_MOST)
    return replace(options, kv_cache_gib=room / processes / 2**30)
