"""Star Attention in TensorRT-LLM's PyTorch backend without TensorRT-LLM: the models over a stand-in
that computes, on threads as ranks, give Hugging Face's logits under the block-sparse mask; the code
uses no names of TensorRT-LLM but those that are listed. Where it is installed, it has them."""

import ast
import importlib
import importlib.util
import inspect
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import fake_trtllm_pytorch as fake
from helpers import block_mask, hf_logits, save_tiny_model
from star_attention.config import StarConfig
from star_attention.errors import UserError
from star_attention.trtllm.pytorch.names import MEMBERS, METHODS, NAMES
from star_attention.trtllm.pytorch.settings import Settings
from star_attention.trtllm.pytorch.shards import Shards, shared_pool
from star_attention.trtllm.pytorch.step import Scheduled, rank_step
from test_trtllm_names import attributes, check_signature, imported
from thread_ranks import ThreadRanks

FOLDER = Path(__file__).parents[2] / "python/star_attention/trtllm/pytorch"
FILES = [FOLDER / "attention.py", FOLDER / "model.py"]
HAS_TENSORRT_LLM = importlib.util.find_spec("tensorrt_llm") is not None
PAGE = 8


@pytest.fixture
def star(monkeypatch):
    """The module with the models."""
    fake.install(monkeypatch)
    for path in FILES:
        monkeypatch.delitem(sys.modules, f"star_attention.trtllm.pytorch.{path.stem}", False)
    yield importlib.import_module("star_attention.trtllm.pytorch.model")
    for path in FILES:
        sys.modules.pop(f"star_attention.trtllm.pytorch.{path.stem}", None)


class Job:
    """An engine on each rank."""

    def __init__(self, star, monkeypatch, hf_model, ranks, blocks, page=PAGE, **settings):
        for name, size in settings.items():
            monkeypatch.setenv(f"TRTLLM_STAR_{name.upper()}", str(size))
        self.ranks = ThreadRanks(ranks)
        comms = self.ranks.comms
        monkeypatch.setattr(star, "connect", lambda mapping: comms[mapping.tp_rank])
        name = hf_model.config.architectures[0]
        cls = fake.MODEL_CLASS_MAPPING[name]
        assert cls.__name__ == f"Star{name}"
        num_blocks = 1 + max(max(numbers) for numbers in blocks.values())
        self.engines = [
            fake.Engine(
                cls, hf_model, fake.Mapping(ranks, rank, tp_size=ranks), page * ranks, num_blocks,
                blocks,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def step(self, prompts, generated, **metadata):
        """Logits, the same bits on all ranks."""
        logits = self.ranks.run(
            lambda comm: self.engines[comm.rank].step(prompts, generated, **metadata)
        )
        assert all(torch.equal(logits[0], each) for each in logits[1:])
        return logits[0].numpy()


def model_of(tmp_path, architecture="llama", **options):
    model = save_tiny_model(tmp_path / architecture, architecture, **options)
    model.config.architectures = [type(model).__name__]
    return model


def blocks_of(lengths, tokens_per_block):
    """Block numbers for each request, none in order."""
    counts = {request: -(-length // tokens_per_block) for request, length in lengths.items()}
    numbers = list(np.random.default_rng(0).permutation(sum(counts.values())))
    return {
        request: [int(numbers.pop()) for _ in range(count)] for request, count in counts.items()
    }


@pytest.mark.parametrize(
    ("ranks", "architecture", "block", "anchor"),
    [(1, "llama", 16, 16), (2, "llama", 16, 8), (2, "qwen2", 24, 24), (4, "qwen3", 16, 0)],
)
def test_model_is_the_oracle(star, monkeypatch, tmp_path, ranks, architecture, block, anchor):
    """Two prompts in one batch, then both generate while a third is read."""
    model = model_of(tmp_path, architecture, num_key_value_heads=max(2, ranks))
    random = np.random.default_rng(ranks)
    lengths = {7: 101, 3: 59, 5: 20}  # the last has less than a query
    query, answer = 21, 20
    tokens = {each: random.integers(0, 97, n + answer) for each, n in lengths.items()}
    totals = {each: n + answer for each, n in lengths.items()}
    job = Job(
        star, monkeypatch, model, ranks, blocks_of(totals, PAGE * ranks), block_size=block,
        anchor_size=anchor, query_size=query,
    )  # fmt: skip
    expected = {}
    for each, n in lengths.items():
        context_len = max(n - query, 0)
        mask = block_mask(n + answer, context_len, block, anchor)
        expected[each] = hf_logits(model, tokens[each], mask)
    ends = dict(lengths)

    def check(prompts, generated):
        logits = job.step(
            {each: tokens[each][: lengths[each]] for each in prompts},
            {each: tokens[each][ends[each]] for each in generated},
        )
        for each in generated:
            ends[each] += 1
        for row, each in zip(logits, [*prompts, *generated], strict=True):
            assert np.abs(row - expected[each][ends[each] - 1]).max() <= 1e-4, each

    check([7, 3], [])
    check([], [7, 3])
    check([5], [3, 7])
    for _ in range(answer - 2):
        check([], [7, 5, 3])


@pytest.mark.parametrize("cached", [16, 40, 80])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_prompts_that_begin_alike_share_blocks(star, monkeypatch, tmp_path, ranks, cached):
    """The second prompt is read from its first token on that is not cached. Where it goes on as
    context, its blocks see the anchor, and themselves, as if all was computed now."""
    model = model_of(tmp_path, num_key_value_heads=max(2, ranks), num_hidden_layers=2)
    random = np.random.default_rng(cached)
    block, anchor, query, page = 24, 16, 30, 4
    first, total = random.integers(0, 97, 90), 113
    second = np.concatenate([first[:cached], random.integers(0, 97, total - cached)])
    number = -(-total // (page * ranks))
    shared = cached // (page * ranks)
    cached = shared * page * ranks
    blocks = {0: list(range(number)), 1: [*range(shared), *range(number, 2 * number - shared)]}
    settings = {"block_size": block, "anchor_size": anchor, "query_size": query}
    job = Job(star, monkeypatch, model, ranks, blocks, page=page, **settings)
    job.step({0: first}, {}, **features(cache_reuse=True))
    for engine in job.engines:
        engine.lengths[1] = cached
    second[:cached] = first[:cached]
    logits = job.step({1: second[cached:]}, {0: 5}, **features(cache_reuse=True))
    mask = block_mask(total, total - query, block, anchor)
    mask[90 - query : cached] = np.tri(total, dtype=bool)[90 - query : cached]  # once a query
    assert np.abs(logits[0] - hf_logits(model, second, mask)[-1]).max() <= 1e-4
    again = job.step({}, {1: 7})
    mask = np.pad(mask, (0, 1))
    mask[-1] = True
    assert np.abs(again[0] - hf_logits(model, np.append(second, 7), mask)[-1]).max() <= 1e-4


def test_ranks_keep_equally_much(star, monkeypatch, tmp_path):
    """Nothing is kept twice: all ranks together have each token of each layer once, and what
    TensorRT-LLM gave one of them is as large as what it keeps."""
    model = model_of(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 97, 96)
    blocks = blocks_of({0: 96}, 2 * PAGE)
    job = Job(star, monkeypatch, model, 2, blocks, block_size=16, query_size=10)
    job.step({0: tokens}, {})
    for engine in job.engines:
        assert engine.manager.primary.isfinite().all()


def test_block_size_is_the_context_over_ranks_by_default(star, monkeypatch, tmp_path):
    model = model_of(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 97, 74)
    job = Job(star, monkeypatch, model, 2, blocks_of({0: 74}, 2 * PAGE), query_size=10)
    expected = hf_logits(model, tokens, block_mask(74, 64, 16, 16))  # four blocks
    assert np.abs(job.step({0: tokens}, {})[0] - expected[-1]).max() <= 1e-4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("context_len", [0, 1, 16, 17, 40, 47, 64, 129])
def test_each_token_is_kept_once(ranks, context_len):
    """Who computes it and who keeps it, by the arrays alone."""
    new, page, shards = context_len + 5, 8, Shards(8, ranks)
    count = -(-new // (page * ranks))
    pages = np.random.default_rng(0).permutation(count)
    config = StarConfig(16, 8, anchor_mode="local", tokens_per_block=page)
    batch = [Scheduled(0, new, pages, True)]
    steps = [rank_step(batch, config, 5, shards, rank) for rank in range(ranks)]
    pools = [{} for _ in steps]
    for rank, (step, pool) in enumerate(zip(steps, pools, strict=True)):
        token_in = dict(zip(step.scratch_slots.tolist(), step.rows.tolist(), strict=True))
        assert len(token_in) == len(step.rows) == sum(step.rows_per_sequence)
        assert len({*step.rows.tolist()}) == len(step.rows)  # the anchor is computed once
        assert step.rows[step.tail_rows].tolist() == list(range(context_len, new))
        tokens = map(token_in.get, step.keep.here[0].tolist())
        pool.update(zip(step.keep.here[1].tolist(), tokens, strict=True))
        for slots, to in step.keep.sends:
            arrives = {source: slots for slots, source in steps[to].keep.receives}[rank]
            pools[to].update(zip(arrives.tolist(), map(token_in.get, slots.tolist()), strict=True))
    for rank, pool in enumerate(pools):
        positions = np.arange(new)
        mine = positions[shards.keepers(positions) == rank]
        assert len(mine) == shards.kept(new, rank)
        assert pool == dict(zip(shards.slots(mine, pages).tolist(), mine.tolist(), strict=True))


def test_shared_pool_is_the_same_memory():
    buffers = torch.zeros(5, 3, 2, 16, 2, 4)[:, 1]  # 5 pages of 3 layers, 16 tokens, 2 of 4 heads
    pool, between = shared_pool(buffers, 4, 8, 4)
    assert between == 3
    assert pool.shape == (13, 2, 4, 8, 4)
    assert pool.is_contiguous()
    pool[2 * between] = 1
    assert (buffers[2] == 1).all()
    assert buffers.sum() == buffers[2].numel()
    with pytest.raises(UserError, match="use_kv_cache_manager_v2 to false"):
        shared_pool(buffers, 2, 8, 4)


def features(**given):
    return {"runtime_features": fake.AttentionRuntimeFeatures(**given)}


REFUSED = {
    "parts": (features(chunked_prefill=True), "enable_chunked_prefill is set: set it to false"),
    "reuse": (features(cache_reuse=True), "set it to false, or the block size, TRTLLM_STAR_BLOCK"),
    "beams": ({"max_num_sequences": 16}, "max_beam_width is set: set it to 1"),
    "pages": ({"kv_cache_params": fake.KVCacheParams(True, [12])}, "enable_partial_reuse to false"),
    "graphs": ({"is_cuda_graph": True}, "cuda_graph_config is set: set it to null"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_passes(star, monkeypatch, tmp_path, case):
    options, message = REFUSED[case]
    job = Job(star, monkeypatch, model_of(tmp_path), 1, {0: [0, 1, 2, 3]}, query_size=4)
    with pytest.raises(UserError, match=message):
        job.step({0: [1, 2, 3, 4, 5, 6]}, {}, **options)


def test_refused_models(star, monkeypatch, tmp_path):
    hf_model = model_of(tmp_path)
    cls = fake.MODEL_CLASS_MAPPING["LlamaForCausalLM"]
    with pytest.raises(UserError, match="pipeline_parallel_size is 2: leave it away"):
        fake.Engine(cls, hf_model, fake.Mapping(2, 0, pp_size=2), 8, 1, {})
    with pytest.raises(UserError, match="tokens_per_block is 32: use 384, 128 tokens for each of"):
        Shards.of(32, 3)
    job = Job(star, monkeypatch, hf_model, 1, {0: [0]}, block_size=12)
    with pytest.raises(UserError, match="the block size 12 is not a multiple of the page"):
        job.step({0: [1, 2]}, {})


def test_refused_options(star):
    from star_attention.trtllm.pytorch.attention import StarAttention

    attention = StarAttention(0, 4, 16, 2)
    q, metadata = torch.zeros(1, 128), None
    with pytest.raises(UserError, match="attention_window_size is given"):
        attention.forward(q, None, None, metadata, attention_window_size=4)
    args = fake.AttentionForwardArgs(attention_mask=fake.PredefinedAttentionMask.FULL)
    with pytest.raises(UserError, match="Star Attention is causal"):
        attention.forward(q, None, None, metadata, args)


def test_settings(monkeypatch):
    assert Settings.from_environment() == Settings(None, None, 1024)
    monkeypatch.setenv("TRTLLM_STAR_BLOCK_SIZE", "16K")
    with pytest.raises(UserError, match="TRTLLM_STAR_BLOCK_SIZE is '16K': use a number of tokens"):
        Settings.from_environment()


def test_imports_are_listed():
    used = {pair for path in FILES for pair in imported(ast.parse(path.read_text()))}
    assert used == {(module, name) for module, names in NAMES.items() for name in names}


def resolved(owner):
    module, _, name = owner.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_callable(value, signature, name):
    """A class by its `__init__`, since its metaclass may hide the arguments."""
    if isinstance(value, type):
        value, signature = value.__init__, signature.replace("(", "(self, ")
    check_signature(value, signature.replace(", )", ")"), name)


def check_names():
    """The listed names are there, callable as they are called."""
    for module, names in NAMES.items():
        for name, signature in names.items():
            value = resolved(f"{module}.{name}")
            if signature:
                check_callable(value, signature, f"{module}.{name}")
    for owner, methods in METHODS.items():
        for method, signature in methods.items():
            arguments = signature.replace("(", "(self, ")
            check_signature(getattr(resolved(owner), method), arguments, f"{owner}.{method}")


def test_stand_in_has_the_listed_signatures(monkeypatch):
    fake.install(monkeypatch)
    check_names()


@pytest.mark.skipif(not HAS_TENSORRT_LLM, reason="TensorRT-LLM is not installed")
def test_tensorrt_llm_has_the_listed_signatures():
    check_names()
    for owner, members in MEMBERS.items():
        cls = resolved(owner)
        fields = set(getattr(cls, "__dataclass_fields__", ())) | set(dir(cls))
        fields |= {name for each in cls.__mro__ for name in names_set_in(each)}
        assert set(members) <= fields, owner


def names_set_in(cls):
    """Attributes that a class's methods set on `self`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return set()
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


# Attributes of torch's, MPI's and our own objects.
OURS = {
    *(
        "add",
        "append",
        "close",
        "contiguous",
        "device",
        "dtype",
        "flatten",
        "get",
        "is_cuda",
        "modules",
    ),
    *("new_empty", "shape", "size", "tolist", "Dup", "rank", "exchange", "merge", "wait"),
    *("block_size", "cached", "context", "context_rows", "fetch", "keep"),
    *("merged", "offsets", "on_pages", "pages", "receives", "sends"),
    *("rows_per_sequence", "scratch_pages", "scratch_slots", "tail", "tail_rows"),
}


def test_attributes_are_listed():
    """No others are taken of TensorRT-LLM's objects; those that are listed are."""
    trees = [ast.parse(path.read_text()) for path in FILES]
    taken, own = (set().union(*names) for names in zip(*map(attributes, trees), strict=True))
    methods = {name for names in METHODS.values() for name in names}
    members = {name for names in MEMBERS.values() for name in names}
    assert taken - own - methods - members == OURS
    texts = {
        node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)
    }
    assert members <= taken | own | texts
