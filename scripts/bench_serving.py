#!/usr/bin/env python3
"""An OpenAI-compatible server over HTTP, ours or another: its speed, and whether answers are right
under load.

    python scripts/bench_serving.py --make-model 8b /tmp/8b
    python scripts/bench_serving.py --start "star-attn serve --model /tmp/8b --load-format dummy \\
        --device cuda --ranks 2" --context-tokens 128K --gap
    python scripts/bench_serving.py --start "vllm serve /tmp/8b --load-format dummy \\
        --max-model-len 160K --enable-prompt-tokens-details" --context-tokens 128K --gap
    python scripts/bench_serving.py --overhead --start "star-attn serve --model smollm2"
    python scripts/bench_serving.py --load --start "star-attn serve --model /tmp/tiny" \\
        --context-tokens 200 --answer-tokens 8 --clients 1000 --requests 10000

Speed: contexts and questions are random words, the same for the same --seed; a context is a part of
the user's message of its own, the question another. After a short question that warms up:
cold: the first question alone over a context that was never sent; warm: further questions alone
over it; together: --questions at once over it, each with its whole answer, --rounds times, always
new ones; with --gap: one answer alone, and again while another context is read. Times are a
client's, from before it connects to the event with the first text; the gap is between events with
text. Answers are greedy and go on behind the model's end token (ignore_eos).

Load: clients send random questions over contexts of a pool, want 1 to 3 answers, whole or streamed,
and leave at random moments. Before, every question was answered alone: half of them greedily, half
drawn among three tokens with a seed. Each answer must be the same, to the letter, with the same
count of tokens. In other batches sums are rounded otherwise, so a model whose choices are close by
(in float32, those of --make-model tiny hardly ever are) gives some that are `different`; an answer
that is right for another question is `crossed`. Who is refused (429, 503) asks again after
Retry-After, each time twice as long up to eight times.

Overhead: `LLM.ask` in this process and the server, in turn, with the same questions together.

aiperf and guidellm measure such times as well, and aiperf cancels requests; by their manuals none
checks every answer against what it should be, or watches an answer while a context is read. This
client speaks HTTP/1.1 itself: it leaves at any moment, and takes 0.1 ms of a CPU a token, beside a
server on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from serving_client import Answer, Server, Texts, checked, cpu_seconds, spread, started, texts_of
from serving_load import load_table, run_load
from serving_model import SHAPES, make_model

LIBRARIES = ("star-attention-trt", "vllm", "torch", "transformers", "fastapi", "uvicorn")


async def measure(server: Server, texts: Texts, options: argparse.Namespace) -> dict[str, Any]:
    length, asked, answer_tokens = (
        options.context_tokens,
        options.question_tokens,
        options.answer_tokens,
    )

    async def ask(context: str, name: str, tokens: int = answer_tokens) -> Answer:
        return checked(await server.ask(context, texts(name, asked), tokens))

    await ask(texts("warm-up", min(length, 4096)), "warm-up")
    cold, warm = [], []
    for round_ in range(options.rounds):
        context = texts(f"context {round_}", length)
        cold.append(await ask(context, f"first {round_}", 8))
        for index in range(4):
            warm.append(await ask(context, f"warm {round_} {index}", 8))
    rounds = []
    for round_ in range(options.rounds):
        names = [f"question {round_} {index}" for index in range(options.questions)]
        answers = await asyncio.gather(*(ask(context, name) for name in names))
        rounds.append(together(answers))
    middle = sorted(rounds, key=lambda each: each["tokens_per_s"])[len(rounds) // 2]
    result = {
        "prompt_tokens": cold[-1].usage["prompt_tokens"],
        "cold_first_token_s": [each.first for each in cold],
        "cold_cached_tokens": [each.cached for each in cold],
        "second_first_token_ms": warm[0].first * 1e3,
        "warm_first_token_ms": spread([each.first for each in warm]),
        "warm_cached_tokens": min(each.cached for each in warm),
        "together": middle,
        "rounds_tokens_per_s": [each["tokens_per_s"] for each in rounds],
    }
    if options.gap:
        result["gap"] = await gap(server, texts, context, options)
    return result


def together(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of questions that were asked at once."""
    begin = min(each.begin for each in answers)
    end = max(each.times[-1] for each in answers)
    all_there = max(each.times[0] for each in answers)
    later = sum(when > all_there for each in answers for when in each.times)
    tokens = sum(each.tokens for each in answers)
    return {
        "tokens": tokens,
        "seconds": end - begin,
        "tokens_per_s": tokens / (end - begin),
        # While all were being answered.
        "decode_tokens_per_s": later / (end - all_there) if end > all_there else None,
        "tokens_per_event": tokens / sum(len(each.times) for each in answers),
        "first_token_ms": spread([each.first for each in answers]),
        "gap_ms": spread([gap for each in answers for gap in each.gaps]),
        "cached_tokens": min(each.cached for each in answers),
    }


async def gap(
    server: Server, texts: Texts, context: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Between a running answer's tokens, alone and while another context is read."""
    asked = options.question_tokens

    first = await server.ask(context, texts("idle", asked), options.gap_tokens)
    idle = checked(first).gaps
    other = texts("other", options.gap_context_tokens or options.context_tokens)
    answers: list[Answer] = []

    async def keep_answering() -> None:
        while True:
            answers.append(Answer())
            question = texts(f"running {len(answers)}", asked)
            await server.ask_into(answers[-1], context, question, options.gap_tokens)
            checked(answers[-1])

    keeper = asyncio.create_task(keep_answering())
    while not keeper.done() and not any(len(each.times) > 16 for each in answers):
        await asyncio.sleep(0.01)
    begin = time.perf_counter()
    read = checked(await server.ask(other, texts("to other", asked), 1))
    end = time.perf_counter()
    if keeper.done():
        keeper.result()
    keeper.cancel()
    gaps = [
        after - before
        for each in answers
        for before, after in zip(each.times, each.times[1:], strict=False)
        if before < end and after > begin
    ]
    return {
        "idle_ms": spread(idle),
        "reading_ms": spread(gaps),
        "read_tokens": read.usage["prompt_tokens"] - read.cached,
        "read_s": end - begin,
        "p99_ratio": float(np.percentile(gaps, 99) / np.percentile(idle, 99)),
    }


def speed_table(result: dict[str, Any]) -> list[tuple[str, str]]:
    at_once = result["together"]

    def ms(values: dict[str, float]) -> str:
        return f"{values['median']:.1f} / {values['p99']:.1f} ms" if values else ""

    rows = [
        ("prompt tokens", f"{result['prompt_tokens']:,}"),
        ("cold: first token", f"{statistics.median(result['cold_first_token_s']):.3f} s"),
        ("second question alone: first token", f"{result['second_first_token_ms']:.1f} ms"),
        ("warm, alone: first token, median / p99", ms(result["warm_first_token_ms"])),
        ("together: tokens/s", f"{at_once['tokens_per_s']:.1f}"),
        ("together: tokens/s while all are answered", f"{at_once['decode_tokens_per_s'] or 0:.1f}"),
        ("together: first token, median / p99", ms(at_once["first_token_ms"])),
        ("together: gap between tokens, median / p99", ms(at_once["gap_ms"])),
        ("together: cached tokens, least", f"{at_once['cached_tokens']:,}"),
    ]
    if gaps := result.get("gap"):
        rows += [
            ("one answer alone: gap, median / p99", ms(gaps["idle_ms"])),
            (f"while {gaps['read_tokens']:,} tokens are read", ms(gaps["reading_ms"])),
            ("p99 while reading / p99 alone", f"{gaps['p99_ratio']:.2f}"),
            ("read beside it in", f"{gaps['read_s']:.2f} s"),
        ]
    return rows


async def overhead(
    server: Server, texts: Texts, options: argparse.Namespace, pid: int | None
) -> dict[str, Any]:
    """Tokens/s of `LLM.ask` and of the server, in turn."""
    from star_attention import LLM, SamplingParams, StarConfig
    from star_attention.serve.division import DENSE_TOKENS

    if options.context_tokens > DENSE_TOKENS:
        sys.exit(f"--context-tokens: use {DENSE_TOKENS} at most, which both divide alike")
    context = texts("context", options.context_tokens)
    questions = [texts(f"q {i}", options.question_tokens) for i in range(options.questions)]
    llm = LLM(options.llm, StarConfig(block_size=DENSE_TOKENS))
    encoded = llm.encode(context)
    params = SamplingParams(max_tokens=options.answer_tokens, ignore_eos=True)

    def ask_llm() -> float:
        begin = time.perf_counter()
        answers = llm.ask(encoded, questions, params)
        tokens = sum(len(answer.token_ids) for answer in answers)
        return tokens / (time.perf_counter() - begin)

    async def ask_server() -> float:
        answers = await asyncio.gather(
            *(server.ask(context, question, options.answer_tokens) for question in questions)
        )
        return together([checked(answer) for answer in answers])["tokens_per_s"]

    ask_llm()
    await ask_server()
    ours, its = [], []
    before = cpu_seconds(pid)
    alone = client = 0.0
    for _ in range(options.rounds):
        begin = time.process_time()
        ours.append(ask_llm())
        between = time.process_time()
        its.append(await ask_server())
        alone += between - begin
        client += time.process_time() - between
    after = cpu_seconds(pid)
    tokens = options.rounds * options.questions * options.answer_tokens
    return {
        "llm_tokens_per_s": ours,
        "server_tokens_per_s": its,
        "overhead": 1 - statistics.median(s / o for s, o in zip(its, ours, strict=True)),
        "cpu_ms_per_token": {
            "LLM": alone / tokens * 1e3,
            "the client": client / tokens * 1e3,
            **{name: (after[name] - before[name]) / tokens * 1e3 for name in before},
        },
    }


def overhead_table(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("LLM.ask: tokens/s, median", f"{statistics.median(result['llm_tokens_per_s']):.1f}"),
        ("server: tokens/s, median", f"{statistics.median(result['server_tokens_per_s']):.1f}"),
        ("overhead, median of pairs", f"{result['overhead']:.1%}"),
        *((f"CPU of {n}", f"{ms:.2f} ms a token") for n, ms in result["cpu_ms_per_token"].items()),
    ]


def hardware() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if names := Counter(gpus.split("\n")[:-1]):
            return ", ".join(f"{count} x {name}" for name, count in names.items())
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = names[0] if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


MODES = {"speed": speed_table, "load": load_table, "overhead": overhead_table}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    server = Server(options.url, options.api_key)
    server.model = options.model or ""
    with started(options.start) as process:
        pid = process.pid if process else options.pid
        await server.wait(process, options.start_timeout)
        texts = await texts_of(server, options.seed, options.tokens_per_word)
        if options.load:
            return await run_load(server, texts, options, pid)
        if options.overhead:
            return await overhead(server, texts, options, pid)
        return await measure(server, texts, options)


def save(path: Path, result: dict[str, Any]) -> None:
    """Behind what the file has."""
    runs = [*(json.loads(path.read_text()) if path.exists() else []), result]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(runs, indent=2) + "\n")
    os.replace(unfinished, path)


def parser() -> argparse.ArgumentParser:
    from star_attention.cli.options import parse_tokens

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--make-model", nargs=2, metavar=("SHAPE", "DIR"), help=f"{' or '.join(SHAPES)}; no more")
    add("--url", default="http://127.0.0.1:8000")
    add("--start", help="the command that starts the server, which is stopped afterwards")
    add("--start-timeout", type=float, default=600.0, help="seconds")
    add("--pid", type=int, help="of a server that runs, to watch its memory")
    add("--model", help="its name there; by default the first")
    add("--api-key")
    add("--name", help="of the server, in the results")
    add("--hardware", help="in the results; by default found")
    add("--output", type=Path, help="JSON file that the result is added to")
    add("--seed", type=int, default=0)
    add("--rounds", type=int, default=3)
    add("--context-tokens", type=parse_tokens, default=1 << 17)
    add("--questions", type=int, default=64, help="at once")
    add("--question-tokens", type=int, default=64)
    add("--answer-tokens", type=int, default=128)
    add("--tokens-per-word", type=float, help="where the server has no /tokenize")
    add("--gap", action="store_true", help="also the gap while another context is read")
    add("--gap-tokens", type=int, default=512, help="of the answer that runs")
    add("--gap-context-tokens", type=parse_tokens, help="of the other context; default: the same")
    add("--load", action="store_true")
    add("--clients", type=int, default=1000)
    add("--requests", type=int, default=10000)
    add("--disconnects", type=float, default=0.1, help="share of requests whose client leaves")
    add("--contexts", type=int, default=32, help="of the pool")
    add("--pool-questions", type=int, default=8)
    add("--retries", type=int, default=1000, help="of who was refused")
    add("--timeout", type=float, default=300.0, help="seconds after which an answer is lost")
    add("--overhead", action="store_true")
    add("--llm", default="smollm2", help="the server's model, for LLM")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.make_model:
        make_model(options.make_model[0], Path(options.make_model[1]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends too
    mode = "load" if options.load else "overhead" if options.overhead else "speed"
    result = asyncio.run(run(options))
    settings = {
        name: getattr(options, name)
        for name in ("seed", "rounds", "context_tokens", "questions", "question_tokens")
    }
    record = {
        "mode": mode,
        "name": options.name or (shlex.split(options.start)[0] if options.start else options.url),
        "command": options.start,
        "hardware": options.hardware or hardware(),
        "libraries": libraries(),
        "settings": {**settings, "answer_tokens": options.answer_tokens},
        "result": result,
    }
    print(f"\n{record['name']}, {record['hardware']}\n\n| {mode} | |\n|---|---|")
    for name, value in MODES[mode](result):
        print(f"| {name} | {value} |")
    print(*result.get("problems", ()), sep="\n")
    if options.output:
        save(options.output, record)
    sys.exit(not result.get("passed", True))


if __name__ == "__main__":
    main()
