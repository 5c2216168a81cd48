"""Contexts in 8 bits: how pages are quantised, what answers over them are, where they are kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import forced_logits
from star_attention import ops
from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.options import EngineOptions
from star_attention.engines.torch import engine as engine_module
from star_attention.engines.torch.engine import TorchEngine
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.models.loading import random_weights
from star_attention.models.rope import RopeConfig
from star_attention.models.rotary import key_centers, rotary_table
from star_attention.plan import make_plan
from star_attention.runtime.leader import Leader, lead_together
from star_attention.runtime.pages import frame_count
from star_attention.runtime.phase1 import ContextPart, scratch_pages
from star_attention.runtime.worker import Worker
from thread_ranks import ThreadRanks

TINY = ModelConfig(2, 64, 48, 4, 2, 16, 61, 1024, 1e-5, RopeConfig())
WEIGHTS = random_weights(TINY, torch.float32, torch.device("cpu"))
PAGE = 4
TOKENS = np.random.default_rng(0).integers(0, 61, 203).astype(np.int32)
KV_DTYPES = ["fp8", "int8"]


def quantized(values, kv_dtype, tokens=None):
    """Codes [..., 2, Hkv, T, D] and scales after quantising pages [P, 2, Hkv, T, D]."""
    pool = values[None].clone()
    codes = ops.codes_of(pool, ops.code_dtype(kv_dtype))
    scales = torch.full(codes.shape[:4], torch.nan)
    pages = torch.arange(len(values), dtype=torch.int32)
    counts = torch.full_like(pages, values.shape[3]) if tokens is None else tokens
    ops.quantize_pages(pool, codes, scales, pages, counts)
    places = pages // 4 * 16 + pages % 4  # four in the memory of a page of float32
    return codes[0, places], scales[0, places]


def test_codes_and_scales():
    values = torch.zeros(1, 2, 1, 2, 4)
    values[0, 0, 0] = torch.tensor([[448.0, -1.0, 17.0, 19.0], [0.0, 0.3, 2**-9, 2**-11]])
    codes, scales = quantized(values, "fp8")
    assert scales[0].tolist() == [[1.0], [1.0]]  # the largest over 448; nothing but 0
    # Halfway between two codes is the even one: 16 and 18 for 17, 18 and 20 for 19.
    expected = [[448.0, -1.0, 16.0, 20.0], [0.0, 0.3125, 2**-9, 0.0]]
    assert codes[0, 0, 0].float().tolist() == expected

    values[0, 0, 0] = torch.tensor([[127.0, -0.5, 1.5, 2.5], [-126.6, 0.4, 0.6, 0.0]])
    codes, scales = quantized(values, "int8")
    assert scales[0].tolist() == [[1.0], [1.0]]
    assert codes[0, 0, 0].tolist() == [[127, 0, 2, 2], [-127, 0, 1, 0]]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_scales_of_pages_and_heads(kv_dtype):
    values = torch.randn(4, 2, 3, 8, 16)
    values *= torch.rand(4, 2, 3, 1, 1)
    values[1, 0, 2, 5, 3] = torch.nan
    values[3, :, :, 2:] = torch.nan  # behind the end
    codes, scales = quantized(values, kv_dtype, torch.tensor([8, 8, 8, 2], dtype=torch.int32))
    largest = values.abs().amax((-2, -1))
    largest[3] = values[3, :, :, :2].abs().amax((-2, -1))
    expected = largest / {"fp8": 448, "int8": 127}[kv_dtype]
    assert torch.equal(scales.isnan(), expected.isnan())
    assert torch.equal(scales.nan_to_num(0), expected.nan_to_num(0))
    assert (codes[3, :, :, 2:].float() == 0).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention_over_codes(kv_dtype):
    pool = torch.randn(8, 2, 2, 4, 16)
    codes, scales = quantized(pool, kv_dtype)
    tensors = torch.tensor([[3, 0, 6], [1, 2, 0]]), torch.tensor([0, 2, 3]), torch.tensor([11, 5])
    sizes = {"causal": True, "scale": 0.25, "max_q_len": 2, "max_kv_len": 11}
    q = torch.randn(3, 4, 16)
    o, lse = ops.paged_attention(q, codes, *tensors, **sizes, kv_scales=scales)
    values = codes.float() * scales[..., None, None]
    expected, expected_lse = ops.paged_attention(q, values, *tensors, **sizes)
    assert torch.equal(o, expected)
    assert torch.equal(lse, expected_lse)


CONFIGS = {
    "broadcast": StarConfig(32, 16, tokens_per_block=PAGE),
    "local": StarConfig(32, 32, "local", tokens_per_block=PAGE),
    "recompute": StarConfig(32, 32, "recompute", "round_robin", PAGE),
    "no anchor": StarConfig(20, 0, tokens_per_block=PAGE),
    "selected": StarConfig(32, 16, selected_pages=2, tokens_per_block=PAGE),
    "dense": StarConfig(attention="dense", tokens_per_block=PAGE),
    "ring": StarConfig(attention="ring", tokens_per_block=PAGE),
}


def logits_of(size, config, kv_dtype, budget=None):
    """Of a question and an answer, on rank 0; and pages in use meanwhile."""
    config = replace(config, kv_dtype=kv_dtype)

    def work(comm):
        engine = TorchEngine(TINY, WEIGHTS, comm, PAGE, kv_dtype=kv_dtype)
        leader, worker = lead_together(engine, comm)
        leader.scheduler.chunk_tokens = budget
        context = leader.encode(TOKENS, config)
        counted = int(leader.scheduler.pages_in_use[comm.rank])
        assert worker.pool.pages_in_use == counted
        logits = forced_logits(leader, context, TOKENS[:5], TOKENS[5:11], config.kv_placement)
        leader.release(context)
        assert worker.pool.pages_in_use == 0
        return logits, counted

    ranks = ThreadRanks(size).run(work)
    return ranks[0][0], sum(pages for _, pages in ranks)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_are_near_those_of_whole_pages(config, kv_dtype):
    whole, pages = logits_of(1, config, "auto")
    alone, fewer = logits_of(1, config, kv_dtype)
    assert 0 < np.linalg.norm(alone - whole) < 0.05 * np.linalg.norm(whole)
    assert fewer <= pages / 4 + 11  # of float32, and a page for what each block leaves
    for size, budget in ((1, 24), (2, None), (3, 24)):
        shared, _ = logits_of(size, config, kv_dtype, budget)
        np.testing.assert_allclose(shared, alone, atol=2e-3)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_keys_with_a_bias_that_hardly_turns(kv_dtype, monkeypatch):
    """As those of Qwen2: hundreds of times as large as what else there is of a key."""
    config = replace(TINY, qkv_bias=True, rope=RopeConfig(theta=1e9))
    weights = random_weights(config, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    q, kv = (heads * config.head_dim for heads in (config.num_q_heads, config.num_kv_heads))
    slow = torch.arange(kv) % (config.head_dim // 2) == config.head_dim // 2 - 1
    for layer in weights.layers:
        layer.qkv_bias[:] = 0
        layer.qkv_bias[q : q + kv] = 300 * torch.randn(kv) * slow
        layer.qkv_bias[:q] = 0.1

    def logits(kv_dtype):
        engine = TorchEngine(config, weights, SingleProcess(), PAGE, kv_dtype=kv_dtype)
        leader, _ = lead_together(engine, SingleProcess())
        context = leader.encode(TOKENS, StarConfig(32, 16, tokens_per_block=PAGE))
        return forced_logits(leader, context, TOKENS[:5], TOKENS[5:11])

    whole = logits("auto")
    lost = np.linalg.norm(logits(kv_dtype) - whole)
    assert 0 < lost < 0.05 * np.linalg.norm(whole)
    monkeypatch.setattr(engine_module, "key_centers", lambda *_: None)
    assert np.linalg.norm(logits(kv_dtype) - whole) > 3 * lost


def test_centers_of_keys():
    """Of all positions' rotated biases, the mean."""
    config = replace(TINY, qkv_bias=True, max_position=100)
    weights = random_weights(config, torch.float32, torch.device("cpu"))
    for layer in weights.layers:
        layer.qkv_bias[:] = torch.randn(len(layer.qkv_bias))
    rotary = rotary_table(config.rope, config.head_dim, 100, torch.device("cpu"))
    centers = key_centers(config, weights)
    for layer, found in zip(weights.layers, centers, strict=True):
        qkv = layer.qkv_bias.expand(100, -1).contiguous()
        pool = torch.empty(1, 2, config.num_kv_heads, 100, config.head_dim)
        places = torch.arange(100, dtype=torch.int32)
        q = torch.empty(100, config.num_q_heads, config.head_dim)
        ops.rope_append(qkv, places, rotary, pool, places, q)
        torch.testing.assert_close(found, pool[0, 0].mean(1))
    assert key_centers(replace(config, qkv_bias=False), weights) is None


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_blocks_that_are_cached_in_8_bits(kv_dtype):
    """A longer text shares blocks, whose anchor it sees."""
    engine = TorchEngine(TINY, WEIGHTS, SingleProcess(), PAGE, kv_dtype=kv_dtype)
    comm = SingleProcess()
    worker = Worker(engine, comm)

    def execute(order, on_layer=None):
        return worker.execute(order, on_layer)

    leader = Leader(execute, engine, 1, shares_blocks=True)
    config = StarConfig(32, 32, tokens_per_block=PAGE, kv_dtype=kv_dtype)
    first = leader.encode(TOKENS[:100], config)
    used = worker.pool.pages_in_use
    second = leader.encode(TOKENS, config)
    assert len(set(first.blocks) & set(second.blocks)) == 3
    assert worker.pool.pages_in_use == int(leader.scheduler.pages_in_use[0]) > used
    logits = forced_logits(leader, second, TOKENS[:5], TOKENS[5:11])
    alone, _ = logits_of(1, config, kv_dtype)
    assert np.linalg.norm(logits - alone) < 0.05 * np.linalg.norm(alone)


MODES = st.sampled_from(["recompute", "local", "broadcast"])


@settings(max_examples=80, deadline=None)
@given(
    context_len=st.integers(1, 120),
    pages=st.integers(1, 9),
    anchor_pages=st.integers(0, 9),
    num_ranks=st.integers(1, 4),
    mode=MODES,
    selected=st.sampled_from([0, 0, 2]),
    attention=st.sampled_from(["star", "star", "star", "dense", "ring"]),
    packing=st.sampled_from([2, 4]),
    most=st.one_of(st.none(), st.integers(1, 30)),
    random=st.randoms(use_true_random=False),
)
def test_pages_of_phase_1_suffice(
    context_len, pages, anchor_pages, num_ranks, mode, selected, attention, packing, most, random
):
    """And what is left is the quantised context."""
    if selected or attention == "dense":
        mode = "broadcast"
    sizes = (4 * pages, 4 * min(pages, anchor_pages)) if attention == "star" else (None, None)
    config = StarConfig(
        *sizes,
        mode,
        tokens_per_block=4,
        attention=attention,
        selected_pages=selected if attention == "star" else 0,
        kv_dtype="fp8",
    )
    plan = make_plan(context_len, config, num_ranks)
    where = [None] * len(plan.parts)
    if attention != "ring":
        where = [random.choice([None, random.randrange(num_ranks)]) for _ in plan.parts]
    if mode != "broadcast" and where:  # rank 0 has the first one
        where[0] = where[0] and 0
    plan = plan.beside(where)
    parts, given_pages, cached = [], [], {}
    for part in plan.parts:
        if part.start in plan.cached:
            cached[part.start] = [0] * -(-part.tokens // 4)
    for rank in range(num_ranks):
        new = [part for part in plan.parts_of(rank) if part.start not in plan.cached]
        count = sum(frame_count(part.tokens, 4, packing) for part in new)
        total = count + scratch_pages(plan, rank, packing)
        parts.append(ContextPart(plan, rank, [], list(range(total)), packing))
        given_pages.append((count, total))
    passes = plan.passes()
    if not passes.finished:
        for part in parts:
            part.restore(cached)
    kept = [0] * num_ranks
    while not passes.finished:
        spans = passes.next(most)
        steps = [part.take(spans) for part in parts]
        for step in steps:
            if step:
                assert (step.attention.page_table >= 0).all()
        for rank, part in enumerate(parts):
            for _, frames, tokens in part.settle():
                assert (frames >= 0).all()
                assert len(set(frames.tolist())) == len(frames)
                assert len(tokens) == len(frames)
                kept[rank] += -(-len(frames) // packing)
    for part, (count, total), found in zip(parts, given_pages, kept, strict=True):
        assert found == count
        assert len(part.held) == total - count


def test_twice_the_context_in_the_same_memory():
    """Of 16 bits, with short blocks."""
    pages = {}
    for kv_dtype, packing in (("auto", 1), ("fp8", 2)):
        config = StarConfig(4096, kv_dtype=kv_dtype)
        plan = make_plan(1 << 18, config, 1)
        kept = sum(frame_count(part.tokens, 128, packing) for part in plan.parts)
        pages[kv_dtype] = kept, kept + scratch_pages(plan, 0, packing)
    assert pages["auto"] == (2048, 2048)
    assert pages["fp8"][0] == 1024
    assert pages["fp8"][1] <= 1.07 * 1024


def test_bytes_of_pages():
    engine = TorchEngine(TINY, WEIGHTS, SingleProcess(), PAGE, kv_dtype="fp8")
    elements = 2 * 2 * PAGE * 16
    assert engine.page_bytes == 4 * elements
    assert engine.kept_page_bytes == elements + 2 * 2 * 4
    assert TINY.kept_kv_bytes(PAGE) == 2 * engine.kept_page_bytes
    assert engine.kv_packing == 4


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_copies_have_codes_and_scales(kv_dtype):
    engine = TorchEngine(TINY, WEIGHTS, SingleProcess(), PAGE, kv_dtype=kv_dtype)
    engine.reserve_pages(6)
    engine._pool.data.normal_()
    engine.quantize_pages(np.array([4, 1, 2], np.int32), np.array([4, 4, 3], np.int32))
    out = np.zeros((3, engine.kept_page_bytes), np.uint8)
    engine.read_layer(1, [16, 17, 18], out)
    engine.write_layer(1, [3, 21, 0], out)
    for mine, theirs in zip((16, 17, 18), (3, 21, 0), strict=True):
        codes, scales = engine._pool.codes.view(torch.uint8), engine._pool.scales
        assert torch.equal(codes[1, mine], codes[1, theirs])
        assert torch.equal(scales[1, mine], scales[1, theirs])


def test_refusals():
    with pytest.raises(UserError, match="kv_dtype is 'fp4': use one of auto, fp8, int8"):
        StarConfig(kv_dtype="fp4")
    with pytest.raises(UserError, match="--kv-dtype is 'fp4'"):
        EngineOptions(kv_dtype="fp4")


def test_reading_that_is_given_up():
    engine = TorchEngine(TINY, WEIGHTS, SingleProcess(), PAGE, kv_dtype="fp8")
    leader, worker = lead_together(engine, SingleProcess())
    leader.scheduler.chunk_tokens = 24
    config = StarConfig(32, 16, tokens_per_block=PAGE, kv_dtype="fp8")
    context = leader.scheduler.add_context(TOKENS, config)
    for _ in range(6):
        leader.step()
    assert not context.is_ready
    assert worker.pool.pages_in_use == int(leader.scheduler.pages_in_use[0]) > 0
    leader.release(context)
    assert worker.pool.pages_in_use == int(leader.scheduler.pages_in_use[0]) == 0
