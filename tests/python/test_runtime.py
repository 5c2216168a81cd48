"""Limits of memory, checked before anything runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.base import Limits
from star_attention.engines.torch.engine import TorchEngine
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.models.loading import random_weights
from star_attention.models.rope import RopeConfig
from star_attention.plan import make_plan
from star_attention.runtime.leader import lead_together
from star_attention.runtime.phase1 import scratch_pages
from star_attention.runtime.sampling import SamplingParams
from star_attention.runtime.scheduler import Scheduler

TINY = ModelConfig(1, 32, 32, 4, 2, 8, 64, 1024, 1e-5, RopeConfig())
CONTEXT = np.zeros(1000, np.int32)
CONFIG = StarConfig(block_size=128, tokens_per_block=16)


def make_leader(max_pages, pass_tokens=None):
    comm = SingleProcess()
    weights = random_weights(TINY, torch.float32, torch.device("cpu"))
    engine = TorchEngine(TINY, weights, comm, 16, max_pages)
    engine.limits = replace(engine.limits, pass_tokens=pass_tokens, ring_tokens=pass_tokens)
    return lead_together(engine, comm)


@pytest.mark.parametrize(
    ("max_pages", "message"),
    [
        # Of two ranks, the second would take 504 tokens and an anchor of 128.
        (50, r"1008 tokens of KV cache .* room for 800: use 2 ranks, or a larger"),
        (15, r"use a smaller block size, or a larger --kv-cache-gib"),
    ],
)
def test_kv_cache_that_is_too_small(max_pages, message):
    leader, _ = make_leader(max_pages)
    with pytest.raises(UserError, match=message):
        leader.encode(CONTEXT, CONFIG)
    dense = StarConfig(attention="dense", tokens_per_block=16)
    with pytest.raises(UserError, match="use ring or star over several ranks"):
        leader.encode(CONTEXT, dense)


def pages_of_busiest(context_len, config, num_ranks):
    """None: there is no such plan."""
    try:
        plan = make_plan(context_len, config, num_ranks, TINY)
    except UserError:
        return None
    kept = [sum(-(-part.tokens // 16) for part in plan.parts_of(r)) for r in range(num_ranks)]
    return max(pages + scratch_pages(plan, rank) for rank, pages in enumerate(kept))


@settings(max_examples=30)
@given(
    context_len=st.integers(1, 3000),
    block_pages=st.one_of(st.none(), st.integers(1, 5)),
    anchor_pages=st.one_of(st.none(), st.integers(0, 5)),
    mode=st.sampled_from(["recompute", "local", "broadcast"]),
    attention=st.sampled_from(["star", "star", "ring"]),
    room=st.integers(1, 100),
)
def test_ranks_that_would_fit(context_len, block_pages, anchor_pages, mode, attention, room):
    """The first of a few numbers with which the busiest rank has room."""
    if block_pages is not None and anchor_pages is not None:
        anchor_pages = min(anchor_pages, block_pages)
    sizes = [None if pages is None else 16 * pages for pages in (block_pages, anchor_pages)]
    config = StarConfig(*sizes, mode, tokens_per_block=16, attention=attention)
    assume(pages_of_busiest(context_len, config, 1) is not None)
    scheduler = Scheduler(TINY, Limits(pages=room), 1, 16)
    found = scheduler._room._ranks_that_fit(make_plan(context_len, config, 1, TINY), config)
    tried = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    pages = [pages_of_busiest(context_len, config, n) for n in tried[: tried.index(found or 256)]]
    assert all(each is None or each > room for each in pages)
    if found:
        assert pages_of_busiest(context_len, config, found) <= room


def test_no_room_for_questions():
    leader, worker = make_leader(63)
    context = leader.encode(CONTEXT, CONFIG)
    with pytest.raises(UserError, match=r"the contexts leave room for 0.*or a larger --kv-cache"):
        leader.scheduler.add_question(context, CONTEXT[:20], SamplingParams(max_tokens=4))
    leader.release(context)
    assert worker.pool.pages_in_use == 0


@pytest.mark.parametrize("method", ["star", "dense", "ring"])
def test_passes_are_no_longer_than_the_engine_allows(method):
    leader, worker = make_leader(100, 127)
    step, longest = worker.engine.step, 0

    def counted(token_ids, *arguments):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return step(token_ids, *arguments)

    worker.engine.step = counted
    size = 128 if method == "star" else None
    config = StarConfig(size, attention=method, tokens_per_block=16)
    assert leader.encode(CONTEXT, config).is_ready
    assert longest == 127
