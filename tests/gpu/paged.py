"""Random paged attention problems and their float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Largest ‖o - reference‖ / ‖reference‖.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


@dataclass
class Problem:
    """Sequences of `lengths` = (query rows, cached tokens). Every element of the pool that must not
    reach an output is NaN, every page index that must not be read is out of range."""

    lengths: list[tuple[int, int]]
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    page: int = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    score_scale: float = 1.0  # factor of q
    extra_pages: int = 3
    pages: torch.Tensor | None = None  # which pages of the pool to use, in order
    window: int | None = None  # tokens before its diagonal that a row sees, itself included
    device: str = "cuda"

    def __post_init__(self) -> None:
        counts = [-(-kv_len // self.page) for _, kv_len in self.lengths]
        total = sum(counts)
        pool_pages = total + self.extra_pages
        if self.pages is None:
            self.pages = torch.randperm(pool_pages)[:total]
        else:
            pool_pages = int(self.pages.max()) + 1
        self.kv_pool = torch.full(
            (pool_pages, 2, self.num_kv_heads, self.page, self.head_dim),
            torch.nan,
            dtype=self.dtype,
            device=self.device,
        )
        table = torch.full((len(self.lengths), max(counts) + 2), -(2**30), dtype=torch.int32)
        taken = 0
        for row, ((_, kv_len), count) in enumerate(zip(self.lengths, counts, strict=True)):
            own = self.pages[taken : taken + count]
            taken += count
            table[row, :count] = own
            for i, page in enumerate(own.tolist()):
                tokens = min(self.page, kv_len - i * self.page)
                self.kv_pool[page, :, :, :tokens].normal_()
        self.page_table = table.to(self.device)
        rows = torch.tensor([0] + [n for n, _ in self.lengths])
        self.cu_seqlens_q = rows.cumsum(0).int().to(self.device)
        kv_lens = [kv_len for _, kv_len in self.lengths]
        self.kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=self.device)
        shape = int(rows.sum()), self.num_q_heads, self.head_dim
        self.q = self.score_scale * torch.randn(*shape, dtype=self.dtype, device=self.device)
        self.scale = self.head_dim**-0.5
        self.starts = None
        if self.window is not None:
            diagonals = [torch.arange(n) + kv_len - n for n, kv_len in self.lengths]
            starts = [
                (diagonal - self.window + 1).clamp(0, kv_len)
                for diagonal, (_, kv_len) in zip(diagonals, self.lengths, strict=True)
            ]
            self.starts = torch.cat(starts).int().to(self.device)

    def arguments(self) -> dict:
        starts = {} if self.starts is None else {"starts": self.starts}
        return {
            "q": self.q,
            "kv_pool": self.kv_pool,
            "page_table": self.page_table,
            "cu_seqlens_q": self.cu_seqlens_q,
            "kv_lens": self.kv_lens,
            "causal": self.causal,
            "scale": self.scale,
            "max_q_len": max(n for n, _ in self.lengths),
            "max_kv_len": max(kv for _, kv in self.lengths),
            **starts,
        }

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """o and lse in float64."""
        o = torch.zeros(self.q.shape, dtype=torch.float64, device=self.device)
        lse = torch.full(self.q.shape[:2], -torch.inf, dtype=torch.float64, device=self.device)
        group = self.num_q_heads // self.num_kv_heads
        starts = self.cu_seqlens_q.tolist()
        for row, (n, kv_len) in enumerate(self.lengths):
            if n == 0 or kv_len == 0:
                continue
            rows = slice(starts[row], starts[row + 1])
            own = self.page_table[row, : -(-kv_len // self.page)].long()
            kv = self.kv_pool[own].permute(1, 2, 0, 3, 4)  # [2, Hkv, pages, page, D]
            k, v = kv.flatten(2, 3)[:, :, :kv_len].double()
            q = self.q[rows].view(n, self.num_kv_heads, group, self.head_dim).double()
            scores = torch.einsum("nhgd,hld->hgnl", q, k) * self.scale
            if self.causal:
                seen = torch.ones(n, kv_len, dtype=torch.bool, device=self.device).tril(kv_len - n)
                scores.masked_fill_(~seen, -torch.inf)
            if self.starts is not None:
                index = torch.arange(kv_len, device=self.device)
                scores.masked_fill_(index < self.starts[rows, None], -torch.inf)
            row_lse = scores.logsumexp(-1)
            weights = (scores - row_lse[..., None]).exp()
            weights.masked_fill_(row_lse[..., None] == -torch.inf, 0.0)
            o[rows] = torch.einsum("hgnl,hld->nhgd", weights, v).reshape(n, -1, self.head_dim)
            lse[rows] = row_lse.permute(2, 0, 1).reshape(n, -1)
        return o, lse


def float32_out(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned outputs for partials."""
    return tuple(
        torch.full(shape, torch.nan, device=problem.device)
        for shape in (problem.q.shape, problem.q.shape[:2])
    )


def assert_close(
    o: torch.Tensor, lse: torch.Tensor, problem: Problem, lse_tolerance: float = 1e-3
) -> None:
    expected, expected_lse = problem.reference()
    assert not o.isnan().any(), "NaN in o"
    empty = expected_lse == -torch.inf
    assert (lse[empty] == -torch.inf).all(), "lse of rows that see nothing"
    assert (o[empty] == 0).all(), "o of rows that see nothing"
    error = float((o.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= TOLERANCE[problem.dtype], f"o is off by {error:.2e}"
    lse_error = float((lse.double() - expected_lse)[~empty].abs().max()) if (~empty).any() else 0.0
    assert lse_error <= lse_tolerance, f"lse is off by {lse_error:.2e}"


Attend = Callable[[Problem], tuple[torch.Tensor, torch.Tensor]]

NAN_LENGTHS = {
    "one row": [(1, 1000), (3, 200)],
    "many splits": [(1, 20000), (1, 20000)],
    "16 rows": [(16, 3000), (1, 70)],
    "100 rows": [(100, 2500), (5, 129)],
    "700 rows": [(700, 5003), (5, 129)],
}
NAN_PLACES = ["first token of k", "last shared token of k", "all of k", "v", "q"]


def check_nan_surfaces(attend: Attend, lengths: list[tuple[int, int]], place: str) -> None:
    """A NaN in the first sequence comes out where it is seen, and nowhere else."""
    problem = Problem(lengths)
    rows, kv_len = lengths[0]
    dimensions, in_lse = slice(None), True
    heads, hit_rows = slice(4, 8), slice(0, rows)  # those of the second KV head
    if place == "q":
        problem.q[0, 5] = torch.nan
        heads, hit_rows = slice(5, 6), slice(0, 1)
    elif place == "all of k":
        pages = -(-kv_len // problem.page)
        problem.kv_pool[problem.page_table[0, :pages].long(), 0, 1] = torch.nan
    else:
        token = kv_len - rows if place.startswith("last") else 0
        page = problem.page_table[0, token // problem.page].long()
        if place == "v":
            dimensions, in_lse = slice(7, 8), False
            problem.kv_pool[page, 1, 1, token % problem.page, 7] = torch.nan
        else:
            problem.kv_pool[page, 0, 1, token % problem.page, 3] = torch.nan

    o, lse = attend(problem)
    expected = torch.zeros_like(o, dtype=torch.bool)
    expected[hit_rows, heads, dimensions] = True
    assert torch.equal(o.isnan(), expected)
    assert torch.equal(lse.isnan(), expected.any(dim=-1) & in_lse)
    assert lse[~lse.isnan()].isfinite().all()


def check_blind_rows(attend: Attend) -> None:
    """Rows that see nothing give 0, whatever is in the tiles of those that do."""
    problem = Problem([(400, 17), (1, 70)])
    problem.kv_pool[problem.page_table[0, 0].long(), 1, :, 0] = torch.nan
    o, lse = attend(problem)
    blind = slice(0, 400 - 17)
    assert (o[blind] == 0).all()
    assert (lse[blind] == -torch.inf).all()
    assert o[400 - 17 : 400].isnan().all()
    assert not o[400].isnan().any()


def check_overflow_surfaces(attend: Attend) -> None:
    """Scores of +inf, as of weights gone wrong, do not become an empty cache."""
    problem = Problem([(3, 3000), (70, 500)])
    problem.q.abs_().add_(1)
    problem.kv_pool[problem.page_table[:, 0].long(), 0, :, 5] = 3e38
    o, lse = attend(problem)
    assert o.isnan().all()
    assert lse.isnan().all()
