"""Star Attention on CPU cores: against Hugging Face's dense generation, and as the context grows.

    python scripts/bench_cpu.py [--ranks 2] [--tokens 4096] [--json FILE]

Both sides run SmolLM2-135M in float32 on the same cores and generate the same number of tokens;
loading is not counted. Hugging Face uses all cores in one process, Star Attention shares them among
its ranks. The scaling part encodes 2K, 4K and 8K tokens in blocks of one size and fits a line
through the times of phase 1 over the number of blocks.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from star_attention import SamplingParams, StarConfig
from star_attention.distributed import default_communicator
from star_attention.distributed.launch import run_ranks
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.models.checkpoint import find_model
from star_attention.runtime.leader import lead_together
from star_attention.runtime.orders import Report, Wait

QUESTION_TOKENS = 32


def cpu_name() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.machine()


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(10, 49000, count).astype(np.int32)


def time_hf(tokens: int, new_tokens: int) -> dict:
    """Prefill and generation of a dense prompt, best of two."""
    from transformers import AutoModelForCausalLM

    path = find_model("smollm2")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    prompt = torch.from_numpy(random_tokens(tokens)).long()[None]
    options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}

    def run() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return time.perf_counter() - begin

    return {"seconds": min(run() for _ in range(2)), "attention": model.config._attn_implementation}


def time_star(tokens: int, new_tokens: int, block_size: int, repeats: int) -> dict:
    """Run on every rank: phases of the best repeat, by the slowest rank's time."""
    comm = default_communicator()
    engine = load_engine(find_model("smollm2"), comm, 128, EngineOptions())
    leader, _ = lead_together(engine, comm)
    text = random_tokens(tokens)
    context_ids, question = text[:-QUESTION_TOKENS], text[-QUESTION_TOKENS:]
    params = SamplingParams(max_tokens=new_tokens)
    runs = []
    for _ in range(repeats):
        comm.gather_objects(None)
        times = [time.perf_counter()]
        context = leader.encode(context_ids, StarConfig(block_size=block_size))
        times.append(time.perf_counter())
        asked = leader.scheduler.add_question(context, question, params)
        while not asked.is_over:
            leader.step()
        leader.execute(Wait())
        times.append(time.perf_counter())
        leader.release(context)
        runs.append({"phase 1": times[1] - times[0], "phase 2": times[2] - times[1]})
    ranks = leader.execute(Report())
    passes = repeats * (new_tokens - 1)
    layers = engine.config.num_layers
    per_token = ranks[0]["phases"]["decode"]["traffic"]["sent"] / passes / layers
    best = min(runs, key=lambda run: sum(run.values()))
    return {
        "seconds": sum(best.values()),
        **best,
        "blocks": len(context.plan.blocks),
        "phase 2 bytes sent per token and layer": per_token,
    }


def run_star(ranks: int, *arguments: int) -> dict:
    """`time_star` over ranks of this script."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "star.json"
        command = [sys.executable, __file__, "--as-rank", str(output), *map(str, arguments)]
        if (ranks > 1 and run_ranks(command, ranks)) or (
            ranks == 1 and subprocess.run(command, check=False).returncode
        ):
            sys.exit("a rank failed")
        return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--scaling", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--json", type=Path, help="save the numbers")
    options = parser.parse_args()

    block = options.tokens // 4
    hf = time_hf(options.tokens, options.new_tokens)
    star = run_star(options.ranks, options.tokens, options.new_tokens, block, 2)
    ratio = star["seconds"] / hf["seconds"]
    machine = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
    print(f"{machine}; SmolLM2-135M, float32")
    print(f"{options.tokens} prompt tokens, {options.new_tokens} new:")
    print(f"  Hugging Face dense ({hf['attention']}), all cores   {hf['seconds']:6.2f} s")
    print(
        f"  star, {options.ranks} ranks, blocks of {block}            {star['seconds']:6.2f} s   "
        f"(phase 1 {star['phase 1']:.2f} s, phase 2 {star['phase 2']:.2f} s)"
    )
    print(f"  ratio {ratio:.2f}")

    scaling = {}
    for tokens in options.scaling:
        scaling[tokens] = run_star(options.ranks, tokens + QUESTION_TOKENS, 2, 512, 2)
    blocks = np.array([run["blocks"] for run in scaling.values()])
    seconds = np.array([run["phase 1"] for run in scaling.values()])
    slope, offset = np.polyfit(blocks, seconds, 1)
    residual = np.abs(slope * blocks + offset - seconds).max() / seconds.max()
    print(f"\nphase 1 over {options.ranks} ranks, blocks and anchor of 512:")
    for tokens, run in scaling.items():
        print(
            f"  {tokens:6} tokens, {run['blocks']:2} blocks   {run['phase 1']:6.2f} s   "
            f"{run['phase 2 bytes sent per token and layer']:.0f} B sent per new token and layer"
        )
    print(f"  fit: {slope:.3f} s per block {offset:+.3f} s, off by at most {residual:.1%}")
    if options.json:
        result = {"machine": machine, "hf": hf, "star": star, "ratio": ratio, "scaling": scaling}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if "--as-rank" in sys.argv:
    file, *numbers = sys.argv[sys.argv.index("--as-rank") + 1 :]
    timed = time_star(*map(int, numbers))
    if default_communicator().rank == 0:
        Path(file).write_text(json.dumps(timed))
else:
    main()
