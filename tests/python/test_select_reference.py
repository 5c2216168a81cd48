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


def chosen_by_loops(q, k, lse, division, size, rows, heads, count):
    """[KV head][tile] -> pages, and their scores, one number at a time."""
    group = HEADS // KV_HEADS
    lists = []
    for head in range(KV_HEADS):
        lists.append([])
        for first in range(0, division.tokens, division.tile):
            at = [min(row, len(q) - 1) for row in range(first, first + division.tile)]
            runs = [at[i : i + rows] for i in range(0, division.tile, rows)]
            own = list(range(head * group, (head + 1) * group))
            members = [own] if heads else [[one] for one in own]
            asking = [
                (q[run][:, some].mean((0, 1)), lse[run][:, some].mean())
                for some in members
                for run in runs
            ]
            block = first // division.block * division.block
            scores = {}
            for page in range(division.anchor // PAGE, block // PAGE):
                keys = k[page * PAGE : (page + 1) * PAGE, head].unflatten(0, (-1, size)).mean(1)
                scores[page] = max(float((keys @ x * SCALE).max() - y) for x, y in asking)
            best = sorted(scores, key=lambda page: (-scores[page], page))[:count]
            lists[-1].append(sorted(best))
    return lists


@pytest.mark.parametrize(
    ("tile", "size", "rows", "heads"),
    [(64, 16, 1, False), (128, 16, 4, False), (128, 8, 16, True), (128, 64, 128, True)],
)
@pytest.mark.parametrize("tokens", [1024, 1000])
def test_lists_are_those_of_plain_loops(tile, size, rows, heads, tokens):
    # Small whole numbers: sums are exact in any order, and many scores are equal.
    division = select.Division(1024, block=256, anchor=64, page=PAGE, tile=tile)
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-1, 2, (tokens, HEADS, DIM), generator=generator).float()
    k = torch.randint(-1, 2, (division.tokens, KV_HEADS, DIM), generator=generator).float()
    lse = torch.randint(0, 3, (tokens, HEADS), generator=generator).float()
    summaries = select.means(select.page_keys(k, PAGE), size)
    pages, counts = select.select_pages(
        q, summaries, lse, division, scale=SCALE, count=3, rows=rows, heads=heads
    )
    assert pages.dtype == counts.dtype == torch.int32
    found = [
        [listed[:count].tolist() for listed, count in zip(*head, strict=True)]
        for head in zip(pages, counts, strict=True)
    ]
    assert found == chosen_by_loops(q, k, lse, division, size, rows, heads, 3)


def test_a_tiles_list_is_the_same_however_many_are_scored_together(monkeypatch):
    division = select.Division(1024, block=256, anchor=64, page=PAGE, tile=64)
    q, k, _ = random_qkv(division.tokens)
    summaries = select.means(select.page_keys(k, PAGE).bfloat16(), 16)
    lse = q.norm(dim=-1)
    args = q.bfloat16(), summaries, lse, division
    together = select.select_pages(*args, scale=SCALE, count=4)
    monkeypatch.setattr(select, "_AT_ONCE", 1)
    apart = select.select_pages(*args, scale=SCALE, count=4)
    assert all(torch.equal(x, y) for x, y in zip(together, apart, strict=True))


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
    pages, counts = select.choose(scores, 8, margin=1.0)
    assert pages.tolist() == [[[0, 1, 2, 3, 0, 0, 0, 0]]]
    assert counts.tolist() == [[4]]
    assert select.chosen_mask(pages, counts, 6).tolist() == [[[True] * 4 + [False] * 2]]


def test_zeros_of_either_sign_are_equal_and_a_nan_is_chosen():
    pages, counts = select.choose(torch.tensor([[[-0.0, 0.0, -1.0]]]), 1)
    assert (pages.item(), counts.item()) == (0, 1)
    for margin in (None, 5.0):
        pages, counts = select.choose(torch.tensor([[[9.0, 8.0, torch.nan]]]), 1, margin)
        assert (pages.item(), counts.item()) == (2, 1)


@pytest.mark.parametrize("tile", [64, 128])
def test_the_largest_score_with_all_keys_is_the_largest_probability(tile):
    division = select.Division(512, block=128, anchor=64, page=PAGE, tile=tile)
    q, k, _ = random_qkv(division.tokens)
    scores = torch.einsum("ihgd,jhd->hgij", q.unflatten(1, (KV_HEADS, -1)), k) * SCALE
    past = torch.ones(division.tokens, division.tokens, dtype=torch.bool).tril()
    scores = scores.masked_fill(~past, -torch.inf)
    lse = scores.logsumexp(-1).permute(2, 0, 1).flatten(1)
    probabilities = scores.softmax(-1).unflatten(2, (-1, tile)).unflatten(4, (-1, PAGE))
    rows = [select.pool_rows(x, KV_HEADS, tile) for x in (q, lse)]
    allowed = division.candidates(q.device)
    for total, expected in (
        (False, probabilities.amax((1, 3, 5))),
        (True, probabilities.sum((1, 3, 5))),
    ):
        found = select.page_scores(
            *rows, select.page_keys(k, PAGE), division, SCALE, total=total
        ).exp()
        torch.testing.assert_close(found, expected * allowed, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("anchor", [0, 64])
def test_the_rough_lse_of_single_keys_is_that_of_anchor_and_block_with_the_whole_tile(anchor):
    division = select.Division(512, block=128, anchor=anchor, page=PAGE, tile=64)
    q, k, _ = random_qkv(division.tokens)
    rows = select.pool_rows(q, KV_HEADS, division.tile)
    found = select.rough_lse(rows, select.page_keys(k, PAGE), division, SCALE)
    i, j = torch.arange(division.tokens)[:, None], torch.arange(division.tokens)
    sees = (i // 128 == j // 128) & (j // 64 <= i // 64) | (j < anchor) & (i >= 128)
    scores = torch.einsum("ihd,jhd->ihj", q, k.repeat_interleave(HEADS // KV_HEADS, 1)) * SCALE
    exact = scores.masked_fill(~sees[:, None], -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found, select.pool_rows(exact, KV_HEADS, division.tile))
