#!/usr/bin/env python3
"""Benchmark of the CUDA operators against their peers and the GPU's ceilings, in one run.

Prints one table a phase and saves everything as JSON:

    python scripts/bench_attention.py --output benchmarks/results/attention_h100.json

context: a block of B tokens behind an anchor of A tokens, causal, in TFLOP/s of
    4 Hq D (A B + B² / 2) floating-point operations. cuDNN and torch's FA2 cannot align a causal
    mask bottom-right: they make two calls, whose merge is not counted.
query: n query tokens of Hq heads (four a KV head) at the end of L cached ones, causal. Up to 16, in
    TB/s of K and V; more, in TFLOP/s, counted as above. cuDNN and torch's FA2 attend to all L
    without a mask here.
windows: a block of B tokens of which each sees the last W, in TFLOP/s of 4 Hq D B W operations.
bytes: what moves memory only, 32768 tokens, in TB/s of the bytes that must be read and written.
    "fp8" are those that write FP8 rows.
quantized: as query, over pages of 8 bits, all of them seen, in TB/s of the codes; "x" is how many
    times faster than 16-bit pages.
quantizing: a context's pages in 8 bits, in TB/s of what is read and written.
merge: the partials of one token, in µs. FlashInfer merges 16-bit partials only.
linear: the four projections of a layer for n tokens, in TB/s of their weights (436 MB in bf16, 218
    MB in FP8). In FP8, rows that are taken in it are quantised, as the engine does.
gemm: the projections for 16384 tokens, in TFLOP/s, in bf16 and in FP8: "ours" with all that the
    engine does for them alone, "rowwise" the GEMM by itself, "precise" without fast accumulation.

Our attention reads pages in random order, the peers contiguous K and V. "ours" is the kernel that
is taken by itself, "ours, sm_80" the path for GPUs before Hopper; of more than 64 query tokens, all
four kernels are timed. Ceilings are measured with each
row: a read of K and V, a copy that moves the row's bytes, an 8192³ matmul (whose time is that of
the row's operations at its rate).

Contenders take turns in random order, each turn after a pause in which the clocks recover; the
median of all times counts. Where one of a row takes less than 1 ms, all of the row run as CUDA
graphs of the same number of calls, at most 50, since launches would count; what cannot be captured
is said, and runs as that many single calls.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from star_attention import ops

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 128
CONTEXT_SHAPES = [  # B, A
    (4096, 4096),
    (8192, 8192),
    (32768, 4096),
    (32768, 32768),
    (8192, 0),
    (32768, 0),
]
QUERY_SHAPES = [  # L, n, query heads
    (16384, 64, 32),
    (16384, 600, 8),
    (16384, 600, 32),
    (131072, 1, 32),
    (131072, 4, 32),
    (131072, 16, 32),
    (131072, 128, 32),
    (131072, 512, 32),
    (131072, 600, 8),
    (131072, 600, 32),
    (131072, 1024, 8),
    (131072, 1024, 32),
    (524288, 1, 32),
    (524288, 16, 32),
    (524288, 128, 32),
]
TOKENS, HIDDEN, INTERMEDIATE, EPS = 32768, 4096, 14336, 1e-5
CHUNK = 16384  # tokens that the engine projects at a time
MATMUL, MATMUL_FLOPS = 8192, 2 * 8192**3
CEILINGS = ("matmul", "copy", "read")
SM80 = "ours, sm_80"
KERNELS = ("context_sm90", "query_sm90", "context_sm80")  # beside what "ours" and SM80 are
OPS = "star_attention.ops.cuda"
GRAPH_MS, GRAPH_CALLS = 2.0, 50  # a graph of a row's fastest contender lasts about so long

Call = Callable[[], object]


# Timing


@dataclass
class Row:
    """Median milliseconds of each contender, by name."""

    shape: Mapping[str, int | str]
    work: float  # floating-point operations or bytes
    unit: str  # TFLOP/s, TB/s or µs
    milliseconds: dict[str, float]

    def rate(self, name: str) -> float:
        return self.work / self.milliseconds[name] * 1e-9  # per second, in 10^12

    def fastest(self, who: str) -> float | None:
        """Milliseconds of a contender, or of the best of "ours", "peers" or "ceiling"."""
        times = (ms for name, ms in self.milliseconds.items() if who in (name, group(name)))
        return min(times, default=None)


def group(name: str) -> str:
    if name in ("ours", SM80, *KERNELS):
        return name
    return "ceiling" if name in CEILINGS else "peers"


class Timer:
    def __init__(
        self, rounds: int, window_ms: float, pause_s: float, groups: Container[str] | None = None
    ) -> None:
        """`groups`: those whose contenders are timed, all if None."""
        self.rounds, self.window_ms, self.pause_s = rounds, window_ms, pause_s
        self.groups = groups

    def row(
        self, shape: Mapping[str, int | str], work: float, unit: str, calls: dict[str, Call]
    ) -> Row:
        if self.groups is not None:
            calls = {name: call for name, call in calls.items() if group(name) in self.groups}
        times = self.median_ms(runnable(calls))
        if "matmul" in times:
            times["matmul"] *= work / MATMUL_FLOPS
        return Row(shape, work, unit, times)

    def median_ms(self, calls: dict[str, Call]) -> dict[str, float]:
        fastest = min((min(gaps_ms(call, 3)) for call in calls.values()), default=GRAPH_MS)
        count = max(1, min(GRAPH_CALLS, int(GRAPH_MS / fastest)))
        if count > 1:
            calls = {name: repeated(name, call, count) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name in random.sample(list(calls), len(calls)):  # nobody always follows the hottest
                time.sleep(self.pause_s)
                times[name] += self._window(calls[name])
        return {name: statistics.median(values) / count for name, values in times.items()}

    def _window(self, call: Call) -> list[float]:
        call()
        [once] = gaps_ms(call, 1)
        return gaps_ms(call, max(3, min(200, round(self.window_ms / once))))


def gaps_ms(call: Call, count: int) -> list[float]:
    """Milliseconds of each of `count` calls in a row."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def repeated(name: str, call: Call, count: int) -> Call:
    """`count` calls as one CUDA graph, or one after the other where capture fails."""

    def calls() -> None:
        for _ in range(count):
            call()

    graph = torch.cuda.CUDAGraph()
    try:
        # A failed capture leaves torch's capture stream current; the outer context restores ours.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            calls()
    except RuntimeError as error:
        note_missing(f"a CUDA graph of {name}", error)
        return calls
    return graph.replay


def runnable(calls: dict[str, Call]) -> dict[str, Call]:
    """The calls that work here; says why others do not, once each."""
    found = {}
    for name, call in calls.items():
        try:
            call()
            torch.cuda.synchronize()
        except (ImportError, AttributeError, OSError, RuntimeError, ValueError) as error:
            note_missing(name, error)
        else:
            found[name] = call
    return found


def note_missing(what: str, error: Exception) -> None:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if what not in _missing:
        print(f"without {what}: {reason[:150]}")
    _missing[what] = reason


_missing: dict[str, str] = {}


# Ceilings

READ_THREADS, READ_LOADS = 256, 8
READ_SOURCE = f"""
extern "C" __global__ void __launch_bounds__({READ_THREADS})
    read_all(const uint4* in, unsigned* out) {{
  in += blockIdx.x * {READ_LOADS * READ_THREADS}ll + threadIdx.x;
  uint4 v[{READ_LOADS}];
#pragma unroll
  for (int i = 0; i < {READ_LOADS}; ++i) v[i] = __ldg(in + i * {READ_THREADS});
  unsigned sum = 0;
#pragma unroll
  for (int i = 0; i < {READ_LOADS}; ++i) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  if (sum == 0x2545f491) *out = sum;  // keeps the loads: the compiler cannot rule it out
}}
"""


def device_read(data: torch.Tensor) -> Call:
    """Reads data, a multiple of 32 KiB, and writes nothing."""
    sink = torch.empty(1, dtype=torch.int32, device="cuda")
    blocks, rest = divmod(data.nbytes, READ_THREADS * READ_LOADS * 16)
    assert rest == 0

    def call() -> None:
        import cupy

        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            read_kernel()((blocks,), (READ_THREADS,), (data.data_ptr(), sink.data_ptr()))

    return call


@functools.cache
def read_kernel() -> Callable[..., None]:
    import cupy

    return cupy.RawKernel(READ_SOURCE, "read_all")


def device_copy(moved: int) -> Call:
    """Reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda").random_()
    return partial(torch.empty_like(source).copy_, source)


def matmul() -> Call:
    a, b, c = (randn(MATMUL, MATMUL) for _ in range(3))
    return partial(torch.matmul, a, b, out=c)


def ceilings(timer: Timer) -> dict[str, float]:
    """TFLOP/s of an 8192³ bf16 matmul, TB/s of a copy and a read of 4 GiB."""
    size = 2**32
    calls = {
        "matmul": matmul(),
        "copy": device_copy(2 * size),
        "read": device_read(torch.empty(size, dtype=torch.uint8, device="cuda").random_()),
    }
    work = {"matmul": MATMUL_FLOPS, "copy": 2 * size, "read": size}
    units = {"matmul": "tflops", "copy": "tbps", "read": "tbps"}
    times = timer.median_ms(runnable(calls))
    return {f"{name}_{units[name]}": work[name] / ms * 1e-9 for name, ms in times.items()}


# Contenders


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def imported(module: str, function: str, *args: object, **kwargs: object) -> Call:
    """A call of a package that may be missing."""
    return lambda: getattr(importlib.import_module(module), function)(*args, **kwargs)


def in_turn(calls: list[Call]) -> Call:
    return lambda: [call() for call in calls]


def random_pages(count: int) -> torch.Tensor:
    return torch.randperm(count, device="cuda").int()


def ours(
    q: torch.Tensor, tokens: int, kv_heads: int, kernel: str, window: int | None = None
) -> Call:
    """Attention of q, the last of `tokens` tokens, to their pages."""
    options = {}
    if window is not None:
        diagonal = torch.arange(tokens - len(q), tokens, dtype=torch.int32, device="cuda")
        options["starts"] = (diagonal - (window - 1)).clamp_(0)
    return imported(
        OPS,
        "paged_attention",
        q,
        randn(tokens // PAGE, 2, kv_heads, PAGE, HEAD_DIM),
        random_pages(tokens // PAGE)[None],
        torch.tensor([0, len(q)], dtype=torch.int32, device="cuda"),
        torch.tensor([tokens], dtype=torch.int32, device="cuda"),
        causal=True,
        scale=HEAD_DIM**-0.5,
        max_q_len=len(q),
        max_kv_len=tokens,
        kernel=kernel,
        **options,
    )


def flashinfer_prefill(
    q: torch.Tensor, kv: torch.Tensor, backend: str, window: int | None = None
) -> Call:
    return imported(
        "flashinfer",
        "single_prefill_with_kv_cache",
        q,
        *kv,
        causal=True,
        backend=backend,
        return_lse=True,
        window_left=-1 if window is None else window - 1,
    )


def sdpa(backend: SDPBackend, q: torch.Tensor, *shards: tuple[torch.Tensor, bool]) -> Call:
    """Attention of q to each (K and V, is_causal)."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x[None].transpose(1, 2)

    arguments = [(heads(q), heads(k), heads(v), causal) for (k, v), causal in shards]

    def call() -> None:
        with sdpa_kernel(backend):
            for q, k, v, causal in arguments:
                F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return call


def attention(
    phase: str, q: torch.Tensor, kv: torch.Tensor, *shards: tuple[torch.Tensor, bool]
) -> dict[str, Call]:
    """q [n, Hq, D] over kv [2, L, Hkv, D], which SDPA takes in `shards`."""
    return {
        "ours": ours(q, *kv.shape[1:3], "auto"),
        SM80: ours(q, *kv.shape[1:3], f"{phase}_sm80"),
        "FlashInfer FA3": flashinfer_prefill(q, kv, "fa3"),
        "FlashInfer FA2": flashinfer_prefill(q, kv, "fa2"),
        "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, q, *shards),
        "torch FA2": sdpa(SDPBackend.FLASH_ATTENTION, q, *shards),
    }


def attention_flops(rows: int, before: int, heads: int = Q_HEADS) -> float:
    return 4 * heads * HEAD_DIM * (before * rows + rows**2 / 2)


def merge(shards: int, tokens: int, dtype: torch.dtype) -> tuple[int, dict[str, Call]]:
    """Bytes and contenders of a merge to bf16."""
    o = randn(shards, tokens, Q_HEADS, HEAD_DIM, dtype=dtype)
    lse = randn(shards, tokens, Q_HEADS, dtype=torch.float32)
    calls = {"ours": imported(OPS, "merge_lse", o, lse, out_dtype=torch.bfloat16)}
    if dtype == torch.bfloat16:
        states = [x.transpose(0, 1).contiguous() for x in (o, lse)]
        calls["FlashInfer"] = imported("flashinfer", "merge_states", *states)
        if shards == 2:
            pair = (o[0], lse[0], o[1], lse[1])
            calls["FlashInfer merge_state"] = imported("flashinfer", "merge_state", *pair)
    return o.nbytes + lse.nbytes + 2 * o[0].numel() + lse[0].nbytes, calls


def rope_append() -> tuple[int, dict[str, Call]]:
    qkv = randn(TOKENS, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM)
    rotary = randn(TOKENS, HEAD_DIM, dtype=torch.float32)
    pool = randn(TOKENS // PAGE, 2, KV_HEADS, PAGE, HEAD_DIM)
    positions = torch.arange(TOKENS, dtype=torch.int32, device="cuda")
    slots = (random_pages(TOKENS // PAGE)[:, None] * PAGE + positions[:PAGE]).flatten()
    q = randn(TOKENS, Q_HEADS, HEAD_DIM)
    call = imported(OPS, "rope_append", qkv, positions, rotary, pool, slots, q)
    return 2 * qkv.nbytes + rotary.nbytes, {"ours": call}


def rms_norm_fp8() -> tuple[int, dict[str, Call]]:
    x, weight = randn(TOKENS, HIDDEN), randn(HIDDEN)
    return 3 * x.numel(), {"ours": partial(kernels().rms_norm, x, weight, EPS, kind="fp8")}


def silu_mul_fp8() -> tuple[int, dict[str, Call]]:
    gate_up = randn(TOKENS, 2 * INTERMEDIATE)
    return 5 * gate_up.numel() // 2, {"ours": partial(kernels().silu_mul, gate_up, kind="fp8")}


def quantize_rows() -> tuple[int, dict[str, Call]]:
    x = randn(TOKENS, HIDDEN)
    return 3 * x.numel(), {"ours": partial(kernels().quantize_rows, x, "fp8")}


def rms_norm() -> tuple[int, dict[str, Call]]:
    x, weight = randn(TOKENS, HIDDEN), randn(HIDDEN)
    return 2 * x.nbytes, {
        "ours": imported(OPS, "rms_norm", x, weight, EPS),
        "FlashInfer": imported("flashinfer.norm", "rmsnorm", x, weight, EPS),
        "torch": partial(F.rms_norm, x, (HIDDEN,), weight, EPS),
    }


def silu_mul() -> tuple[int, dict[str, Call]]:
    gate_up = randn(TOKENS, 2 * INTERMEDIATE)
    gate, up = gate_up.chunk(2, dim=-1)
    return 3 * gate_up.nbytes // 2, {
        "ours": imported(OPS, "silu_mul", gate_up),
        "FlashInfer": imported("flashinfer.activation", "silu_and_mul", gate_up),
        "torch": lambda: F.silu(gate) * up,
    }


# Phases


def context_rows(timer: Timer) -> Iterator[Row]:
    for block, anchor in CONTEXT_SHAPES:
        q, kv = randn(block, Q_HEADS, HEAD_DIM), randn(2, anchor + block, KV_HEADS, HEAD_DIM)
        shards = [(kv[:, anchor:], True)]
        if anchor:
            shards.append((kv[:, :anchor], False))
        calls = attention("context", q, kv, *shards) | {"matmul": matmul()}
        shape = {"B": block, "A": anchor}
        yield timer.row(shape, attention_flops(block, anchor), "TFLOP/s", calls)


def query_rows(timer: Timer) -> Iterator[Row]:
    for tokens, rows, heads in QUERY_SHAPES:
        q, kv = randn(rows, heads, HEAD_DIM), randn(2, tokens, heads // 4, HEAD_DIM)
        calls = attention("query", q, kv, (kv, False))
        if rows == 1:
            calls["FlashInfer decode"] = imported(
                "flashinfer", "single_decode_with_kv_cache", q[0], *kv, return_lse=True
            )
        if rows > 64:
            calls |= {name: ours(q, *kv.shape[1:3], name) for name in KERNELS}
        shape = {"L": tokens, "n": rows, "Hq": heads}
        if rows <= 16:
            yield timer.row(shape, kv.nbytes, "TB/s", calls | {"read": device_read(kv)})
        else:
            work = attention_flops(rows, tokens - rows, heads)
            yield timer.row(shape, work, "TFLOP/s", calls | {"matmul": matmul()})


def quantized_rows(timer: Timer) -> Iterator[Row]:
    for tokens, rows in itertools.product((131072, 524288), (1, 4, 16, 64, 128, 512)):
        if tokens * rows > 131072 * 512:
            continue
        q, pages = randn(rows, Q_HEADS, HEAD_DIM), tokens // PAGE
        pool = randn(1, pages, 2, KV_HEADS, PAGE, HEAD_DIM)
        order = torch.randperm(pages, device="cuda", dtype=torch.int32)
        starts = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
        lens = torch.tensor([tokens], dtype=torch.int32, device="cuda")
        sizes = {"causal": False, "scale": HEAD_DIM**-0.5, "max_q_len": rows, "max_kv_len": tokens}
        arguments = order[None], starts, lens
        calls = {"16 bits": imported(OPS, "paged_attention", q, pool[0], *arguments, **sizes)}
        counts = torch.full_like(order, PAGE)
        for kv_dtype in ("fp8", "int8"):
            copy = pool.clone()
            codes = ops.codes_of(copy, ops.code_dtype(kv_dtype))
            scales = torch.empty(codes.shape[:4], device="cuda")
            ops.quantize_pages(copy, codes, scales, torch.arange(pages).int().cuda(), counts)
            places = order // 2 * 4 + order % 2
            codes, scales = (each[0, places.long()].contiguous() for each in (codes, scales))
            calls[kv_dtype] = imported(
                OPS, "paged_attention", q, codes, *arguments, **sizes, kv_scales=scales
            )
        shape, work = {"L": tokens, "n": rows}, codes.nbytes
        yield timer.row(shape, work, "TB/s", calls | {"read": device_read(codes)})


def window_rows(timer: Timer) -> Iterator[Row]:
    for block, window in ((8192, 1024), (8192, 4096), (32768, 4096)):
        tokens = block + window
        q, kv = randn(block, Q_HEADS, HEAD_DIM), randn(2, tokens, KV_HEADS, HEAD_DIM)
        calls = {
            "ours": ours(q, tokens, KV_HEADS, "auto", window),
            SM80: ours(q, tokens, KV_HEADS, "context_sm80", window),
            "FlashInfer FA3": flashinfer_prefill(q, kv, "fa3", window),
            "FlashInfer FA2": flashinfer_prefill(q, kv, "fa2", window),
            "matmul": matmul(),
        }
        work = 4 * Q_HEADS * HEAD_DIM * block * window
        yield timer.row({"B": block, "W": window}, work, "TFLOP/s", calls)


def quantizing_rows(timer: Timer) -> Iterator[Row]:
    """16-bit bytes that are read and codes that are written, of 32 layers of 8192 tokens."""
    pool = randn(32, 64, 2, KV_HEADS, PAGE, HEAD_DIM)
    work = pool.nbytes * 3 // 2
    pages = torch.arange(64, dtype=torch.int32, device="cuda")
    calls = {}
    for kv_dtype in ("fp8", "int8"):
        codes = ops.codes_of(pool, ops.code_dtype(kv_dtype))
        scales = torch.empty(codes.shape[:4], device="cuda")
        tokens = torch.full_like(pages, PAGE)
        calls[kv_dtype] = imported(OPS, "quantize_pages", pool, codes, scales, pages, tokens)
    yield timer.row({"tokens": 8192}, work, "TB/s", calls | {"copy": device_copy(work)})


def bytes_rows(timer: Timer) -> Iterator[Row]:
    operators: dict[str, Callable[[], tuple[int, dict[str, Call]]]] = {"rope_append": rope_append}
    for dtype, shards in itertools.product((torch.float32, torch.bfloat16), (2, 4, 8)):
        name = f"merge_lse of {shards} {str(dtype).removeprefix('torch.')}"
        operators[name] = partial(merge, shards, TOKENS, dtype)
    operators |= {
        "rms_norm": rms_norm,
        "silu_mul": silu_mul,
        "rms_norm, fp8": rms_norm_fp8,
        "silu_mul, fp8": silu_mul_fp8,
        "quantize_rows, fp8": quantize_rows,
    }
    for name, operator in operators.items():
        work, calls = operator()
        yield timer.row({"operator": name}, work, "TB/s", calls | {"copy": device_copy(work)})


def merge_rows(timer: Timer) -> Iterator[Row]:
    for dtype, shards in itertools.product((torch.float32, torch.bfloat16), (2, 8)):
        work, calls = merge(shards, 1, dtype)
        shape = {"shards": shards, "partials": str(dtype).removeprefix("torch.")}
        yield timer.row(shape, work, "µs", calls)


def linear_rows(timer: Timer) -> Iterator[Row]:
    weights = [
        randn((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        randn(HIDDEN, Q_HEADS * HEAD_DIM),
        randn(2 * INTERMEDIATE, HIDDEN),
        randn(HIDDEN, INTERMEDIATE),
    ]
    work = sum(weight.nbytes for weight in weights)
    read = {"read": device_read(randn(work // 2))}
    for rows in (1, 2):
        pairs = [(randn(rows, weight.shape[1]), weight) for weight in weights]
        calls = {
            "ours": in_turn([imported(OPS, "linear", *pair) for pair in pairs]),
            "torch": in_turn([partial(F.linear, *pair) for pair in pairs]),
        }
        yield timer.row({"weights": "bf16", "n": rows}, work, "TB/s", calls | read)
    quantized = [kernels().quantize_rows(weight, "fp8") for weight in weights]
    work //= 2
    read = {"read": device_read(randn(work // 2))}
    for rows in (1, 2, 4, 8):
        pairs = [(randn(rows, weight.shape[1]), weight) for weight in quantized]
        scaled = [(kernels().quantize_rows(x, "fp8"), weight) for x, weight in pairs]
        calls = {
            "ours": in_turn([partial(project, *pair) for pair in pairs]),
            "torch": in_turn([partial(rowwise, *pair) for pair in scaled]),
        }
        yield timer.row({"weights": "fp8", "n": rows}, work, "TB/s", calls | read)


def kernels() -> Any:
    return importlib.import_module(OPS)


def project(x: torch.Tensor, weight: Any) -> torch.Tensor:
    """As the engine does with weights in FP8 and what is not quantised yet."""
    rows = kernels().quantize_rows(x, "fp8") if kernels().kind_of_rows(len(x), weight) else x
    return kernels().linear(rows, weight)


def rowwise(x: Any, weight: Any, fast: bool = True) -> torch.Tensor:
    """PyTorch's product of FP8 rows."""
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        x.scales[:, None],
        weight.scales[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def quantize_and(product: Callable[..., torch.Tensor], x: torch.Tensor, weight: Any) -> object:
    return product(kernels().quantize_rows(x, "fp8"), weight)


def gemm_rows(timer: Timer) -> Iterator[Row]:
    shapes = {  # out and in features
        "qkv": ((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        "out": (HIDDEN, Q_HEADS * HEAD_DIM),
        "gate, up": (2 * INTERMEDIATE, HIDDEN),
        "down": (HIDDEN, INTERMEDIATE),
    }
    for name, (features, width) in shapes.items():
        x, weight = randn(CHUNK, width), randn(features, width)
        rows, quantized = kernels().quantize_rows(x, "fp8"), kernels().quantize_rows(weight, "fp8")
        addend = randn(CHUNK, features) if name in ("out", "down") else None
        product = partial(kernels().linear, addend=addend, out=addend)
        calls = {
            "ours": partial(product, rows, quantized),
            "bf16": partial(product, x, weight),
            "rowwise": partial(rowwise, rows, quantized),
            "precise": partial(rowwise, rows, quantized, fast=False),
            "matmul": matmul(),
        }
        if name == "out":  # attention's output comes in bf16
            calls["ours"] = partial(quantize_and, product, x, quantized)
        yield timer.row({"projection": name}, 2 * CHUNK * features * width, "TFLOP/s", calls)


@dataclass(frozen=True)
class Phase:
    rows: Callable[[Timer], Iterator[Row]]
    ratios: dict[str, tuple[str, str]]  # title: whose time is divided by whose


PHASES = {
    "context": Phase(
        context_rows,
        {
            "ours / best peer": ("peers", "ours"),
            "ours / matmul": ("matmul", "ours"),
            "sm_80 / FlashInfer FA2": ("FlashInfer FA2", SM80),
        },
    ),
    "query": Phase(
        query_rows,
        {
            "ours / best peer": ("peers", "ours"),
            "ours / ceiling": ("ceiling", "ours"),
            "time / FlashInfer FA2 time": ("ours", "FlashInfer FA2"),
            "sm_80 / FlashInfer FA2": ("FlashInfer FA2", SM80),
        },
    ),
    "windows": Phase(
        window_rows,
        {"ours / best peer": ("peers", "ours"), "ours / matmul": ("matmul", "ours")},
    ),
    "quantized": Phase(
        quantized_rows,
        {"fp8 / read": ("read", "fp8"), "int8 / read": ("read", "int8"), "x": ("16 bits", "fp8")},
    ),
    "quantizing": Phase(quantizing_rows, {"fp8 / copy": ("copy", "fp8")}),
    "bytes": Phase(
        bytes_rows,
        {"ours / best peer": ("peers", "ours"), "ours / copy": ("copy", "ours")},
    ),
    "merge": Phase(merge_rows, {"ours / best peer": ("peers", "ours")}),
    "linear": Phase(
        linear_rows,
        {"ours / best peer": ("peers", "ours"), "ours / read": ("read", "ours")},
    ),
    "gemm": Phase(
        gemm_rows, {"ours / bf16": ("bf16", "ours"), "ours / matmul": ("matmul", "ours")}
    ),
}


# Output


def print_table(rows: list[Row], ratios: dict[str, tuple[str, str]]) -> None:
    names = dict.fromkeys(name for row in rows for name in row.milliseconds)
    names = sorted(names, key=CEILINGS.__contains__)  # ceilings last
    header = [", ".join(rows[0].shape), "unit", *names, *ratios]
    print(f"\n| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    for row in rows:
        cells = [", ".join(map(str, row.shape.values())), row.unit]
        cells += [cell(row, name) if name in row.milliseconds else "" for name in names]
        for pair in ratios.values():
            a, b = map(row.fastest, pair)
            cells.append(f"{a / b:.2f}" if a and b else "")
        print(f"| {' | '.join(cells)} |")


def cell(row: Row, name: str) -> str:
    ms = row.milliseconds[name]
    if row.unit == "µs":
        return f"{ms * 1e3:.2f}"
    digits = 0 if row.unit == "TFLOP/s" else 2
    return f"{row.rate(name):.{digits}f} ({ms:.3f} ms)"


def environment() -> dict[str, str]:
    found = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }
    try:
        import flashinfer as package

        found["flashinfer"] = package.__version__
    except ImportError:
        pass
    fields = ["driver_version", "clocks.max.sm", "clocks.sm", "power.limit"]
    try:
        query = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"],
            capture_output=True,
            text=True,
            check=True,
        )
        found |= dict(zip(fields, query.stdout.strip().split(", "), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError):
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--no-peers", action="store_true", help="time what is taken by itself and ceilings only"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kernel")
    parser.add_argument("--window", type=float, default=80.0, help="ms a kernel runs in a turn")
    parser.add_argument("--pause", type=float, default=0.15, help="s before a turn")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")

    groups = ("ours", SM80, "ceiling") if options.no_peers else None
    timer = Timer(options.rounds, options.window, options.pause, groups)
    report: dict = {"environment": environment(), "ceilings": ceilings(timer), "missing": _missing}
    for part in ("environment", "ceilings"):
        texts = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in report[part].items()}
        print(", ".join(f"{name} {text}" for name, text in texts.items()))
    for name in options.phases:
        phase = PHASES[name]
        rows = list(phase.rows(timer))
        print_table(rows, phase.ratios)
        report[name] = [
            asdict(row) | {"tera_per_second": {name: row.rate(name) for name in row.milliseconds}}
            for row in rows
        ]
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
