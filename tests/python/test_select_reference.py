"""Selected pages: lists against plain loops, attention against dense attention under a mask."""

import pytest
import torch
from torch.nn import functional as F

from star_attention import ops
from star_attention.ops import select_reference as select

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 64
SCALE = DIM**-0.5


def random_qkv(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(tokens, heads, DIM, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def attend(q, k, v, division, lists):
    """Over the lists, through pages."""
    pool = torch.stack((select.page_keys(k, PAGE), select.page_keys(v, PAGE)), dim=2)
    rows = q.unflatten(1, (KV_HEADS, -1)).transpose(0, 1).flatten(0, 1)
    table, kv_lens = select.tile_tables(division, *lists)
    o, lse = ops.paged_attention(
        rows.contiguous(),
        pool.flatten(0, 1).unsqueeze(2),
        table,
        torch.arange(len(table) + 1, dtype=torch.int32) * division.tile,
        kv_lens,
        causal=True,
        scale=SCALE,
        max_q_len=division.tile,
        max_kv_len=table.shape[1] * PAGE,
    )
    o, lse = (x.unflatten(0, (KV_HEADS, -1)).transpose(0, 1) for x in (o, lse))
    return o.reshape(q.shape), lse.reshape(q.shape[:2])


def seen(division: select.Division, mask: torch.Tensor) -> torch.Tensor:
    """bool [Hkv, T, T]: what a row sees with the chosen pages [Hkv, tiles, pages]."""
    i, j = torch.arange(division.tokens)[:, None], torch.arange(division.tokens)
    star = (i // division.block == j // division.block) | (j < division.anchor)
    chosen = mask[:, i // division.tile, j // division.page]
    return (j <= i) & (star | chosen)


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_attention_over_chosen_pages_is_dense_attention_under_their_mask(tile):
    division = select.Division(1024, block=256, anchor=64, page=PAGE, tile=tile)
    q, k, v = random_qkv(division.tokens)
    scores = torch.rand(KV_HEADS, division.tiles, division.pages)
    scores.masked_fill_(~division.candidates(q.device), -torch.inf)
    lists = select.choose(scores, 3)
    mask = seen(division, select.chosen_mask(*lists, division.pages))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        mask.repeat_interleave(HEADS // KV_HEADS, 0)[None],
        scale=SCALE,
        enable_gqa=True,
    )
    o, _ = attend(q, k, v, division, lists)
    torch.testing.assert_close(o, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_lists_ascend_and_equal_scores_go_to_the_lower_page():
    scores = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 0.0, -torch.inf]]])
    pages, counts = select.choose(scores, 2)
    assert pages.tolist() == [[[1, 2]]]
    assert counts.tolist() == [[2]]
    pages, counts = select.choose(scores, 6, margin=1.0)
    assert pages.tolist() == [[[0, 1, 2, 3, 0, 0]]]
    assert counts.tolist() == [[4]]
    assert select.chosen_mask(pages, counts, 6).tolist() == [[[True] * 4 + [False] * 2]]


@pytest.mark.parametrize("tile", [64, 128])
def test_the_largest_score_with_all_keys_is_the_largest_probability(tile):
    division = select.Division(512, block=128, anchor=64, page=PAGE, tile=tile)
    q, k, _ = random_qkv(division.tokens)
    scores = torch.einsum("ihgd,jhd->hgij", q.unflatten(1, (KV_HEADS, -1)), k) * SCALE
    past = torch.ones(division.tokens, division.tokens, dtype=torch.bool).tril()
    scores = scores.masked_fill(~past, -torch.inf)
    lse = scores.logsumexp(-1).permute(2, 0, 1).flatten(1)
    probabilities = scores.softmax(-1).unflatten(2, (-1, tile)).unflatten(4, (-1, PAGE))
    rows = select.pool_rows(q, lse, KV_HEADS, tile)
    keys = select.all_keys(select.page_keys(k, PAGE))
    allowed = division.candidates(q.device)
    for total, expected in (
        (False, probabilities.amax((1, 3, 5))),
        (True, probabilities.sum((1, 3, 5))),
    ):
        found = select.page_scores(*rows, keys, division, SCALE, total=total).exp()
        torch.testing.assert_close(found, expected * allowed, atol=1e-6, rtol=1e-4)


def test_bounds_are_above_and_exact_for_single_keys():
    q, k, _ = random_qkv(128)
    keys = select.page_keys(k, PAGE)
    rows = q.unflatten(1, (KV_HEADS, -1)).transpose(0, 1).flatten(1, 2)
    exact = select.all_keys(keys).logits(rows, 2)
    torch.testing.assert_close(select.Bounds(keys, 1).logits(rows, 2), exact)
    bounds = select.Bounds(keys, 16).logits(rows, 2)
    assert (bounds >= exact.unflatten(3, (-1, 16)).amax(-1) - 1e-4).all()


def test_a_sketch_of_all_dimensions_is_exact():
    q, k, _ = random_qkv(512)
    keys = select.page_keys(k, PAGE)
    rows = q.unflatten(1, (KV_HEADS, -1)).transpose(0, 1).flatten(1, 2)
    sketch = select.Sketch(keys, *select.sketch_maps(q, k, DIM))
    exact = select.all_keys(keys).logits(rows, 8)
    torch.testing.assert_close(sketch.logits(rows, 8), exact, atol=1e-2, rtol=1e-2)


def test_representatives_are_keys_and_differ():
    _, k, _ = random_qkv(PAGE)
    keys = select.page_keys(k, PAGE)
    taken = select.representatives(keys, 8).vectors
    distances = torch.cdist(taken, keys)
    assert (distances.amin(-1) < 0.02).all()
    assert torch.equal(
        distances.argmin(-1).sort(-1).values.diff(dim=-1) > 0, torch.ones(2, 1, 7) > 0
    )
