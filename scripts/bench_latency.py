#!/usr/bin/env python3
"""Time to first token of star, ring and dense attention, with the same model code and kernels, on
the ranks that mpirun starts, or on several numbers of them one after the other:

    python scripts/bench_latency.py --ranks 2 --lengths 64K 128K --output results.json
    python scripts/bench_latency.py --ranks 2 4 --methods broadcast ring dense --exact-up-to 256K \\
        --lengths 16K 32K 64K 128K 256K 512K 1M --block-size quarter 32K --output results.json
    python scripts/bench_latency.py --compare results.json
    python scripts/bench_latency.py --plot results.json --to docs/images

Weights are random, made on the GPU, in Llama-3.1-8B's or 70B's shape, or those of --model; times do
not depend on them, but for how many pages `selected` fetches. A method runs once on a short
context, then once for each length, and star for each block size: phase 1, a question of 64 tokens,
and decode steps (the median counts). Model FLOPs are 2 a weight and token, without embedding and
lm_head, and 4 Hq D a layer and pair of query and key token; their rate is that of the busiest rank,
compared with an 8192³ matmul that the same GPU ran just before. Predicted is phase 1 by the plan at
rates measured on H200s (`star-attn plan`).
Results are added to those in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from star_attention.cli.options import parse_tokens
from star_attention.config import KV_DTYPES, StarConfig
from star_attention.distributed import Communicator, default_communicator
from star_attention.distributed.launch import run_ranks
from star_attention.engines.base import ModelEngine
from star_attention.engines.loader import dummy_engine, load_engine, star_ranks
from star_attention.engines.options import EngineOptions
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model
from star_attention.models.config import SHAPES, ModelConfig
from star_attention.models.quantization import QUANTIZATIONS
from star_attention.plan import make_plan
from star_attention.predict import predict
from star_attention.runtime.leader import Leader, lead_together
from star_attention.runtime.orders import Ask, Decode, QuestionPart, Release, Report, Wait
from star_attention.runtime.requests import Context
from star_attention.runtime.worker import Worker

METHODS = {
    "broadcast": {"anchor_mode": "broadcast"},
    "selected": {"selected_pages": 16},
    "selected-64": {"selected_pages": 64},
    "local": {"anchor_mode": "local"},
    "recompute": {"anchor_mode": "recompute"},
    "ring": {"attention": "ring"},
    "dense": {"attention": "dense"},
}
LABELS = {
    "broadcast": "star (ours)",
    "selected": "star, 16 selected pages",
    "selected-64": "star, 64 selected pages",
    "local": "star, anchor once a rank",
    "recompute": "star as in the paper",
    "ring": "ring (exact)",
    "dense": "dense (exact)",
}
EXACT = ("ring", "dense")
SELECTED_ANCHOR = 512  # tokens
QUESTION_TOKENS = 64
# Star Attention, arXiv 2411.17116v3: tables 1 and 5, blocks of a quarter up to 128K, of 32K beyond.
PAPER_SPEED_UPS = {
    1 << 14: 1.1,
    1 << 15: 1.2,
    1 << 16: 1.8,
    1 << 17: 2.7,
    1 << 18: 10.8,
    1 << 20: 16.9,
}
# What phase 1 spends its time on, by the names of kernels.
PARTS = {
    "attention": r"context_attention|context_sm80|query_|merge_lse",
    "GEMMs": r"nvjet|gemm|cutlass|xmma|linear",
    "selection": r"pool_rows|score_pages|choose|locate_kernel|fetch_kernel|page_means",
    "transfers (beside the others)": r"nccl",
    "norms, RoPE, SiLU": r".",
}


def part_of(kernel: str) -> str:
    """The part of `PARTS` that a kernel belongs to."""
    return next(part for part, names in PARTS.items() if re.search(names, kernel))


def token_ids(model: ModelConfig, length: int) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, model.vocab_size, length)
    return ids.astype(np.int32)


def star_config(method: str, length: int, block_size: int | None) -> StarConfig:
    """Of blocks of so many tokens, or, with None, of a quarter of the context."""
    block_size = None if method in EXACT else min(block_size or length // 4, length)
    selects = "selected_pages" in METHODS[method]
    anchor_size = min(SELECTED_ANCHOR, block_size) if selects else None
    return StarConfig(block_size=block_size, anchor_size=anchor_size, **METHODS[method])


def configurations(
    methods: Sequence[str],
    length: int,
    block_sizes: Sequence[int | None],
    exact_up_to: int | None,
) -> dict[StarConfig, str]:
    """What is measured at a length, and the method's name; nothing twice."""
    return {
        star_config(method, length, block_size): method
        for method in methods
        for block_size in block_sizes
        if method not in EXACT or exact_up_to is None or length <= exact_up_to
    }


def measure(
    leader: Leader,
    worker: Worker,
    method: str,
    length: int,
    config: StarConfig,
    decode_tokens: int,
    tp: int,
) -> dict[str, Any] | None:
    """One row of the table; None if the plan does not fit into memory."""
    comm, engine = worker.comm, worker.engine
    ids = token_ids(engine.config, length)
    leader.execute(Report(reset=True))
    try:
        before = time.perf_counter()
        context = leader.encode(ids, config)
        phase1 = time.perf_counter() - before
    except UserError as error:
        if comm.world.rank == 0:
            print(f"{length} tokens, {method}: {error}", flush=True)
        return None
    ranks = leader.execute(Report())
    query, decode = generate(leader, context, ids[:QUESTION_TOKENS], decode_tokens)
    leader.release(context)
    flops = max(cost.flops(engine.config) for cost in context.plan.rank_costs) / tp
    phases = [rank["phases"]["context"] for rank in ranks]
    return {
        "method": method,
        "context": length,
        "block_size": context.plan.block_size,
        "ranks": comm.size,
        "tp": tp,
        "phase1_s": phase1,
        "predicted_s": predict(context.plan).seconds / tp,
        "query_s": query,
        "first_token_s": phase1 + query,
        "decode_ms": decode * 1e3,
        "busiest_gpu_pflop": flops / 1e15,
        "tflops": flops / phase1 / 1e12,
        "waiting_s": max(phase["wait_seconds"] for phase in phases),
        "sent_gib": max(phase["traffic"]["sent"] for phase in phases) / 2**30,
        "peak_memory_gib": max(rank["peak_memory_bytes"] for rank in ranks) / 2**30,
    }


def breakdown(leader: Leader, worker: Worker, length: int, config: StarConfig) -> dict[str, float]:
    """Seconds of phase 1 by kind of kernel, of the busiest rank, once more."""
    from torch.profiler import ProfilerActivity, profile

    model = worker.engine.config
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        context = leader.encode(token_ids(model, length), config)
        leader.release(context)
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        seconds[part_of(event.key)] += event.self_device_time_total / 1e6
    costs = [cost.flops(model) for cost in context.plan.rank_costs]
    return worker.comm.gather_objects(seconds)[costs.index(max(costs))]


def generate(
    leader: Leader, context: Context, question: np.ndarray, count: int
) -> tuple[float, float]:
    """Seconds of the question's pass and of a decode step, on this rank: medians."""
    number, keeper = 1 << 30, context.plan.num_ranks - 1
    queries, steps = [], []
    for asked in range(6):  # the first warms up; the second captures the graph of a step
        leader.execute(Wait())
        begin = time.perf_counter()
        leader.execute(Ask((QuestionPart(number, context.number, question, keeper),)))
        queries.append(time.perf_counter() - begin)
        for _ in range(count if asked == 1 else 2):
            begin = time.perf_counter()
            leader.execute(Decode((number,), (0,), (keeper,)))
            steps.append(time.perf_counter() - begin)
        leader.execute(Release(questions=(number,)))
    return statistics.median(queries[1:]), statistics.median(steps[2:])


def matmul_tflops(comm: Communicator) -> float:
    """The slowest rank's rate of 8192³ matmuls in bf16, all ranks at it together."""
    import torch

    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    times = []
    comm.gather_objects(None)
    for _ in range(60):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.matmul(a, b, out=out)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(comm.gather_objects(2 * 8192**3 / statistics.median(times) * 1e-9))


def read_tbps(comm: Communicator) -> float:
    """The slowest rank's rate of summing 4 GiB."""
    import torch

    data = torch.ones(1 << 30, device="cuda")
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(comm.gather_objects(data.nbytes / statistics.median(times) * 1e-9))


def environment(merge: str) -> dict[str, str]:
    import torch

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "merge": merge,
    }


COLUMNS = {
    "method": "{}",
    "context": "{:,}",
    "block_size": "{:,}",
    "ranks": "{}",
    "phase1_s": "{:.3f}",
    "predicted_s": "{:.3f}",
    "first_token_s": "{:.3f}",
    "decode_ms": "{:.2f}",
    "tflops": "{:.0f}",
    "of_matmul": "{:.2f}",
    "waiting_s": "{:.3f}",
    "sent_gib": "{:.2f}",
    "peak_memory_gib": "{:.1f}",
}


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for row in rows:
        print(format_row(row))


def format_row(row: dict[str, Any]) -> str:
    return f"| {' | '.join(form.format(row[name]) for name, form in COLUMNS.items())} |"


def make_engine(options: argparse.Namespace, comm: Communicator) -> ModelEngine:
    engine_options = EngineOptions(
        "cuda",
        options.dtype,
        kv_cache_gib=options.kv_cache_gib,
        merge=options.merge,
        tp=options.tp,
        quantization=options.quantization,
        kv_dtype=options.kv_dtype,
    )
    page = StarConfig.tokens_per_block
    if options.model:
        return load_engine(find_model(options.model), comm, page, engine_options)
    shape = SHAPES[options.shape]
    if options.layers:
        shape = replace(shape, num_layers=options.layers)
    return dummy_engine(shape, comm, page, engine_options)


def run(options: argparse.Namespace) -> None:
    world = default_communicator()
    comm = star_ranks(world, options.tp)
    engine = make_engine(options, comm)
    leader, worker = lead_together(engine, comm)
    rows: list[dict[str, Any]] = []
    result = {
        "shape": Path(options.model).name if options.model else options.shape,
        "dtype": options.dtype,
        "quantization": engine.quantization,
        "kv_dtype": options.kv_dtype,
        "config": asdict(engine.config),
        "environment": environment(options.merge),
        "read_tbps": read_tbps(world),
        "rows": rows,
    }
    earlier = json.loads(options.output.read_text()) if options.output.exists() else []
    for method in options.methods:
        config = replace(star_config(method, 16384, 4096), kv_dtype=options.kv_dtype)
        measure(leader, worker, method, 16384, config, 2, options.tp)
    for length in options.lengths:
        which = configurations(options.methods, length, options.block_size, options.exact_up_to)
        for each, method in which.items():
            config = replace(each, kv_dtype=options.kv_dtype)
            ceiling = matmul_tflops(world)
            row = measure(leader, worker, method, length, config, options.decode_tokens, options.tp)
            if row is None:
                continue
            if length == options.breakdown:
                row["breakdown"] = breakdown(leader, worker, length, config)
            row["matmul_tflops"] = ceiling
            row["of_matmul"] = row["tflops"] / ceiling
            rows.append(row)
            if world.rank == 0:
                print(format_row(row), flush=True)
                save(options.output, [*earlier, result])
    if world.rank == 0:
        print_table(rows)
        compare([result])


def run_each(options: argparse.Namespace) -> None:
    """Runs this command for each number of ranks, and compares all that are in the file then."""
    for ranks in options.ranks:
        print(f"\n{ranks} ranks", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--ranks"]
        if run_ranks(command, ranks * options.tp, oversubscribe=True):
            sys.exit(f"the run on {ranks} ranks failed")
    compare(json.loads(options.output.read_text()))


def compare(runs: list[dict[str, Any]]) -> None:
    """Prints star beside the exact methods at each number of ranks, length and block size; of
    several runs the latest. ~: ring by its FLOPs at the rate of the longest that was measured."""
    found: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            key = run["shape"], row["ranks"], row["tp"], row["context"]
            if row["method"] == "broadcast":
                found[(*key, row["block_size"])] = row
            elif row["method"] in EXACT:
                found[(*key, row["method"])] = row
    names = "star, s", "ring, s", "dense, s", "star / ring", "waited", "sent, GiB", "ring's"
    header = ["shape", "ranks", "tokens", "block", *names]
    print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for key in sorted(each for each in found if each[-1] not in EXACT):
        (shape, ranks, tp, length, block), star = key, found[key]
        exact = {name: found.get((*key[:-1], name)) for name in EXACT}
        ring, dense = (row and row["phase1_s"] for row in exact.values())
        measured = ring is not None
        if not measured:
            same = [row for each, row in found.items() if each[:3] == key[:3]]
            model = next(run["config"] for run in runs if run["shape"] == shape)
            ring = ring_phase1(same, ModelConfig.from_dict(model), length)
        cells = [
            shape,
            f"{ranks}, tp {tp}" if tp > 1 else str(ranks),
            f"{length:,}",
            f"{block:,}",
            f"{star['phase1_s']:.3f}",
            "" if ring is None else f"{'' if measured else '~'}{ring:.3f}",
            "" if dense is None else f"{dense:.3f}",
            "" if ring is None else f"{star['phase1_s'] / ring:.3f}",
            f"{star['waiting_s'] / star['phase1_s']:.1%}",
            f"{star['sent_gib']:.2f}",
            f"{exact['ring']['sent_gib']:.2f}" if measured else "",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def ring_phase1(rows: list[dict[str, Any]], shape: ModelConfig, length: int) -> float | None:
    """Seconds of a ring's phase 1 at a length, by its FLOPs at the rate of its longest one."""
    rings = [row for row in rows if row["method"] == "ring"]
    if not rings:
        return None
    last = max(rings, key=lambda row: row["context"])
    plan = make_plan(length, StarConfig(attention="ring"), last["ranks"], shape)
    flops = max(cost.flops(shape) for cost in plan.rank_costs) / last["tp"]
    return flops / last["tflops"] / 1e12


def save(path: Path, runs: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(runs, indent=2) + "\n")
    os.replace(unfinished, path)


def plot(results: Path, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    runs = json.loads(results.read_text())
    runs = [run for run in runs if run["shape"] == runs[0]["shape"]]
    rows = [row for run in runs for row in run["rows"]]
    shape = ModelConfig.from_dict(runs[0]["config"])
    counts = Counter(row["ranks"] for row in rows)
    usual, most = max(counts, key=counts.__getitem__), max(counts)
    of_usual = [row for row in rows if row["ranks"] in (1, usual)]
    gpu = f"{runs[0]['shape']}, {runs[0]['dtype']}, {{}} x {runs[0]['environment']['gpu']}"
    folder.mkdir(parents=True, exist_ok=True)
    plot_first_token(of_usual, shape, gpu.format(usual), folder / "first_token.png")
    plot_speed_up(rows, shape, gpu.format(f"1 to {most}"), folder / "speed_up.png")
    plot_scaling(rows, gpu.format(f"1 to {most}"), folder / "scaling.png")
    plot_breakdown(rows, gpu, folder / "phase1.png")


def ring_by_flops(rows: list[dict[str, Any]], shape: ModelConfig) -> dict[int, float]:
    """Time to first token of ring for the lengths that it was not measured at, from the longest one
    that it was measured at on: its FLOPs at that one's rate."""
    rings = [row for row in rows if row["method"] == "ring"]
    if not rings:
        return {}
    last = max(rings, key=lambda row: row["context"])
    seconds = {
        length: ring_phase1(rings, shape, length)
        for length in sorted({row["context"] for row in rows})
        if length > last["context"]
    }
    return {last["context"]: last["first_token_s"], **seconds} if seconds else {}


def first_tokens(rows: list[dict[str, Any]], method: str) -> dict[int, float]:
    """Seconds to the first token by length, on as many ranks as were measured, in the smallest
    blocks."""
    rows = [row for row in rows if row["method"] == method]
    most = max((row["ranks"] for row in rows), default=0)
    rows = sorted((row for row in rows if row["ranks"] == most), key=lambda r: -r["block_size"])
    return dict(sorted({row["context"]: row["first_token_s"] for row in rows}.items()))


def plot_first_token(
    rows: list[dict[str, Any]], shape: ModelConfig, title: str, path: Path
) -> None:
    """Time to first token against the length, by method, both logarithmic."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 4.8))
    for method, label in LABELS.items():
        points = first_tokens(rows, method)
        if points:
            if all(row["ranks"] == 1 for row in rows if row["method"] == method):
                label += ", one GPU"
            style = "--" if method in ("ring", "dense") else "-"
            ax.plot(*zip(*points.items(), strict=True), style, marker="o", label=label)
            color = ax.lines[-1].get_color()
            if method == "ring" and (beyond := ring_by_flops(rows, shape)):
                points = zip(*beyond.items(), strict=True)
                ax.plot(
                    *points, ":", color=color, marker="o", mfc="none", label="ring, by its FLOPs"
                )
    length_axis(ax, rows)
    ax.set_yscale("log")
    seconds = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    ax.set_yticks(seconds, list(map(str, seconds)))
    ax.minorticks_off()
    ax.set_ylabel("time to first token, s")
    ax.set_title(title)
    ax.grid(which="both", alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=150, bbox_inches="tight")


def plot_speed_up(rows: list[dict[str, Any]], shape: ModelConfig, title: str, path: Path) -> None:
    """How many times as long ring takes, beside what the paper reports over its ring."""
    from matplotlib import pyplot as plt

    if not first_tokens(rows, "ring"):
        return
    fig, ax = plt.subplots(figsize=(7.5, 4))
    for method, style in (("broadcast", "-"), ("recompute", ":")):
        for index, ranks in enumerate(sorted({row["ranks"] for row in rows} - {1})):
            ours = [row for row in rows if row["ranks"] == ranks]
            ring = ring_by_flops(ours, shape) | first_tokens(ours, "ring")
            times = first_tokens(ours, method)
            points = {length: ring[length] / times[length] for length in times if length in ring}
            label = f"{LABELS[method]}, {ranks} ranks"
            color = f"C{index}"
            points = zip(*points.items(), strict=True)
            ax.plot(*points, style, color=color, marker="o", label=label)
    label = "the paper, over its own ring, 8 to 32 A100"
    ax.plot(*zip(*PAPER_SPEED_UPS.items(), strict=True), "k--", marker="x", label=label)
    length_axis(ax, rows)
    ax.set_yscale("log")
    ax.set_yticks([0.5, 1, 2, 3, 5, 10, 20], ["0.5", "1", "2", "3", "5", "10", "20"])
    ax.minorticks_off()
    ax.set_ylabel("speed-up over ring")
    ax.set_title(title)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    fig.savefig(path, dpi=150, bbox_inches="tight")


def plot_scaling(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time to first token against ranks, for each length that several numbers of them ran with the
    same blocks, and what division of the fewest ranks' time would give."""
    from matplotlib import pyplot as plt

    runs: dict[tuple[int, int], dict[int, float]] = {}
    for row in rows:
        if row["method"] == "broadcast":
            key = row["context"], row["block_size"]
            runs.setdefault(key, {})[row["ranks"]] = row["first_token_s"]
    runs = {key: times for key, times in sorted(runs.items()) if len(times) > 1}
    if not runs:
        return
    fig, ax = plt.subplots(figsize=(7.5, 3.6))
    for (length, block), times in runs.items():
        ranks = sorted(times)
        line = ax.plot(
            ranks,
            [times[n] for n in ranks],
            "o-",
            label=f"{tokens(length)}, blocks {tokens(block)}",
        )[0]
        ideal = [times[ranks[0]] * ranks[0] / n for n in ranks]
        ax.plot(ranks, ideal, ":", color=line.get_color())
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    every = sorted({rank for times in runs.values() for rank in times})
    ax.set_xticks(every, list(map(str, every)))
    seconds = [1, 2, 5, 10, 20, 50]
    ax.set_yticks(seconds, list(map(str, seconds)))
    ax.minorticks_off()
    ax.set_xlabel("ranks (dotted: ideal)")
    ax.set_ylabel("time to first token, s")
    ax.set_title(title)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    fig.savefig(path, dpi=150, bbox_inches="tight")


def length_axis(ax: Any, rows: list[dict[str, Any]]) -> None:
    lengths = sorted({row["context"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, list(map(tokens, lengths)))
    ax.set_xlabel("context tokens")


def tokens(count: int) -> str:
    return f"{count >> 20}M" if count >> 20 else f"{count >> 10}K"


def plot_breakdown(rows: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Phase 1 of each method by kind of kernel, stacked, on the ranks that ran last."""
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "breakdown" in row]
    if not rows:
        return
    rows = [row for row in rows if row["ranks"] == rows[-1]["ranks"]]
    title = gpu.format(rows[0]["ranks"])
    fig, ax = plt.subplots(figsize=(7.5, 2.8))
    names = [LABELS[row["method"]] for row in rows]
    left = np.zeros(len(rows))
    for part in PARTS:
        if not part.startswith("transfers"):
            seconds = np.array([row["breakdown"].get(part, 0.0) for row in rows])
            ax.barh(names, seconds, left=left, label=part)
            left += seconds
    ax.plot([row["phase1_s"] for row in rows], names, "k|", ms=18, label="wall time")
    ax.invert_yaxis()
    ax.set_xlabel(f"s, phase 1 of {tokens(rows[0]['context'])} tokens on the busiest rank")
    ax.set_title(title)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    fig.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a real model instead of --shape: folder, GGUF or name")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="cut the shape to so many layers")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["broadcast", "local", "recompute", "ring"]
    )
    parser.add_argument("--lengths", nargs="+", type=parse_tokens, default=[1 << 16, 1 << 17])
    parser.add_argument(
        "--block-size",
        nargs="+",
        type=lambda text: None if text == "quarter" else parse_tokens(text),
        default=[1 << 15],
        help="of star: tokens, or quarter: of the context, as in the paper; several are measured",
    )
    parser.add_argument(
        "--exact-up-to", type=parse_tokens, help="leave ring and dense away at longer contexts"
    )
    parser.add_argument(
        "--ranks", nargs="*", type=int, help="start mpirun for each of these, one after the other"
    )
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto")
    parser.add_argument("--kv-cache-gib", type=float)
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto")
    parser.add_argument("--tp", type=int, default=1, help="processes that share a rank's model")
    parser.add_argument(
        "--breakdown", type=parse_tokens, help="the length whose phase 1 is taken apart by kernel"
    )
    parser.add_argument("--merge", choices=("auto", "peer", "nccl"), default="auto")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/results/latency.json"),
        help="JSON file that the results are added to, row by row",
    )
    parser.add_argument("--compare", type=Path, help="a table of this JSON file; measure nothing")
    parser.add_argument("--plot", type=Path, help="draw this JSON file; measure nothing")
    parser.add_argument("--to", type=Path, default=Path("docs/images"), help="folder of the plots")
    options = parser.parse_args()
    if options.plot:
        plot(options.plot, options.to)
    elif options.compare:
        compare(json.loads(options.compare.read_text()))
    elif options.ranks:
        run_each(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
