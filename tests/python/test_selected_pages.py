"""Selected pages: logits of Hugging Face under the masks that the engine reports having used."""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from helpers import block_mask, forced_logits, save_tiny_model
from star_attention.config import StarConfig
from star_attention.distributed import default_communicator
from star_attention.engines.base import Limits
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.engines.torch import selection
from star_attention.engines.torch.engine import TorchEngine
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model
from star_attention.ops import select_reference as select
from star_attention.plan import make_plan
from star_attention.runtime.blocks import block_keys
from star_attention.runtime.leader import lead_together
from star_attention.runtime.room import Room

PAGE, BLOCK, ANCHOR = 8, 32, 8
CONTEXT, QUESTION = 5 * BLOCK + 5, 6
TOKENS = np.random.default_rng(1).integers(0, 97, CONTEXT + 2 * QUESTION).astype(np.int32)


class Chosen:
    """What tiles chose, by layer, KV head and the context's page of rows."""

    def __init__(self, monkeypatch):
        self.lists = {}
        original, step = selection.choose_pages, TorchEngine.step

        def choose_pages(q, pool, tiles, lse, scale):
            lists, counts = original(q, pool, tiles, lse, scale)
            starts = tiles.cu_seqlens[:-1].tolist()
            for tile, row in enumerate(starts):
                for head in range(len(lists)):
                    key = self._layer, head, int(self._positions[row]) // PAGE
                    assert key not in self.lists
                    chosen = lists[head, tile, : counts[head, tile]].tolist()
                    if chosen:
                        self.lists[key] = [ANCHOR // PAGE + page for page in chosen]
            self._layer += 1
            return lists, counts

        def noting(engine, token_ids, positions, *arguments, **options):
            self._layer, self._positions = 0, positions
            return step(engine, token_ids, positions, *arguments, **options)

        monkeypatch.setattr(selection, "choose_pages", choose_pages)
        monkeypatch.setattr(TorchEngine, "step", noting)

    def masks(self, layers, kv_heads):
        """bool [layers, Hkv, tokens, tokens]."""
        base = block_mask(len(TOKENS), CONTEXT, BLOCK, ANCHOR)
        masks = np.broadcast_to(base, (layers, kv_heads, *base.shape)).copy()
        for (layer, head, tile), pages in self.lists.items():
            rows = slice(tile * PAGE, min(tile * PAGE + PAGE, CONTEXT))
            for page in pages:
                masks[layer, head, rows, page * PAGE : (page + 1) * PAGE] = True
        return masks


def logits_of(folder, config, pass_tokens=None):
    comm = default_communicator()
    options = EngineOptions("cpu", "float32")
    engine = load_engine(find_model(str(folder)), comm, PAGE, options)
    engine.limits = Limits(pass_tokens=pass_tokens)
    leader, _ = lead_together(engine, comm)
    ids, question, answer = np.split(TOKENS, [CONTEXT, CONTEXT + QUESTION])
    return forced_logits(leader, leader.encode(ids, config), question, answer), engine.config


def hf_logits(model, masks):
    """Under a mask for each layer and KV head."""

    def attention(module, query, key, value, attention_mask, scaling, **_):
        group = query.shape[1] // key.shape[1]
        mask = torch.from_numpy(masks[module.layer_idx]).repeat_interleave(group, 0)
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("listed", attention)
    model.set_attn_implementation("listed")
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(TOKENS).long()[None]).logits[0, CONTEXT:].numpy()


@pytest.mark.parametrize("count", [1, 3])
def test_logits_under_the_masks_that_were_used(tmp_path, monkeypatch, count):
    """And they are the same, lists too, however phase 1 is cut."""
    hf_model = save_tiny_model(tmp_path, initializer_range=0.3)
    config = StarConfig(BLOCK, ANCHOR, tokens_per_block=PAGE, selected_pages=count)
    plain = StarConfig(BLOCK, ANCHOR, tokens_per_block=PAGE)
    expected = lists = None
    for pass_tokens in (None, 1, 3 * PAGE + 3, BLOCK + PAGE):
        with monkeypatch.context() as patch:
            chosen = Chosen(patch)
            logits, model = logits_of(tmp_path, config, pass_tokens)
        if expected is None:
            lists = chosen.lists
            layers, heads = model.num_layers, model.num_kv_heads
            # The last layer's context rows attend to nothing: nobody looks at them.
            assert len(lists) == (layers - 1) * heads * -(-(CONTEXT - BLOCK) // PAGE)
            for (_, _, tile), pages in lists.items():
                candidates = range(ANCHOR // PAGE, tile * PAGE // BLOCK * BLOCK // PAGE)
                assert len(pages) == min(count, len(candidates))
                assert sorted(set(pages)) == pages
                assert set(pages) <= set(candidates)
            assert len({str(lists[key]) for key in lists if key[2] == CONTEXT // PAGE}) > 1
            expected = hf_logits(hf_model, chosen.masks(layers, heads))
        assert chosen.lists == lists
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(logits_of(tmp_path, plain)[0] - expected).max() > 1e-2


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
    keys = select.page_keys(pool[:, 0].transpose(1, 2).flatten(0, 1), page)
    lists, counts = select.select_pages(
        q, select.means(keys, 16), lse, division, scale=0.25, count=count, rows=4, heads=True
    )
    plan = make_plan(length, StarConfig(block, anchor, tokens_per_block=page, selected_pages=count))
    before = [plan.candidate_pages(each) for each in plan.blocks]
    tiles = selection.Tiles.on(
        torch.device("cpu"),
        selection.Selection(
            count,
            np.arange(anchor // page, 8, dtype=np.int32),
            np.array([each.stop - each.start for each in before], np.int32),
        ),
        np.arange(0, length + 1, block, dtype=np.int32),
        page,
    )
    ours, our_counts = selection.choose_pages(q, pool, tiles, lse, 0.25)
    assert torch.equal(our_counts, counts)
    assert our_counts.max() == count
    holds = torch.arange(count) < counts[..., None]
    assert torch.equal((ours + anchor // page) * holds, lists * holds)


def test_keys_of_blocks_follow_the_text():
    """A block's KV depends on all that it may have chosen from."""
    config = StarConfig(BLOCK, ANCHOR, tokens_per_block=PAGE, selected_pages=2)
    plan = make_plan(len(TOKENS), config)
    changed = TOKENS.copy()
    changed[BLOCK + 3] += 1
    same = [
        a == b for a, b in zip(block_keys(TOKENS, plan), block_keys(changed, plan), strict=True)
    ]
    starts = [part.start for part in plan.parts]
    assert same == [start < BLOCK for start in starts]
    other = make_plan(len(TOKENS), StarConfig(BLOCK, ANCHOR, tokens_per_block=PAGE))
    assert not set(block_keys(TOKENS, plan)) & set(block_keys(TOKENS, other))


def test_what_is_refused():
    with pytest.raises(UserError, match="selected_pages is -1: use 0 to 1024"):
        StarConfig(selected_pages=-1)
    with pytest.raises(UserError, match="recompute is the paper's formulation"):
        StarConfig(selected_pages=1, anchor_mode="recompute")
    model = make_plan(1).model
    for ranks, has_selection in ((2, True), (1, False)):
        room = Room(model, Limits(), ranks, 128, True, True, has_selection)
        with pytest.raises(UserError, match="--selected-pages needs one rank and --device cpu"):
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
