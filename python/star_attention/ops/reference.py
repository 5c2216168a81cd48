"""The operators in torch on the CPU. Attention is torch's fused CPU kernel, which returns LSE and
never holds a score matrix; what it cannot express (pages, bottom-right masks) is put together from
several calls by `merge_lse`. Shapes and meaning: `star_attention.ops`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from star_attention.ops import select_reference
from star_attention.ops.quantized import LARGEST, QuantizedRows, RowKind, quantize_rows

# Up to this many rows per KV head, attending page by page without a copy beats gathering the pages.
_MAX_ROWS_PAGE_BY_PAGE = 32

# Rows that are masked together; those whose scores are in memory.
_MASKED_ROWS, _CAPPED_ROWS = 256, 64

_MEAN_ROWS = 4  # of a tile, in all heads of a group, that choose pages together


def paged_attention(
    q: torch.Tensor,
    kv_pool: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    max_q_len: int,
    max_kv_len: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    other_pool: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    page = kv_pool.shape[3]
    o, lse = out or (torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32))
    o.zero_()
    lse.fill_(-torch.inf)
    rows = cu_seqlens_q.tolist()
    if page_table.dim() == 3:
        pools = kv_pool, kv_pool[:0] if other_pool is None else other_pool
        _attend_by_head(q, pools, page_table, rows, kv_lens.tolist(), scale, (o, lse))
        return o, lse
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        begin, end = rows[sequence], rows[sequence + 1]
        if causal:
            begin = max(begin, end - kv_len)  # earlier rows see nothing
        if begin == end or kv_len == 0:
            continue
        listed = page_table[sequence, : -(-kv_len // page)].tolist()
        pages = _select(kv_pool, listed)
        if kv_scales is not None:
            pages = _values(pages, _select(kv_scales, listed)).to(q.dtype)
        if starts is not None or cap is not None:
            seen = q.new_zeros(len(q), dtype=torch.long) if starts is None else starts.long()
            o[begin:end], lse[begin:end] = _attend_from(
                q[begin:end], pages, kv_len, seen[begin:end], causal, scale, cap
            )
            continue
        o[begin:end], lse[begin:end] = _attend_pages(
            q[begin:end], pages, kv_len, causal and end - begin > 1, scale
        )
    return o, lse


def quantize_pages(
    kv_pool: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    pages: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    each, page = kv_pool.itemsize, kv_pool.shape[4]
    counts = torch.arange(page) < tokens[:, None]
    first = pages.long().view(-1)
    index = torch.arange(len(first))
    targets = first[index // each * each] * each + index % each
    for layer in range(len(kv_pool)):
        values = kv_pool[layer, first].float()
        values.masked_fill_(~counts[:, None, None, :, None], 0.0)
        largest = values.abs().amax((-2, -1))
        scale = torch.where(largest == 0, 1.0, largest / LARGEST[codes.dtype])
        quotients = values / scale[..., None, None]
        if codes.dtype == torch.int8:
            quotients = quotients.nan_to_num(0.0).round_().clamp_(-127, 127)
        codes[layer, targets] = quotients.to(codes.dtype)
        scales[layer, targets] = scale


def dequantize_pages(
    kv_pool: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    sources, targets = sources.long(), targets.long()
    for layer in range(len(kv_pool)):
        values = _values(codes[layer, sources], scales[layer, sources])
        kv_pool[layer, targets] = values.to(kv_pool.dtype)


def rope_append(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    kv_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
) -> None:
    num_q_heads = q.shape[1]
    _, _, num_kv_heads, page, head_dim = kv_pool.shape
    heads = qkv.view(qkv.shape[0], num_q_heads + 2 * num_kv_heads, head_dim)
    rotated, v = heads.split([num_q_heads + num_kv_heads, num_kv_heads], dim=1)
    cos, sin = rotary[positions.long(), None].chunk(2, dim=-1)
    first, second = rotated.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    rotated = rotated.to(qkv.dtype)
    q[:] = rotated[:, :num_q_heads]

    stored = slot_mapping >= 0
    slots = slot_mapping[stored].long()
    pages, offsets = slots // page, slots % page
    kv_pool[pages, 0, :, offsets] = rotated[stored, num_q_heads:]
    kv_pool[pages, 1, :, offsets] = v[stored]


def merge_lse(
    o: torch.Tensor, lse: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    merged_lse = torch.logsumexp(lse, dim=0)
    weights = torch.exp(lse - merged_lse)
    empty = lse == -torch.inf
    if empty.any():  # whatever their o holds, and where all are
        weights = weights.masked_fill_(empty, 0.0)
        o = o.masked_fill(empty[..., None], 0.0)
    merged = (weights[..., None] * o.float()).sum(dim=0)
    return merged.to(out_dtype or o.dtype), merged_lse


def page_means(
    kv_pool: torch.Tensor, pages: torch.Tensor, rows: torch.Tensor, means: torch.Tensor
) -> None:
    size = kv_pool.shape[3] // means.shape[2]
    means[rows.long()] = select_reference.means(kv_pool[pages.long(), 0], size)


def select_pages(
    q: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    candidates: torch.Tensor,
    means: torch.Tensor,
    *,
    count: int,
    page: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    by_head = means.transpose(0, 1)
    kv_heads = len(by_head)
    pooled = _MEAN_ROWS if page % _MEAN_ROWS == 0 else 1
    lists = q.new_empty(len(candidates), kv_heads, count, dtype=torch.int32)
    counts = q.new_empty(len(candidates), kv_heads, dtype=torch.int32)
    starts = tiles.tolist()
    for tile, pages in enumerate(candidates.tolist()):
        rows, rows_lse = (
            select_reference.pool_rows(
                select_reference.whole_tiles(x[starts[tile] : starts[tile + 1]], page),
                kv_heads,
                page,
                pooled,
                heads=True,
            )
            for x in (q, lse)
        )
        scores = select_reference.tile_scores(rows, rows_lse, by_head[:, :pages], scale)
        listed, holds = select_reference.choose(scores, count)
        lists[tile], counts[tile] = listed[:, 0], holds[:, 0]
    return lists, counts


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, kind: RowKind | None = None
) -> torch.Tensor | QuantizedRows:
    normed = F.rms_norm(x, weight.shape, weight, eps)
    return quantize_rows(normed, kind) if kind else normed


def linear(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | QuantizedRows,
    addend: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """FP8 is widened first: right, not fast."""
    if isinstance(weight, QuantizedRows):
        if weight.kind == "int8":
            return _linear_int8(x, weight, addend, out)
        x, weight = x.widened(), weight.widened()
    if addend is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(addend, x, weight.t(), out=out)


def _linear_int8(
    x: QuantizedRows,
    weight: QuantizedRows,
    addend: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    product = torch._int_mm(x.values, weight.values.t()).float()
    product = product.mul_(x.scales[:, None]).mul_(weight.scales).to(x.dtype)
    if addend is not None:
        return torch.add(product, addend, out=out)
    return product if out is None else out.copy_(product)


def kind_of_rows(rows: int, weight: QuantizedRows) -> RowKind | None:
    return weight.kind


def silu_mul(gate_up: torch.Tensor, *, kind: RowKind | None = None) -> torch.Tensor | QuantizedRows:
    gate, up = gate_up.chunk(2, dim=-1)
    product = F.silu(gate).mul_(up)
    return quantize_rows(product, kind) if kind else product


def _attend_by_head(
    q: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    lists: torch.Tensor,
    starts: list[int],
    kv_lens: list[list[int]],
    scale: float,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """See `ops.paged_attention`: lists of planes of the two pools."""
    kv_heads, page = pools[0].shape[2:4]
    group = q.shape[1] // kv_heads
    planes = [pool.flatten(0, 2) for pool in pools]
    for sequence, of_heads in enumerate(kv_lens):
        rows = slice(starts[sequence], starts[sequence + 1])
        for head, kv_len in enumerate(of_heads):
            if rows.start == rows.stop or kv_len == 0:
                continue
            listed = lists[sequence, head, : -(-kv_len // page)].long()
            pages = q.new_empty(len(listed), 2, 1, *pools[0].shape[3:])
            for pool, is_here, plane in zip(
                planes, (listed >= 0, listed < 0), (listed, ~listed), strict=True
            ):
                for which in range(2):
                    pages[is_here, which, 0] = pool[plane[is_here] + which * kv_heads]
            heads = slice(head * group, (head + 1) * group)
            out[0][rows, heads], out[1][rows, heads] = _attend_pages(
                q[rows, heads], pages, kv_len, False, scale
            )


def _values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [P, 2, Hkv, tokens_per_block, D] of codes and scales [P, 2, Hkv]."""
    return codes.float() * scales[..., None, None]


def _select(kv_pool: torch.Tensor, pages: list[int]) -> torch.Tensor:
    """The pages [P, 2, Hkv, tokens_per_block, D] in order; a view where they are consecutive."""
    first = pages[0]
    if pages == list(range(first, first + len(pages))):
        return kv_pool[first : first + len(pages)]
    return kv_pool[torch.tensor(pages, device=kv_pool.device)]


def _attend_pages(
    q: torch.Tensor, pages: torch.Tensor, kv_len: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q [n, Hq, D] over the first `kv_len` tokens of pages [P, 2, Hkv, page, D]."""
    num_rows, num_q_heads, _ = q.shape
    _, _, num_kv_heads, page, _ = pages.shape
    prefix = kv_len - num_rows if causal else kv_len  # what every row sees
    parts = []
    done = 0
    if num_rows * (num_q_heads // num_kv_heads) <= _MAX_ROWS_PAGE_BY_PAGE:
        whole = prefix // page
        if whole:
            parts.append(_attend_whole_pages(q, pages[:whole], scale))
            pages, done = pages[whole:], whole * page
    if done < kv_len:
        k, v = (
            pages[:, kind].transpose(0, 1).reshape(num_kv_heads, -1, q.shape[-1])
            for kind in range(2)
        )
        if done < prefix:
            span = prefix - done
            parts.append(_attend(q, k[:, :span], v[:, :span], False, scale))
        if causal:
            span = slice(prefix - done, kv_len - done)
            parts.append(_attend(q, k[:, span], v[:, span], True, scale))
    if len(parts) == 1:
        return parts[0]
    return merge_lse(*(torch.stack(part) for part in zip(*parts, strict=True)))


def _attend_from(
    q: torch.Tensor,
    pages: torch.Tensor,
    kv_len: int,
    starts: torch.Tensor,
    causal: bool,
    scale: float,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_attend_pages`, where row i sees no token before starts[i], and scores have a cap."""
    num_rows, page = len(q), pages.shape[3]
    ends = torch.full((num_rows,), kv_len)
    if causal:
        ends = torch.arange(kv_len - num_rows, kv_len) + 1
    o, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    at_once = _MASKED_ROWS if cap is None else _CAPPED_ROWS
    for begin in range(0, num_rows, at_once):
        rows = slice(begin, begin + at_once)
        first, last = int(starts[rows].min()), int(ends[rows].max())
        if first >= last:
            continue
        base = first // page * page
        k, v = (
            pages[base // page : -(-last // page), kind].transpose(0, 1).flatten(1, 2)
            for kind in range(2)
        )
        keys = slice(first - base, last - base)
        index = torch.arange(first, last)
        mask = (index >= starts[rows, None]) & (index < ends[rows, None])
        seen = q[rows], k[:, keys], v[:, keys]
        if cap is None:
            o[rows], lse[rows] = _attend(*seen, False, scale, mask)
        else:
            o[rows], lse[rows] = _attend_capped(*seen, scale, mask, cap)
    return o, lse


def _attend_capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, Hq, D] over contiguous k, v [Hkv, L, D], mask bool [n, L]."""
    grouped = q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3).float()  # [Hkv, group, n, D]
    scores = (grouped @ k[:, None].float().mT).mul_(scale / cap).tanh_().mul_(cap)
    scores.masked_fill_(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    weights.masked_fill_((lse == -torch.inf)[..., None], 0.0)
    o = (weights @ v[:, None].float()).permute(2, 0, 1, 3).reshape(q.shape)
    return o.to(q.dtype), lse.permute(2, 0, 1).reshape(q.shape[:2])


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, Hq, D] over contiguous k, v [Hkv, L, D]; `causal` needs L == n. With a mask, bool
    [n, L], only over what it says."""
    num_rows, num_q_heads, head_dim = q.shape
    groups = k.shape[0]
    o, lse = _flash_attention(
        q.view(num_rows, groups, -1, head_dim).permute(1, 2, 0, 3),
        k[:, None].expand(-1, num_q_heads // groups, -1, -1),
        v[:, None].expand(-1, num_q_heads // groups, -1, -1),
        causal,
        scale,
        mask,
    )
    return o.permute(2, 0, 1, 3).reshape(q.shape), lse.permute(2, 0, 1).reshape(q.shape[:2])


def _attend_whole_pages(
    q: torch.Tensor, pages: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, Hq, D] over full pages [P, 2, Hkv, page, D], in place: pages are the kernel's batch,
    the query heads of a KV group its rows."""
    num_rows, num_q_heads, head_dim = q.shape
    num_pages, _, groups, _, _ = pages.shape
    packed = q.view(num_rows, groups, -1, head_dim).transpose(0, 1).reshape(groups, -1, head_dim)
    o, lse = _flash_attention(
        packed.expand(num_pages, -1, -1, -1), pages[:, 0], pages[:, 1], False, scale
    )
    o, lse = merge_lse(o, lse)
    o = o.view(groups, num_rows, -1, head_dim).transpose(0, 1).reshape(q.shape)
    return o, lse.view(groups, num_rows, -1).transpose(0, 1).reshape(num_rows, num_q_heads)


def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, n, D], k and v [B, H, L, D], mask [n, L]. Where torch's kernel finds no largest
    score, since all are NaN or -inf, it says o = 0, lse = 0: here NaN for the one, lse = -inf for
    the other."""
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)[None, None]
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=causal, attn_mask=bias, scale=scale
    )
    zero = lse == 0
    if zero.any():
        for batch, head, row in (zero & (o == 0).all(dim=-1)).nonzero().tolist():
            seen = k[batch, head, : row + 1] if causal else k[batch, head]
            if mask is not None:
                seen = seen[mask[row]]
            scores = seen.float() @ q[batch, head, row].float() * scale
            lse[batch, head, row] = scores.logsumexp(0)
            if scores.isnan().any():
                o[batch, head, row] = torch.nan
    return o, lse
