"""The CPU operators against plain softmax attention, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_attention import ops


def plain_attention(q, k, v, visible, scale):
    """q [n, Hq, D], k, v [L, Hkv, D], visible bool [n, L]; o and lse in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->nhl", q.double(), k) * scale
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(lse[..., None] == -torch.inf, 0.0)
    return torch.einsum("nhl,lhd->nhd", weights, v), lse


def random_case(seed, num_rows, kv_lens, page, heads, head_dim, magnitude=1.0, dtype=torch.float32):
    """Sequences over randomly chosen pages of a pool whose other memory is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_q_heads, num_kv_heads = heads
    counts = [-(-length // page) for length in kv_lens]
    num_pages = sum(counts) + 3
    pool = torch.full((num_pages, 2, num_kv_heads, page, head_dim), torch.nan, dtype=dtype)
    order = torch.randperm(num_pages, generator=generator)
    if seed % 2:
        order = order.sort().values  # consecutive pages take another path
    table = torch.zeros(len(kv_lens), max([*counts, 1]), dtype=torch.int32)
    kvs, taken = [], 0
    for row, (length, count) in enumerate(zip(kv_lens, counts, strict=True)):
        pages = order[taken : taken + count]
        taken += count
        table[row, :count] = pages
        kv = torch.randn(length, 2, num_kv_heads, head_dim, generator=generator).to(dtype)
        for token in range(length):
            pool[pages[token // page], :, :, token % page] = kv[token]
        kvs.append(kv)
    rows = sum(num_rows)
    q = (torch.randn(rows, num_q_heads, head_dim, generator=generator) * magnitude).to(dtype)
    cu_seqlens = torch.tensor([0, *np.cumsum(num_rows)], dtype=torch.int32)
    return q, pool, table, cu_seqlens, torch.tensor(kv_lens, dtype=torch.int32), kvs


def attend(case, causal):
    q, pool, table, cu_seqlens, kv_lens, _ = case
    scale = q.shape[-1] ** -0.5
    return ops.paged_attention(
        q, pool, table, cu_seqlens, kv_lens, causal=causal, scale=scale, max_q_len=0, max_kv_len=0
    )


def check_paged_attention(case, causal, tolerance):
    q, _, _, cu_seqlens, _, kvs = case
    scale = q.shape[-1] ** -0.5
    o, lse = attend(case, causal)
    assert o.dtype == q.dtype
    assert lse.dtype == torch.float32
    for sequence, kv in enumerate(kvs):
        begin, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        n, length = int(end - begin), len(kv)
        last_seen = torch.arange(n)[:, None] + (length - n if causal else length)
        visible = torch.arange(length)[None] <= last_seen
        wanted, wanted_lse = plain_attention(q[begin:end], kv[:, 0], kv[:, 1], visible, scale)
        torch.testing.assert_close(o[begin:end].double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[begin:end].double(), wanted_lse, rtol=1e-4, atol=1e-4)


@given(
    seed=st.integers(0, 2**31),
    sequences=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 150)), min_size=1, max_size=4),
    page=st.sampled_from([1, 8, 64]),
    heads=st.sampled_from([(4, 4), (6, 2), (7, 1), (9, 3)]),
    causal=st.booleans(),
)
def test_paged_attention(seed, sequences, page, heads, causal):
    num_rows, kv_lens = zip(*sequences, strict=True)
    case = random_case(seed, num_rows, kv_lens, page, heads, 16)
    check_paged_attention(case, causal, 1e-4)


@pytest.mark.parametrize("magnitude", [1e-3, 1e4])
def test_extreme_scores(magnitude):
    case = random_case(1, [5, 40], [200, 130], 32, (6, 2), 64, magnitude)
    check_paged_attention(case, True, 1e-3)


def test_bfloat16():
    case = random_case(2, [1, 40], [200, 130], 32, (6, 2), 64, dtype=torch.bfloat16)
    check_paged_attention(case, True, 2e-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize(
    ("kv_len", "page"), [(7, 8), (20, 8), (64, 64), (200, 64), (3, 1), (700, 128)]
)
@pytest.mark.parametrize("tokens", [slice(0, 1), slice(2, 3), slice(None)])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_nan_in_a_live_page_surfaces(kind, tokens, kv_len, page, rows, causal):
    """In the rows that see it and the heads that share it, and in no others."""
    case = random_case(3, [rows, 5], [kv_len, 40], page, (6, 2), 16)
    _, pool, table, *_ = case
    for token in range(kv_len)[tokens]:
        pool[table[0, token // page], "kv".index(kind), 1, token % page] = torch.nan
    o, lse = attend(case, causal)

    seen = torch.arange(kv_len)[tokens].min() <= torch.arange(rows) + (
        kv_len - rows if causal else kv_len
    )
    for head in range(6):
        hit = seen if head >= 3 else torch.zeros(rows, dtype=torch.bool)
        assert o[:rows, head].isnan().all(dim=-1)[hit].all()
        assert torch.equal(lse[:rows, head].isnan(), hit & (kind == "k"))
        if kind == "k":
            assert torch.equal(o[:rows, head].isnan().any(dim=-1), hit)
    assert not o[rows:].isnan().any()
    assert not lse[rows:].isnan().any()


@pytest.mark.parametrize("kv_len", [3, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_is_not_a_plausible_answer(sign, kv_len):
    """Scores of +inf end as NaN; those of -inf count for nothing, as if they were masked."""
    case = random_case(4, [3], [kv_len], 8, (2, 1), 16)
    q, pool, table, *_ = case
    q.fill_(2.0)
    pool[table[0].long(), 0] = sign * 3e38
    o, lse = attend(case, False)
    if sign > 0:
        assert o.isnan().all()
        assert lse.isnan().all()
    else:
        assert (o == 0).all()
        assert (lse == -torch.inf).all()


def random_shards(seed, shards, rows=3, heads=2, head_dim=4, magnitude=1.0):
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(shards, rows, heads, head_dim, generator=generator)
    lse = torch.randn(shards, rows, heads, generator=generator) * magnitude
    empty = torch.rand(shards, rows, heads, generator=generator) < 0.3
    return o.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


SHARDS = {
    "seed": st.integers(0, 2**31),
    "shards": st.integers(1, 6),
    "magnitude": st.sampled_from([1.0, 80.0, 1e4]),
}


@given(**SHARDS)
def test_merge_does_not_depend_on_order(seed, shards, magnitude):
    o, lse = random_shards(seed, shards, magnitude=magnitude)
    order = torch.randperm(shards, generator=torch.Generator().manual_seed(seed))
    assert_same(ops.merge_lse(o, lse), ops.merge_lse(o[order], lse[order]))


@given(**SHARDS, data=st.data())
def test_merge_is_associative(seed, shards, magnitude, data):
    o, lse = random_shards(seed, shards, magnitude=magnitude)
    cut = data.draw(st.integers(1, shards))
    parts = [ops.merge_lse(o[:cut], lse[:cut])]
    if cut < shards:
        parts.append(ops.merge_lse(o[cut:], lse[cut:]))
    stacked = [torch.stack(part) for part in zip(*parts, strict=True)]
    assert_same(ops.merge_lse(o, lse), ops.merge_lse(*stacked))


def test_merge_of_empty_shards():
    o, lse = torch.zeros(3, 2, 1, 4), torch.full((3, 2, 1), -torch.inf)
    merged, merged_lse = ops.merge_lse(o, lse)
    assert (merged == 0).all()
    assert (merged_lse == -torch.inf).all()


def test_merge_shows_nan():
    o, lse = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2)
    lse[1, 0, 0] = torch.nan
    lse[2, 1, 1] = torch.inf
    o[0, 2, 0, 3] = torch.nan
    lse[0, 3], o[0, 3] = -torch.inf, torch.nan  # an empty shard: whatever its o holds
    merged, merged_lse = ops.merge_lse(o, lse)
    for row, head in ((0, 0), (1, 1)):
        assert merged[row, head].isnan().all()
        assert not merged_lse[row, head].isfinite()
    assert merged[2, 0].isnan().nonzero().flatten().tolist() == [3]
    assert merged.isnan().sum() == 2 * 8 + 1
    assert merged_lse.isfinite().sum() == 4 * 2 - 2


def test_merge_equals_attention_over_all_keys():
    q, kv = torch.randn(5, 4, 16), torch.randn(90, 2, 2, 16)
    visible = torch.ones(5, 90, dtype=torch.bool)
    whole = plain_attention(q, kv[:, 0], kv[:, 1], visible, 0.25)
    parts = [
        plain_attention(q, shard[:, 0], shard[:, 1], visible[:, : len(shard)], 0.25)
        for shard in kv.split([1, 50, 39])
    ]
    assert_same(ops.merge_lse(*(torch.stack(part) for part in zip(*parts, strict=True))), whole)


def test_rope_append_stores_and_rotates():
    page, head_dim, num_q_heads, num_kv_heads = 4, 8, 4, 2
    pool = torch.zeros(5, 2, num_kv_heads, page, head_dim)
    qkv = torch.randn(3, (num_q_heads + 2 * num_kv_heads) * head_dim)
    positions = torch.tensor([0, 7, 9], dtype=torch.int32)
    angles = torch.arange(12.0)[:, None] * torch.rand(head_dim // 2)
    rotary = torch.cat((angles.cos(), angles.sin()), dim=-1)
    slots = torch.tensor([6, -1, 19], dtype=torch.int32)
    q = torch.empty(3, num_q_heads, head_dim)
    ops.rope_append(qkv, positions, rotary, pool, slots, q)

    heads = qkv.view(3, -1, head_dim)
    pairs = torch.view_as_complex(
        torch.stack(heads[:, : num_q_heads + num_kv_heads].chunk(2, dim=-1), dim=-1)
    )
    turned = pairs * torch.polar(torch.ones(()), angles)[positions.long(), None]
    turned = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(q, turned[:, :num_q_heads])
    for token, slot in ((0, 6), (2, 19)):
        stored = pool[slot // page, :, :, slot % page]
        torch.testing.assert_close(stored[0], turned[token, num_q_heads:])
        torch.testing.assert_close(stored[1], heads[token, num_q_heads + num_kv_heads :])
    assert pool.count_nonzero() == 2 * 2 * num_kv_heads * head_dim


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device meta is not supported: use cpu or cuda"):
        ops.merge_lse(torch.empty(1, 1, 1, 4, device="meta"), torch.empty(1, 1, 1, device="meta"))


@pytest.mark.parametrize("rows", [1, 5])
def test_linear(rows):
    x, weight, residual = torch.randn(rows, 8), torch.randn(6, 8), torch.randn(rows, 6)
    bias, product = torch.randn(6), x @ weight.T
    torch.testing.assert_close(ops.linear(x, weight), product)
    torch.testing.assert_close(ops.linear(x, weight, bias), product + bias)
    torch.testing.assert_close(ops.linear(x, weight, residual), product + residual)
    expected = product + residual
    assert ops.linear(x, weight, residual, out=residual) is residual
    torch.testing.assert_close(residual, expected)
