"""Pages that rows choose: random problems of what chooses, fetches and attends to them."""

from __future__ import annotations

import torch

PAGE = 128


def whole(*shape: int, dtype: torch.dtype = torch.float32, factor: int = 16) -> torch.Tensor:
    """Numbers whose sums and means, of 16 of them, are exact."""
    return (torch.randint(-4, 5, shape) * factor).to(dtype)


def selecting(
    dtype: torch.dtype,
    head_dim: int,
    tiles: list[int],
    candidates: list[int],
    count: int,
    pages: int,
    kv_heads: int = 2,
    group: int = 4,
) -> dict:
    """Arguments of `select_pages`."""
    return {
        "q": whole(tiles[-1], kv_heads * group, head_dim, dtype=dtype),
        "lse": whole(tiles[-1], kv_heads * group),
        "tiles": torch.tensor(tiles, dtype=torch.int32),
        "candidates": torch.tensor(candidates, dtype=torch.int32),
        "means": whole(pages, kv_heads, 8, head_dim, dtype=dtype, factor=1),
        "count": count,
        "page": PAGE,
        "scale": 0.25,
    }


def listed_case(
    dtype: torch.dtype,
    head_dim: int,
    page: int = PAGE,
    kv_heads: int = 2,
    group: int = 4,
    lengths: tuple[int, ...] = (128, 128, 37, 0, 1, 90),
    most: int = 5,
) -> dict:
    """Arguments of `paged_attention`: sequences of `lengths` rows whose KV heads have lists of
    their own, up to `most` planes of two pools."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    pools = [torch.randn(n, 2, kv_heads, page, head_dim).to(dtype) for n in (7, 4)]
    count = torch.randint(0, most + 1, (len(lengths), kv_heads))
    count[0] = 0
    count[0, 0] = most
    pages = torch.randint(0, 4, (len(lengths), kv_heads, most))
    planes = pages * (2 * kv_heads) + torch.arange(kv_heads)[:, None]
    planes = torch.where(torch.rand(planes.shape) < 0.5, planes, ~planes)
    return {
        "q": torch.randn(int(starts[-1]), kv_heads * group, head_dim).to(dtype),
        "kv_pool": pools[0],
        "page_table": planes.int(),
        "cu_seqlens_q": starts,
        "kv_lens": (count * page).int(),
        "causal": False,
        "scale": head_dim**-0.5,
        "max_q_len": max(lengths),
        "max_kv_len": most * page,
        "other_pool": pools[1],
    }


def on_device(case: dict, device: str = "cuda") -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def in_float32(case: dict) -> dict:
    return {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in case.items()
    }


def check_fetched(
    cuda, pages: int, ranks: int = 3, me: int = 1, kv_heads: int = 2, tiles: int = 9, count: int = 5
) -> None:
    """Of other ranks' pools; planes hold what the lists name, and what is here stays here."""
    pools = [torch.randn(40, 2, kv_heads, PAGE, 64).bfloat16().cuda() for _ in range(ranks)]
    owners = torch.randint(0, ranks, (pages,), dtype=torch.int32)
    where = torch.randint(0, 40, (pages,), dtype=torch.int32)
    counts = torch.randint(0, count + 1, (tiles, kv_heads), dtype=torch.int32)
    lists = torch.rand(tiles, kv_heads, pages).argsort(-1)[..., :count].sort(-1).values.int()
    fetched = torch.full((tiles * count, *pools[0].shape[1:]), torch.nan).bfloat16().cuda()
    planes = cuda.fetch_pages(
        *(x.cuda() for x in (lists, counts, where, owners)),
        [pool.data_ptr() for pool in pools],
        me,
        fetched,
    ).cpu()
    copied = set()
    for tile in range(tiles):
        for head in range(kv_heads):
            for i in range(counts[tile, head]):
                page, plane = int(lists[tile, head, i]), int(planes[tile, head, i])
                is_here = int(owners[page]) == me
                assert (plane >= 0) == is_here
                pool = pools[me] if is_here else fetched
                at, which = divmod(plane if is_here else ~plane, kv_heads * 2)
                assert which == head
                assert torch.equal(pool[at, :, head], pools[owners[page]][where[page], :, head])
                if not is_here:
                    copied.add((page, head, plane))
    assert len(copied) == len({(page, head) for page, head, _ in copied})
