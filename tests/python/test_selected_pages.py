"""Selected pages: logits of Hugging Face under the masks that the engine reports having used."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from helpers import HERE, block_mask, run_job, save_tiny_model
from star_attention import ops
from star_attention.config import StarConfig
from star_attention.engines.base import Limits
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.ops import select_reference as select
from star_attention.plan import make_plan
from star_attention.predict import Rates, predict
from star_attention.runtime.blocks import block_keys
from star_attention.runtime.room import Room

JOB = HERE / "selected_job.py"
PAGE, BLOCK, ANCHOR = 8, 32, 8
CONTEXT, QUESTION = 5 * BLOCK + 5, 6
SIZES = {"block_size": BLOCK, "anchor_size": ANCHOR, "tokens_per_block": PAGE}
TOKENS = np.random.default_rng(1).integers(0, 97, CONTEXT + 2 * QUESTION).astype(np.int32)


def hf_logits(model, tokens, masks, context):
    """Of the tokens behind the context, under a mask for each layer and KV head."""

    def attention(module, query, key, value, attention_mask, scaling, **_):
        group = query.shape[1] // key.shape[1]
        mask = torch.from_numpy(masks[module.layer_idx]).repeat_interleave(group, 0)
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("listed", attention)
    model.set_attn_implementation("listed")
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens).long()[None]).logits[0, context:].numpy()


def masks_of(lists, model, tokens, context, sizes):
    """bool [layers, Hkv, tokens, tokens]."""
    page = sizes["tokens_per_block"]
    base = block_mask(len(tokens), context, sizes["block_size"], sizes["anchor_size"])
    masks = np.broadcast_to(base, (model.num_layers, model.num_kv_heads, *base.shape)).copy()
    for (layer, head, tile), pages in lists.items():
        rows = slice(tile * page, min(tile * page + page, context))
        for listed in pages:
            masks[layer, head, rows, listed * page : (listed + 1) * page] = True
    return masks


def read_selected(folder, num_ranks, tokens, context, sizes, count, *peers, **model_options):
    """The Hugging Face model, our config of it, and `selected_job.py`'s results."""
    hf_model = save_tiny_model(folder / "model", initializer_range=0.3, **model_options)
    path, output = folder / "tokens.npy", folder / "results.pickle"
    np.save(path, tokens)
    config = json.dumps({**sizes, "selected_pages": count})
    run_job(num_ranks, JOB, folder / "model", path, context, config, output, *peers)
    return hf_model, *pickle.loads(output.read_bytes())


def check_lists(lists, model, context, sizes, count):
    page, block = sizes["tokens_per_block"], sizes["block_size"]
    # The last layer's context rows attend to nothing: nobody looks at them.
    tiles = (model.num_layers - 1) * model.num_kv_heads * -(-(context - block) // page)
    assert len(lists) == tiles
    for (_, _, tile), pages in lists.items():
        candidates = range(sizes["anchor_size"] // page, tile * page // block * block // page)
        assert len(pages) == min(count, len(candidates))
        assert sorted(set(pages)) == pages
        assert set(pages) <= set(candidates)
    assert len({str(lists[key]) for key in lists if key[2] == context // page}) > 1


@pytest.mark.parametrize(("num_ranks", "count"), [(1, 3), (2, 1), (3, 2)])
def test_logits_under_the_masks_that_were_used(tmp_path, num_ranks, count):
    """And they are the same, lists too, however phase 1 is cut, on all ranks."""
    case = TOKENS, CONTEXT, SIZES
    hf_model, model, results = read_selected(tmp_path, num_ranks, *case, count)
    lists = results[None][1]
    check_lists(lists, model, CONTEXT, SIZES, count)
    expected = hf_logits(hf_model, TOKENS, masks_of(lists, model, *case), CONTEXT)
    for logits, others in results.values():
        assert others == lists
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    plain = hf_logits(hf_model, TOKENS, masks_of({}, model, *case), CONTEXT)
    assert np.abs(plain - expected).max() > 1e-2


def test_lists_are_those_of_the_reference(monkeypatch):
    """On whole numbers, where sums are exact, over two blocks in one pass."""
    generator = torch.Generator().manual_seed(3)

    def whole(*shape):
        return torch.randint(-4, 5, shape, generator=generator).float() * 16

    page, block, anchor, kv_heads, group, dim, count = 32, 64, 32, 2, 3, 16, 2
    length = 4 * block
    q, pool = whole(length, kv_heads * group, dim), whole(8, 2, kv_heads, page, dim)
    lse = whole(length, kv_heads * group)
    division = select.Division(length, block, anchor, page, page)
    means = select.means(select.page_keys(pool[:, 0].transpose(1, 2).flatten(0, 1), page), 16)
    lists, counts = select.select_pages(
        q, means, lse, division, scale=0.25, count=count, rows=4, heads=True
    )
    plan = make_plan(length, StarConfig(block, anchor, tokens_per_block=page, selected_pages=count))
    candidates = torch.tensor([plan.candidates(each) for each in plan.blocks], dtype=torch.int32)
    found, found_counts = ops.select_pages(
        q,
        lse,
        torch.arange(0, length + 1, page, dtype=torch.int32),
        candidates.repeat_interleave(block // page),
        means.transpose(0, 1)[anchor // page :],
        count=count,
        page=page,
        scale=0.25,
    )
    assert torch.equal(found_counts.t(), counts)
    assert found_counts.max() == count
    holds = torch.arange(count) < counts[..., None]
    assert torch.equal((found.transpose(0, 1) + anchor // page) * holds, lists * holds)


def test_keys_of_blocks_follow_the_text():
    """A block's KV depends on all that it may have chosen from."""
    config = StarConfig(BLOCK, ANCHOR, tokens_per_block=PAGE, selected_pages=2)
    plan = make_plan(len(TOKENS), config)
    changed = TOKENS.copy()
    changed[BLOCK + 3] += 1
    keys, others = block_keys(TOKENS, plan, False), block_keys(changed, plan, False)
    same = [a == b for a, b in zip(keys, others, strict=True)]
    assert same == [part.start < BLOCK for part in plan.parts]
    other = make_plan(len(TOKENS), StarConfig(BLOCK, ANCHOR, tokens_per_block=PAGE))
    assert not set(block_keys(TOKENS, plan, False)) & set(block_keys(TOKENS, other, False))


def test_what_is_refused():
    with pytest.raises(UserError, match="selected_pages is -1: use 0 to 256"):
        StarConfig(selected_pages=-1)
    with pytest.raises(UserError, match="with the anchor mode broadcast, not recompute"):
        StarConfig(selected_pages=1, anchor_mode="recompute")
    room = Room(make_plan(1).model, Limits(), 1, 128, True, True, has_selection=False)
    with pytest.raises(UserError, match="--selected-pages needs pages of 128 tokens on GPUs"):
        room.plan(1000, StarConfig(selected_pages=1))


def test_their_cost_is_in_the_plan():
    sizes = 8192, 512
    plain, chosen = (
        make_plan(1 << 17, StarConfig(*sizes, selected_pages=count)) for count in (0, 16)
    )
    more = chosen.rank_costs[0].pairs - plain.rank_costs[0].pairs
    # All blocks behind the first have 16 pages or more to choose from.
    assert more == ((1 << 17) - 8192) * 16 * 128
    assert chosen.rank_costs[0].tokens == 1 << 17


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_their_cost_is_in_predictions(num_ranks):
    """The attention to them, which all ranks share."""
    length, block = 1 << 17, 8192
    plain, chosen = (
        predict(make_plan(length, StarConfig(block, 512, selected_pages=count), num_ranks))
        for count in (1, 16)
    )
    pairs = (length - block) * 15 * 128 / num_ranks
    seconds = pairs * LLAMA_3_1_8B.attention_flops_per_pair / Rates().attention_tflops / 1e12
    assert chosen.seconds - plain.seconds == pytest.approx(seconds, rel=0.01)
