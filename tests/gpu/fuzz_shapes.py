"""Random shapes of every operator, against float64 or the operators in torch.

    python tests/gpu/fuzz_shapes.py --seconds 60 [--seed N] [--small] [--kernels query_sm80]

Operators take turns. A case draws from the seed and its number alone; what fails is printed with
the options that repeat it. `--small` keeps shapes small enough for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from listed import check_fetched, in_float32, listed_case, on_device, selecting
from paged import TOLERANCE, Problem, assert_close, float32_out
from torch.nn import functional as F

from star_attention.ops import implementation, reference

DTYPES = (torch.float16, torch.bfloat16)
KERNELS = ["auto", "query_sm80", "context_sm80", "query_sm90", "context_sm90"]
ELEMENTS = {  # of results that are rounded once
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


class Draw(random.Random):
    """What one case draws; says what it was."""

    def __init__(self, seed: int, small: bool, device: str, kernels: Sequence[str]) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)
        self.small, self.device, self.kernels = small, device, kernels
        self.drawn: dict[str, object] = {}

    def __call__(self, name: str, values: Sequence) -> object:
        self.drawn[name] = self.choice(values)
        return self.drawn[name]

    def size(self, name: str, most: int, small: int, least: int = 1) -> int:
        """As often near a border of tiles and pages as anywhere, and as often short as long."""
        limit = small if self.small else most
        size = round(limit ** self.random())
        if self.random() < 0.5:
            size = size // 64 * 64 + self.choice((-1, 0, 1))
        self.drawn[name] = min(max(size, least), limit)
        return self.drawn[name]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)


def kernels(device: str) -> list[str]:
    """Of attention, that run there."""
    if device == "cpu" or torch.cuda.get_device_capability() != (9, 0):
        return KERNELS[:3]
    return KERNELS


def on(device: str, kernel: str) -> dict[str, str]:
    return {} if device == "cpu" else {"kernel": kernel}


def paged_attention(draw: Draw, ops: ModuleType) -> None:
    kernel = draw("kernel", draw.kernels)
    kv_heads, group = draw("kv_heads", (1, 2, 3)), draw("group", (1, 2, 3, 4, 5, 7, 8))
    lengths = []
    for i in range(draw.randint(1, 3 if draw.small else 6)):
        rows = draw.size(f"rows {i}", 900, 140, least=0)
        before = draw.size(f"before {i}", 6000, 500, least=0)
        lengths.append((rows, draw.choice((before, rows + before))))
    if not any(rows for rows, _ in lengths):
        lengths[0] = 1, lengths[0][1]
    problem = Problem(
        draw("lengths", [lengths]),
        num_q_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=draw("head_dim", (64, 128)),
        page=draw("page", (64, 128)),
        dtype=draw("dtype", DTYPES),
        causal=draw("causal", (True, False)),
        score_scale=draw("score_scale", (1.0, 8.0)),
        window=draw("window", (None, None, 1, 70, 700)),
        device=draw.device,
    )
    if draw("strided", (True, False)):
        apart = draw.randn(len(problem.q), 8 + problem.q[0].numel(), dtype=problem.dtype)
        apart[:, :-8] = problem.q.flatten(1)
        problem.q = apart[:, :-8].view(problem.q.shape)
    out = float32_out(problem) if draw("float32", (True, False)) else None
    o, lse = ops.paged_attention(**problem.arguments(), out=out, **on(draw.device, kernel))
    assert_close(o, lse, problem)


def lists_by_head(draw: Draw, ops: ModuleType) -> None:
    kernel = draw("kernel", [name for name in draw.kernels if "query" not in name])
    dtype = draw("dtype", DTYPES)
    lengths = [draw.size(f"rows {i}", 128, 128, least=0) for i in range(draw.randint(1, 9))]
    case = listed_case(
        dtype,
        draw("head_dim", (64, 128)),
        draw("page", (64, 128)),
        kv_heads=draw("kv_heads", (1, 2, 3)),
        group=draw("group", (1, 3, 4, 8)),
        lengths=(*lengths, 1),
        most=draw.size("most", 32, 4),
    )
    o, lse = ops.paged_attention(**on_device(case, draw.device), **on(draw.device, kernel))
    expected, expected_lse = reference.paged_attention(**in_float32(case))
    error = float((o.cpu() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= TOLERANCE[dtype], f"o is off by {error:.2e}"
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=0, atol=2e-3)


def rope_append(draw: Draw, ops: ModuleType) -> None:
    q_heads, kv_heads = draw("q_heads", (1, 7, 8, 9, 32)), draw("kv_heads", (1, 2, 3, 8))
    head_dim, page = draw("head_dim", (64, 128)), draw("page", (64, 128))
    dtype, tokens = draw("dtype", DTYPES), draw.size("tokens", 2000, 130)
    pages = -(-tokens // page) + 2
    angles = 100 * torch.rand(500, head_dim // 2)
    rotary = torch.cat((angles.cos(), angles.sin()), dim=-1)
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim).to(dtype)
    positions = torch.randint(0, 500, (tokens,), dtype=torch.int32)
    slots = torch.randperm(pages * page)[:tokens].int()
    slots[torch.rand(tokens) < 0.1] = -1
    pool = torch.randn(pages, 2, kv_heads, page, head_dim).to(dtype)
    q = torch.full((tokens, q_heads, head_dim), torch.nan, dtype=dtype)
    inputs = qkv, positions, rotary, pool, slots, q
    found = [x.to(draw.device, copy=True) for x in inputs]
    ops.rope_append(*found)
    reference.rope_append(*inputs)
    # The compiler may fuse a product into the sum: one rounding of the 16-bit result apart.
    for ours, theirs in ((found[5], q), (found[3], pool)):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-3)


def merge_lse(draw: Draw, ops: ModuleType) -> None:
    shape = (
        draw("shards", (1, 2, 3, 8, 17)),
        draw.size("tokens", 2000, 130),
        draw("heads", (1, 3, 8, 32)),
        draw("head_dim", (64, 128)),
    )
    o = draw.randn(*shape).to(draw("dtype", (*DTYPES, torch.float32)))
    lse = 10 * draw.randn(*shape[:-1])
    lse[torch.rand(lse.shape, device=draw.device) < draw("empty", (0.0, 0.3, 1.0))] = -torch.inf
    o[lse == -torch.inf] = torch.nan
    out_dtype = draw("out_dtype", (o.dtype, torch.float32))
    out, out_lse = ops.merge_lse(o, lse, out_dtype=out_dtype)
    total = lse.double().logsumexp(0)
    weights = (lse.double() - total).exp().nan_to_num(nan=0.0)[..., None]
    expected = torch.where(weights > 0, weights * o.double(), 0.0).sum(0)
    error = float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= TOLERANCE.get(out_dtype, 2e-6), f"o is off by {error:.2e}"
    torch.testing.assert_close(out_lse.double(), total, rtol=1e-6, atol=1e-5)


def rms_norm(draw: Draw, ops: ModuleType) -> None:
    dtype, hidden = draw("dtype", DTYPES), 8 * draw.size("hidden / 8", 4096, 100)
    x = draw.randn(draw.size("rows", 300, 20), hidden + 8, dtype=dtype)[:, 8:]
    weight = draw.randn(hidden, dtype=dtype)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    found = ops.rms_norm(x, weight, 1e-5).double()
    torch.testing.assert_close(found, expected, **ELEMENTS[dtype])


def silu_mul(draw: Draw, ops: ModuleType) -> None:
    dtype, inner = draw("dtype", DTYPES), 8 * draw.size("intermediate / 8", 2000, 100)
    gate_up = 4 * draw.randn(draw.size("rows", 300, 20), 2 * inner, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    found = ops.silu_mul(gate_up).double()
    torch.testing.assert_close(found, F.silu(gate) * up, **ELEMENTS[dtype])


def linear(draw: Draw, ops: ModuleType) -> None:
    dtype, tokens = draw("dtype", DTYPES), draw("tokens", (1, 2, 3))
    inputs = 4 * draw.size("inputs / 4", 4000, 300)
    outputs = draw.size("outputs", 5000, 300)
    x = draw.randn(tokens, inputs + 8, dtype=dtype)[:, 8:]
    weight = draw.randn(outputs, inputs, dtype=dtype) / inputs**0.5
    bias = draw.randn(outputs, dtype=dtype) if draw("bias", (True, False)) else None
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    found = ops.linear(x, weight, bias).double()
    torch.testing.assert_close(found, expected, **ELEMENTS[dtype])


def page_means(draw: Draw, ops: ModuleType) -> None:
    dtype, pages = draw("dtype", DTYPES), draw.size("pages", 60, 6)
    kv_heads, head_dim = draw("kv_heads", (1, 2, 3)), draw("head_dim", (64, 128))
    pool = torch.randn(pages + 2, 2, kv_heads, 128, head_dim).to(dtype)
    listed, rows = (torch.randperm(pages + 2)[:pages].int() for _ in range(2))
    expected = torch.full((pages + 2, kv_heads, 8, head_dim), -1.0, dtype=dtype)
    means = expected.to(draw.device, copy=True)
    reference.page_means(pool, listed, rows, expected)
    ops.page_means(*(x.to(draw.device) for x in (pool, listed, rows)), means)
    torch.testing.assert_close(means.cpu(), expected, rtol=1e-2, atol=1e-3)


def select_pages(draw: Draw, ops: ModuleType) -> None:
    """On whole numbers, where sums are exact and many scores are equal."""
    pages = draw.size("pages", 600, 70)
    tiles = [0]
    for _ in range(draw.randint(1, 3 if draw.small else 20)):
        tiles.append(tiles[-1] + draw.choice((1, 37, 128, 128)))
    case = selecting(
        draw("dtype", DTYPES),
        draw("head_dim", (64, 128)),
        draw("tiles", [tiles]),
        draw("candidates", [[draw.randint(0, pages) for _ in tiles[1:]]]),
        draw("count", (1, 5, 16, 256)),
        pages,
        kv_heads=draw("kv_heads", (1, 2, 3)),
        group=draw("group", (1, 3, 4, 8)),
    )
    found = ops.select_pages(**on_device(case, draw.device))
    for ours, theirs in zip(found, reference.select_pages(**case), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def fetch_pages(draw: Draw, ops: ModuleType) -> None:
    ranks = draw("ranks", (1, 2, 3, 4))
    check_fetched(
        ops,
        draw.size("pages", 3000, 100, least=9),
        ranks,
        draw.randrange(ranks),
        draw("kv_heads", (1, 2, 3)),
        draw.size("tiles", 30, 5),
        draw("count", (1, 5, 9)),
    )


OPERATORS: dict[str, Callable[[Draw, ModuleType], None]] = {
    operator.__name__: operator
    for operator in (
        *(paged_attention, lists_by_head, rope_append, merge_lse, rms_norm, silu_mul, linear),
        *(page_means, select_pages, fetch_pages),
    )
}


def fuzz(
    names: Sequence[str],
    seed: int,
    *,
    seconds: float = float("inf"),
    cases: int | None = None,
    small: bool = False,
    device: str = "cuda",
    chosen: Sequence[str] = (),
) -> dict[str, int]:
    """Runs each operator once, then goes on until the time is over or `cases` have run. Ends the
    turns of an operator that fails. `chosen`: kernels of attention, those that run there, or all.

    Returns:
        The cases of each that passed; of those that failed, -1.
    """
    ops = implementation(torch.device(device))
    passed = dict.fromkeys(names, 0)
    until, case = time.monotonic() + seconds, 0
    left = list(names)
    while left and case != cases and (case < len(names) or time.monotonic() < until):
        name = left[case % len(left)]
        draw = Draw(seed + case, small, device, chosen or kernels(device))
        try:
            OPERATORS[name](draw, ops)
            if device != "cpu":
                torch.cuda.synchronize()
            passed[name] += 1
            case += 1
        except (AssertionError, RuntimeError, ValueError) as error:
            more = " --small" * small + f" --kernels {' '.join(chosen)}" * bool(chosen)
            print(
                f"{name}: {error}\n  of {draw.drawn}\n"
                f"  again: --only {name} --seed {seed + case} --cases 1{more}",
                flush=True,
            )
            passed[name] = -1
            left.remove(name)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, help="at most so many")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--without", nargs="+", choices=OPERATORS, default=[])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=())
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    names = [name for name in options.only if name not in options.without]
    if options.device == "cpu":
        names = [name for name in names if name != "fetch_pages"]
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if missing := set(options.kernels) - set(kernels(options.device)):
        parser.error(f"{', '.join(missing)} cannot run there")
    passed = fuzz(
        names,
        options.seed,
        seconds=options.seconds,
        cases=options.cases,
        small=options.small,
        device=options.device,
        chosen=options.kernels,
    )
    failed = [name for name, count in passed.items() if count < 0]
    total = sum(count for count in passed.values() if count > 0)
    print(f"seed {options.seed}: {total} cases passed; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
