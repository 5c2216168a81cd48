"""Models with sliding windows: Hugging Face's logits, windows whole in their layers and the
block-sparse mask in the others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    WINDOWED_MODELS,
    block_mask,
    forced_logits,
    hf_logits,
    run_oracle_job,
    save_tiny_model,
)
from star_attention import ops
from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.base import Limits
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions, check_gpu_model
from star_attention.engines.tensorrt.onnx import write_graph
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.models.weights import Checkpoint
from star_attention.plan import make_plan
from star_attention.runtime.blocks import block_keys
from star_attention.runtime.leader import Leader, lead_together
from star_attention.runtime.pages import PagePool
from star_attention.runtime.phase2 import CachedContext, CachedQuestion
from star_attention.runtime.worker import Worker
from star_attention.spans import Range
from test_ops import plain_attention, random_case

PAGE, BLOCK, QUESTION = 8, 32, 11
TOKENS = np.random.default_rng(1).integers(0, 97, 5 * BLOCK + 5 + 2 * QUESTION).astype(np.int32)
CASES = [
    {"block_size": BLOCK, "anchor_size": anchor, "tokens_per_block": PAGE, **limits}
    for anchor, limits in (
        (0, {}),
        (0, {"pass_tokens": 21}),
        (PAGE, {"pass_tokens": 3}),
        (BLOCK, {}),
        (BLOCK, {"pass_sequences": 1}),
    )
]
CASES.append({"attention": "dense", "tokens_per_block": PAGE})


def check(logits, hf_model, tokens, case):
    """Of the tokens behind the context."""
    context = len(tokens) - len(logits)
    sizes = case.get("block_size", len(tokens)), case.get("anchor_size", 0)
    mask = block_mask(len(tokens), context, *sizes)
    np.testing.assert_allclose(logits, hf_logits(hf_model, tokens, mask)[context:], atol=1e-4)


@pytest.mark.parametrize("name", WINDOWED_MODELS)
def test_one_rank(tmp_path, name):
    architecture, overrides = WINDOWED_MODELS[name]
    hf_model = save_tiny_model(tmp_path, architecture, **overrides)
    engine = load_engine(tmp_path, SingleProcess(), PAGE, EngineOptions())
    context, question, answer = np.split(TOKENS, [-2 * QUESTION, -QUESTION])
    for case in CASES:
        options = dict(case)
        names = {"pass_tokens", "pass_sequences"} & case.keys()
        limits = Limits(**{name: options.pop(name) for name in names})
        leader, _ = lead_together(engine, SingleProcess(), limits)
        encoded = leader.encode(context, StarConfig(**options))
        check(forced_logits(leader, encoded, question, answer), hf_model, TOKENS, case)
        leader.release(encoded)


@pytest.mark.parametrize(
    ("name", "processes", "tp"), [("by layer", 3, 1), ("gemma2", 2, 1), ("gemma3", 2, 2)]
)
def test_several_processes(tmp_path, name, processes, tp):
    architecture, overrides = WINDOWED_MODELS[name]
    hf_model = save_tiny_model(tmp_path / "model", architecture, vocab_size=98, **overrides)
    cases = [{**case, "kv_placement": ["tail", "round_robin"]} for case in CASES]
    job = tmp_path / "job", processes, tmp_path / "model", TOKENS, QUESTION, cases
    for (index, _), logits in run_oracle_job(*job, tp=tp).items():
        check(logits, hf_model, TOKENS, CASES[index])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    sequences=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=2),
    size=st.integers(1, 90),
    page=st.sampled_from([1, 8, 64]),
    causal=st.booleans(),
)
def test_rows_that_see_tokens_from_a_first_one_on(seed, sequences, size, page, causal):
    """Also none, where the first is behind all that a row sees."""
    num_rows, kv_lens = zip(*sequences, strict=True)
    q, pool, table, cu_seqlens, kv_lens, kvs = random_case(
        seed, num_rows, kv_lens, page, (6, 2), 16
    )
    firsts = [
        (torch.arange(rows) + len(kv) - rows - size + 1).clamp(0, len(kv))
        for rows, kv in zip(num_rows, kvs, strict=True)
    ]
    o, lse = ops.paged_attention(
        *(q, pool, table, cu_seqlens, kv_lens),
        causal=causal,
        scale=0.25,
        max_q_len=0,
        max_kv_len=0,
        starts=torch.cat(firsts).int(),
    )
    begin = 0
    for rows, kv, first in zip(num_rows, kvs, firsts, strict=True):
        own, index = slice(begin, begin + rows), torch.arange(len(kv))
        ends = torch.arange(rows)[:, None] + len(kv) - rows if causal else len(kv)
        visible = (index >= first[:, None]) & (index <= ends)
        wanted, wanted_lse = plain_attention(q[own], kv[:, 0], kv[:, 1], visible, 0.25)
        torch.testing.assert_close(o[own].double(), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse[own].double(), wanted_lse, rtol=1e-4, atol=1e-4)
        begin += rows


def test_what_a_question_sees_of_parts():
    """A rank keeps parts of the context, and pages of the answer."""

    class Engine:
        limits = Limits()
        reserve_pages = staticmethod(lambda pages: None)

    plan = make_plan(100, StarConfig(tokens_per_block=8))
    runs = Range(0, 16), Range(48, 64), Range(96, 100)
    pool = PagePool(Engine)
    question = CachedQuestion(CachedContext(plan, pool.allocate(5), runs, False), pool)
    positions = [p for run in runs for p in range(*run)]
    for count, stored in ((5, True), (3, False), (1, True), (1, True), (4, False), (1, True)):
        question.append(count, stored, 8, lambda source, target: None)
        new = range(question.position - count, question.position)
        positions += new if stored else ()
        for size in (1, 2, 7, 45, 70, 200):
            wanted = [sum(p <= row - size for p in positions) for row in new]
            assert question.window_starts(count, size).tolist() == wanted


def test_a_context_that_grows(tmp_path):
    """Blocks that are there already are seen by windows of later ones."""
    hf_model = save_tiny_model(
        tmp_path, *WINDOWED_MODELS["by layer"][:1], **WINDOWED_MODELS["by layer"][1]
    )
    engine = load_engine(tmp_path, SingleProcess(), PAGE, EngineOptions())
    worker = Worker(engine, SingleProcess())
    leader = Leader(worker.execute, engine, 1, shares_blocks=True)
    config = StarConfig(BLOCK, PAGE, tokens_per_block=PAGE)
    tokens = np.random.default_rng(2).integers(0, 97, 5 * BLOCK + 3).astype(np.int32)
    leader.release(leader.encode(tokens[: 3 * BLOCK], config))
    computed = []
    step = engine.step
    engine.step = lambda ids, *rest: (computed.append(len(ids)), step(ids, *rest))[1]
    context = leader.encode(tokens[: 5 * BLOCK], config)
    assert sum(computed) == 2 * BLOCK
    logits = forced_logits(leader, context, tokens[5 * BLOCK :], [])
    mask = block_mask(len(tokens), 5 * BLOCK, BLOCK, PAGE)
    np.testing.assert_allclose(logits, hf_logits(hf_model, tokens, mask)[5 * BLOCK :], atol=1e-4)


WINDOWED = replace(LLAMA_3_1_8B, window=4096, windowed_layers=tuple(range(0, 32, 2)))


def test_keys_of_blocks_follow_the_text():
    config = StarConfig(BLOCK, PAGE, tokens_per_block=PAGE)
    tokens = np.arange(5 * BLOCK, dtype=np.int32)
    changed = tokens.copy()
    changed[BLOCK + 3] = 0
    plan = make_plan(len(tokens), config, model=WINDOWED)
    keys, others = block_keys(tokens, plan, False), block_keys(changed, plan, False)
    assert [a == b for a, b in zip(keys, others, strict=True)] == [True, *[False] * 4]


def test_their_cost_is_in_the_plan():
    """Layers with a window cost as much for each token."""
    plain, windowed = (make_plan(1 << 17, model=model) for model in (LLAMA_3_1_8B, WINDOWED))
    pair = 4 * 32 * 128 * 16
    assert WINDOWED.attention_flops_per_pair == pair
    assert windowed.rank_costs[0].pairs == plain.rank_costs[0].pairs
    more = windowed.rank_costs[0].flops(WINDOWED) - plain.rank_costs[0].flops(LLAMA_3_1_8B)
    assert more == ((1 << 17) * 4096 - plain.rank_costs[0].pairs) * pair


def test_all_ranks_read_every_block():
    plan = make_plan(1 << 17, StarConfig(1 << 14, 1 << 12, "local"), 4, WINDOWED)
    assert plan.exchanges
    assert {block.rank for block in plan.blocks} == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "ring"}, "4096 tokens is not supported by ring attention: use --attention"),
        ({"selected_pages": 2}, "is not supported with selected pages: use --selected-pages 0"),
        ({"kv_dtype": "fp8"}, "is not supported with --kv-dtype fp8: use auto"),
    ],
)
def test_what_windows_do_not_go_with(options, message):
    with pytest.raises(UserError, match=message):
        make_plan(1000, StarConfig(**options), model=WINDOWED)


def test_engines_without_windows(tmp_path):
    gemma = replace(LLAMA_3_1_8B, has_output_norms=True)
    for model, what in ((WINDOWED, "4096 tokens"), (gemma, "Gemma")):
        checkpoint = Checkpoint(tmp_path, model, tensor=None)
        message = f"{what} is not supported by TensorRT engines: run it with --device"
        with pytest.raises(UserError, match=message):
            write_graph(checkpoint, tmp_path, tmp_path, "float16", gemm_plugin=False)
    with pytest.raises(UserError, match="Gemma is not supported on GPUs: use --device cpu"):
        check_gpu_model(gemma)
    with pytest.raises(UserError, match="Gemma is not supported with selected pages"):
        make_plan(1000, StarConfig(selected_pages=2), model=gemma)
    save_tiny_model(tmp_path, "mistral", sliding_window=20)
    with pytest.raises(UserError, match="with --kv-dtype int8: use auto"):
        load_engine(tmp_path, SingleProcess(), PAGE, EngineOptions(kv_dtype="int8"))
