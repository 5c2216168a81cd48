#!/usr/bin/env python3
"""The TensorRT engine beside the torch engine on one GPU, the same random weights in both:

    python scripts/bench_tensorrt.py --layers 4 --output results.json

Llama-3.1-8B's shape cut to some layers, float16, blocks and anchors of 32K tokens. Prints phase 1
and a decode step of both, what each of a layer's GEMMs takes in a full pass of phase 1 (its kernels
in the order in which they run, by the profiler), how long the engine took to build, and its memory
beside what the shapes give. The engine is kept in --engine_dir, and used if it is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_latency import QUESTION_TOKENS, environment, generate, part_of, token_ids

from star_attention.cli.options import parse_tokens
from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.loader import dummy_engine, load_engine
from star_attention.engines.options import EngineOptions
from star_attention.engines.tensorrt.build import (
    BUILD_QUANTIZATIONS,
    GEMM_PLUGIN,
    BuildOptions,
    build_folder,
)
from star_attention.engines.tensorrt.folder import EngineLimits
from star_attention.models.checkpoint import is_engine_folder
from star_attention.models.config import LLAMA_3_1_8B, ModelConfig
from star_attention.models.loading import random_checkpoint
from star_attention.runtime.leader import Leader, lead_together

BLOCK = 32768


def build(model: ModelConfig, folder: Path, length: int, options: BuildOptions) -> float:
    """Builds the engine of random weights; seconds."""
    limits = EngineLimits(
        max_batch_size=1,
        max_input_len=length + QUESTION_TOKENS,
        max_seq_len=length + 1024,
        max_num_tokens=BLOCK,
        block_size=BLOCK,
    )
    checkpoint = random_checkpoint(model, torch.float16, torch.device("cuda"))
    began = time.perf_counter()
    build_folder(checkpoint, folder, limits, options)
    return time.perf_counter() - began


def measure(leader: Leader, model: ModelConfig, length: int) -> dict[str, Any]:
    """Phase 1 and a decode step, the median of three; and the tokens that it decodes."""
    ids, config = token_ids(model, length), StarConfig(block_size=BLOCK, anchor_mode="local")
    leader.release(leader.encode(ids[: 2 * BLOCK], config))
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        context = leader.encode(ids, config)
        times.append(time.perf_counter() - began)
        if len(times) < 3:
            leader.release(context)
    query, decode = generate(leader, context, ids[:QUESTION_TOKENS], 64)
    leader.release(context)
    return {
        "phase1_s": statistics.median(times),
        "query_s": query,
        "decode_ms": decode * 1e3,
        "kernels": kernels_of_a_block(leader, ids[:BLOCK], config),
    }


def kernels_of_a_block(leader: Leader, ids: np.ndarray, config: StarConfig) -> list[dict]:
    """The kernels of phase 1 of one block, in their order: name and milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        leader.release(leader.encode(ids, config))
    events = [event for event in profiler.events() if event.device_time_total > 0]
    events.sort(key=lambda event: event.time_range.start)
    return [{"name": event.name, "ms": event.device_time_total / 1e3} for event in events]


def by_kind(kernels: list[dict]) -> dict[str, float]:
    """Milliseconds of GEMMs, attention and the rest."""
    total = {"GEMMs": 0.0, "attention": 0.0, "rest": 0.0}
    for kernel in kernels:
        part = part_of(kernel["name"])
        total[part if part in total else "rest"] += kernel["ms"]
    return total


def expected_memory(model: ModelConfig) -> dict[str, float]:
    """GiB by arithmetic: the weights once; of a full pass the widest moment of a layer, when x,
    gate, up and their product are there."""
    per_layer = model.gemm_flops_per_token / 2 / model.num_layers + 2 * model.hidden_size
    embeddings = (2 - model.tie_embeddings) * model.vocab_size * model.hidden_size
    weights = 2 * (model.num_layers * per_layer + embeddings + model.hidden_size)
    activations = 2 * BLOCK * (model.hidden_size + 3 * model.intermediate_size)
    return {"weights": weights / 2**30, "activations": activations / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=parse_tokens, default=1 << 17)
    parser.add_argument("--gemm_plugin", choices=GEMM_PLUGIN, default=GEMM_PLUGIN[0])
    parser.add_argument("--quantization", choices=BUILD_QUANTIZATIONS, default="none")
    parser.add_argument("--optimization_level", type=int, default=3)
    parser.add_argument("--engine_dir", type=Path, default=Path("engines/bench"))
    parser.add_argument("--timing_cache", type=Path)
    parser.add_argument("--rebuild", action="store_true", help="build again, to time the cache")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tensorrt.json"))
    options = parser.parse_args()
    model = replace(LLAMA_3_1_8B, num_layers=options.layers)
    build_options = BuildOptions(
        gemm_plugin=options.gemm_plugin,
        quantization=options.quantization,
        optimization_level=options.optimization_level,
        timing_cache=options.timing_cache,
    )
    result: dict[str, Any] = {"config": asdict(model), "environment": environment("auto")}
    result["gemm_plugin"] = options.gemm_plugin
    result["quantization"] = options.quantization
    result["optimization_level"] = options.optimization_level
    if options.rebuild:
        shutil.rmtree(options.engine_dir, ignore_errors=True)
    if not is_engine_folder(options.engine_dir):
        result["build_s"] = build(model, options.engine_dir, options.length, build_options)
        print(f"built in {result['build_s']:.0f} s", flush=True)

    comm, cuda = SingleProcess(), EngineOptions("cuda", "float16", kv_cache_gib=8)
    cuda = replace(cuda, quantization=options.quantization)
    page = StarConfig.tokens_per_block
    engine = load_engine(options.engine_dir, comm, page, cuda)
    leader, _ = lead_together(engine, comm)
    result["tensorrt"] = measure(leader, model, options.length)
    result["memory_gib"] = {name: size / 2**30 for name, size in engine.memory_report.items()}
    result["expected_gib"] = expected_memory(model)
    leader, _ = lead_together(dummy_engine(model, comm, page, cuda), comm)
    result["torch"] = measure(leader, model, options.length)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print_result(result)


def print_result(result: dict[str, Any]) -> None:
    trt, torch_ = result["tensorrt"], result["torch"]
    print("\n| | TensorRT | torch | ratio |\n|---|---|---|---|")
    for name in ("phase1_s", "query_s", "decode_ms"):
        print(f"| {name} | {trt[name]:.4f} | {torch_[name]:.4f} | {trt[name] / torch_[name]:.2f} |")
    kinds = by_kind(trt["kernels"]), by_kind(torch_["kernels"])
    for kind in kinds[0]:
        print(f"| a block, {kind}, ms | {kinds[0][kind]:.2f} | {kinds[1][kind]:.2f} | |")
    for name, size in result["memory_gib"].items():
        expected = result["expected_gib"].get(name)
        print(f"{name}: {size:.2f} GiB" + (f" ({expected:.2f} by the shapes)" if expected else ""))
    for engine in ("tensorrt", "torch"):
        print(f"\n{engine}: kernels of a block")
        for kernel in result[engine]["kernels"]:
            if kernel["ms"] > 0.2:
                print(f"  {kernel['ms']:8.3f} ms  {kernel['name'][:110]}")


if __name__ == "__main__":
    main()
