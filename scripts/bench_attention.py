#!/usr/bin/env python3
"""Benchmark of the attention kernels against their peers and the GPU's ceilings, in one run.

Prints one table a phase and saves everything as JSON:

    python scripts/bench_attention.py --output benchmarks/results/attention_h100.json

Phase 1 rows are blocks of B tokens behind an anchor of A tokens, causal, in TFLOP/s of
4 Hq D (A B + B² / 2) floating-point operations. Our kernels read paged K and V, the peers
contiguous ones. cuDNN and torch's FA2 cannot align a causal mask bottom-right: they make two calls,
whose merge is not counted. Kernels are timed in turns, each after a pause in which the clocks
recover, and the median of all times counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 128
CONTEXT_SHAPES = [  # B, A
    (4096, 4096),
    (8192, 8192),
    (32768, 4096),
    (32768, 32768),
    (8192, 0),
    (32768, 0),
]
OURS, OURS_SM80 = "sm_90a (ours)", "sm_80 (ours)"

Call = Callable[[], object]


@dataclass
class Timing:
    """Median milliseconds of each contender, by name."""

    shape: dict[str, int]
    work: float  # floating-point operations or bytes
    unit: str
    milliseconds: dict[str, float] = field(default_factory=dict)

    def rate(self, name: str) -> float | None:
        ms = self.milliseconds.get(name)
        return self.work / ms * 1e-9 if ms else None  # per second, in 10^12


class Timer:
    def __init__(self, rounds: int, window_ms: float, pause_s: float) -> None:
        self.rounds, self.window_ms, self.pause_s = rounds, window_ms, pause_s

    def median_ms(self, calls: dict[str, Call]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(self.rounds):
            for name in order:
                time.sleep(self.pause_s)
                times[name] += self._window(calls[name])
            order = order[1:] + order[:1]  # nobody always follows the hottest
        return {name: statistics.median(values) for name, values in times.items()}

    def _window(self, call: Call) -> list[float]:
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        count = max(3, min(200, round(self.window_ms / start.elapsed_time(end))))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def ceilings(timer: Timer) -> dict[str, float]:
    """TFLOP/s of an 8192³ bf16 matmul, TB/s of a device copy (bytes read and written)."""
    a, b, c = (randn(8192, 8192) for _ in range(3))
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    ms = timer.median_ms(
        {
            "matmul": lambda: torch.matmul(a, b, out=c),
            "copy": lambda: target.copy_(source),
        }
    )
    return {
        "matmul_tflops": 2 * 8192**3 / ms["matmul"] * 1e-9,
        "copy_tbps": 2 * source.numel() / ms["copy"] * 1e-9,
    }


# Phase 1


def paged(block: int, anchor: int, kernel: str) -> Call:
    from star_attention.ops import cuda

    pages = -(-(anchor + block) // PAGE)
    arguments = {
        "q": randn(block, Q_HEADS, HEAD_DIM),
        "kv_pool": randn(pages, 2, KV_HEADS, PAGE, HEAD_DIM),
        "page_table": torch.randperm(pages, device="cuda").int()[None],
        "cu_seqlens_q": torch.tensor([0, block], dtype=torch.int32, device="cuda"),
        "kv_lens": torch.tensor([anchor + block], dtype=torch.int32, device="cuda"),
        "causal": True,
        "scale": HEAD_DIM**-0.5,
        "max_q_len": block,
        "max_kv_len": anchor + block,
    }
    return lambda: cuda.paged_attention(**arguments, kernel=kernel)


def flashinfer(block: int, anchor: int, backend: str) -> Call:
    from flashinfer import single_prefill_with_kv_cache

    q = randn(block, Q_HEADS, HEAD_DIM)
    k, v = (randn(anchor + block, KV_HEADS, HEAD_DIM) for _ in range(2))
    return lambda: single_prefill_with_kv_cache(
        q, k, v, causal=True, backend=backend, return_lse=True
    )


def torch_sdpa(block: int, anchor: int, backend: SDPBackend) -> Call:
    def heads(tokens: int, count: int) -> torch.Tensor:
        return randn(1, tokens, count, HEAD_DIM).transpose(1, 2)

    q = heads(block, Q_HEADS)
    own = heads(block, KV_HEADS), heads(block, KV_HEADS)
    anchors = (heads(anchor, KV_HEADS), heads(anchor, KV_HEADS)) if anchor else None

    def call() -> None:
        with sdpa_kernel(backend):
            if anchors:
                F.scaled_dot_product_attention(q, *anchors, enable_gqa=True)
            F.scaled_dot_product_attention(q, *own, is_causal=True, enable_gqa=True)

    return call


def context_contenders(block: int, anchor: int) -> dict[str, Callable[[], Call]]:
    return {
        OURS: lambda: paged(block, anchor, "context_sm90"),
        OURS_SM80: lambda: paged(block, anchor, "context_sm80"),
        "FlashInfer FA3": lambda: flashinfer(block, anchor, "fa3"),
        "FlashInfer FA2": lambda: flashinfer(block, anchor, "fa2"),
        "cuDNN": lambda: torch_sdpa(block, anchor, SDPBackend.CUDNN_ATTENTION),
        "torch FA2": lambda: torch_sdpa(block, anchor, SDPBackend.FLASH_ATTENTION),
    }


def context_rows(timer: Timer) -> Iterable[Timing]:
    a = randn(8192, 8192)
    b = torch.empty_like(a)
    for block, anchor in CONTEXT_SHAPES:
        calls = runnable(context_contenders(block, anchor))
        row = Timing(
            {"B": block, "A": anchor},
            4 * Q_HEADS * HEAD_DIM * (anchor * block + block**2 / 2),
            "TFLOP/s",
        )
        # The matmul in the same turns: clocks differ from minute to minute.
        times = timer.median_ms(calls | {"matmul": lambda: torch.matmul(a, a, out=b)})
        times["matmul"] *= row.work / (2 * 8192**3)
        row.milliseconds = times
        yield row


# Output


def runnable(makers: dict[str, Callable[[], Call]]) -> dict[str, Call]:
    """The calls that work here; says why others do not, once each."""
    calls = {}
    for name, make in makers.items():
        try:
            call = make()
            call()
            torch.cuda.synchronize()
        except (ImportError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if name not in _missing:
                print(f"without {name}: {reason[:150]}")
            _missing[name] = reason
        else:
            calls[name] = call
    return calls


_missing: dict[str, str] = {}


def print_table(rows: list[Timing]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row.milliseconds))
    keys = list(rows[0].shape)
    print(f"\n| {', '.join(keys)} | {' | '.join(names)} | ours / best peer | ours / matmul |")
    print("|---" * (len(names) + 3) + "|")
    for row in rows:
        rates = [row.rate(name) for name in names]
        cells = ["" if rate is None else f"{rate:.0f}" for rate in rates]
        ours = row.rate(OURS)
        peers = [
            rate
            for name, rate in zip(names, rates, strict=True)
            if rate and name not in (OURS, OURS_SM80, "matmul")
        ]
        ratios = [
            f"{ours / best:.2f}" if ours and best else ""
            for best in (max(peers, default=None), row.rate("matmul"))
        ]
        print(f"| {', '.join(map(str, row.shape.values()))} | {' | '.join(cells + ratios)} |")


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


PHASES = {"context": context_rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kernel")
    parser.add_argument("--window", type=float, default=80.0, help="ms a kernel runs in a turn")
    parser.add_argument("--pause", type=float, default=0.15, help="s before a turn")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")

    timer = Timer(options.rounds, options.window, options.pause)
    report: dict = {"environment": environment(), "ceilings": ceilings(timer)}
    for part in report.values():
        texts = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in part.items()}
        print(", ".join(f"{name} {text}" for name, text in texts.items()))
    for phase in options.phases:
        rows = list(PHASES[phase](timer))
        print_table(rows)
        report[phase] = [
            asdict(row) | {"tera_per_second": {name: row.rate(name) for name in row.milliseconds}}
            for row in rows
        ]
    report["missing"] = _missing
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
