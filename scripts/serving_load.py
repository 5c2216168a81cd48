"""Clients that ask a server at random, leave at random, and check what they get."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from typing import Any

import numpy as np
from serving_client import Answer, LostError, Server, Texts, checked, family, resident_mib, spread

REFUSALS = (429, 503)


class Load:
    """Clients that ask, leave, and check what they get."""

    def __init__(self, server: Server, texts: Texts, options: argparse.Namespace) -> None:
        self._server, self._options = server, options
        self._contexts = [
            f"{texts(f'marker {index}', 4)} {texts(f'context {index}', options.context_tokens)}"
            for index in range(options.contexts)
        ]
        self._questions = [
            texts(f"question {index}", options.question_tokens)
            for index in range(options.pool_questions)
        ]
        self._right: dict[tuple[int, int], Answer] = {}
        self._whose: dict[str, set[tuple[int, int]]] = {}
        self._left = options.requests
        self.outcomes: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.problems: list[str] = []
        self.latencies: list[float] = []
        self.tokens = 0

    def _sampling(self, pair: tuple[int, int]) -> dict[str, Any]:
        number = pair[0] * len(self._questions) + pair[1]
        return {"temperature": number % 2, "top_k": 3, "seed": number}

    async def answer_alone(self) -> None:
        """What is right, one question after the other."""
        for context, text in enumerate(self._contexts):
            for question, asked in enumerate(self._questions):
                pair = context, question
                answer = checked(
                    await self._server.ask(
                        text,
                        asked,
                        self._options.answer_tokens,
                        stream=False,
                        n=3,
                        **self._sampling(pair),
                    )
                )
                self._right[pair] = answer
                for each in answer.texts:
                    self._whose.setdefault(each, set()).add(pair)

    @property
    def distinct(self) -> float:
        """Share of questions none of whose answers is also another's."""
        alone = sum(
            all(self._whose[text] == {pair} for text in answer.texts)
            for pair, answer in self._right.items()
        )
        return alone / len(self._right)

    async def run(self) -> float:
        """Seconds that all requests took."""
        begin = time.perf_counter()
        await asyncio.gather(*(self._client(index) for index in range(self._options.clients)))
        return time.perf_counter() - begin

    async def _client(self, index: int) -> None:
        rng = random.Random(f"{self._options.seed} client {index}")
        while self._left > 0:
            self._left -= 1
            pair = rng.randrange(len(self._contexts)), rng.randrange(len(self._questions))
            n, stream = rng.choice((1, 1, 1, 2, 3)), rng.random() < 0.5
            leaves = None
            if rng.random() < self._options.disconnects:
                typical = statistics.median(self.latencies[-100:] or [1.0])
                leaves = rng.uniform(0, 1.5 * typical)
            try:
                outcome = await asyncio.wait_for(self._ask(pair, n, stream, rng), leaves)
            except asyncio.TimeoutError:
                outcome = "left"
            self.outcomes[outcome] += 1

    async def _ask(self, pair: tuple[int, int], n: int, stream: bool, rng: random.Random) -> str:
        context, question = self._contexts[pair[0]], self._questions[pair[1]]
        for tried in range(self._options.retries + 1):
            try:
                asking = self._server.ask(
                    context,
                    question,
                    self._options.answer_tokens,
                    stream,
                    n=n,
                    **self._sampling(pair),
                )
                answer = await asyncio.wait_for(asking, self._options.timeout)
            except LostError as error:
                return self._problem("lost", pair, str(error))
            except asyncio.TimeoutError:
                return self._problem("lost", pair, f"no answer in {self._options.timeout:g} s")
            self.statuses[answer.status] += 1
            if answer.status not in REFUSALS:
                break
            later = answer.retry_after * 2 ** min(tried, 3)
            await asyncio.sleep(later * rng.uniform(0.5, 1.5))
        if answer.status in REFUSALS:
            return "refused"
        if answer.status != 200:
            return self._problem("failed", pair, f"{answer.status}: {answer.error[:200]}")
        self.latencies.append(answer.times[-1] - answer.begin)
        self.tokens += answer.tokens
        return self._judge(pair, n, answer)

    def _judge(self, pair: tuple[int, int], n: int, answer: Answer) -> str:
        right = self._right[pair]
        if answer.texts != right.texts[:n]:
            others = [self._whose.get(text, set()) - {pair} for text in answer.texts]
            kind = "crossed" if any(others) else "different"
            return self._problem(kind, pair, f"{answer.texts}, not {right.texts[:n]}")
        counts = answer.usage["prompt_tokens"], answer.tokens
        expected = right.usage["prompt_tokens"], n * self._options.answer_tokens
        if counts != expected or set(answer.reasons) != {"length"}:
            told = f"usage {counts}, not {expected}; ends {answer.reasons}"
            return self._problem("different", pair, told)
        return "answered"

    def _problem(self, outcome: str, pair: tuple[int, int], text: str) -> str:
        if len(self.problems) < 20:
            self.problems.append(f"{outcome}: question {pair}: {text}")
        return outcome


class Memory:
    """Resident memory of a process and its descendants, looked at once a second."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self.samples: list[tuple[float, dict[str, float]]] = []

    async def watch(self) -> None:
        while self._pid:
            now = {f"{name} {pid}": resident_mib(pid) for pid, name in family(self._pid)}
            self.samples.append((time.perf_counter(), now))
            await asyncio.sleep(1.0)

    def slopes(self, rate: float) -> dict[str, Any]:
        """MiB at the beginning and end, and MiB a 1000 requests over the run's second half.

        Args:
            rate: requests a second.
        """
        if len(self.samples) < 8:
            return {}
        half, found = self.samples[len(self.samples) // 2 :], {}
        for name in half[0][1]:
            points = [(when, now[name]) for when, now in half if name in now]
            slope = np.polyfit(*zip(*points, strict=True), 1)[0] if len(points) > 3 else 0.0
            found[name] = {
                "first_mib": self.samples[0][1].get(name),
                "middle_mib": points[0][1],
                "last_mib": points[-1][1],
                "mib_per_1000_requests": float(slope) / rate * 1000,
            }
        return found


async def run_load(
    server: Server, texts: Texts, options: argparse.Namespace, pid: int | None
) -> dict[str, Any]:
    load, memory = Load(server, texts, options), Memory(pid)
    await load.answer_alone()
    watch = asyncio.create_task(memory.watch())
    seconds = await load.run()
    watch.cancel()
    busy = await server.busy()
    for _ in range(100):
        if not busy:
            break
        await asyncio.sleep(0.1)
        busy = await server.busy()
    outcomes = {
        name: load.outcomes[name]
        for name in ("answered", "left", "refused", "failed", "lost", "different", "crossed")
    }
    bad = sum(outcomes[name] for name in ("failed", "lost", "different", "crossed"))
    return {
        "requests": options.requests,
        "clients": options.clients,
        "disconnects": options.disconnects,
        "pool": [options.contexts, options.pool_questions],
        "distinct": load.distinct,
        "outcomes": outcomes,
        "responses_by_status": dict(sorted(load.statuses.items())),
        "problems": load.problems,
        "left_running": busy,
        "seconds": seconds,
        "requests_per_s": options.requests / seconds,
        "tokens_per_s": load.tokens / seconds,
        "latency_ms": spread(load.latencies),
        "memory": memory.slopes(options.requests / seconds),
        "passed": not bad and not busy and sum(outcomes.values()) == options.requests,
    }


def load_table(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("requests, clients", f"{result['requests']:,}, {result['clients']:,}"),
        *((name, f"{count:,}") for name, count in result["outcomes"].items()),
        ("responses by status", ", ".join(map(str, result["responses_by_status"].items()))),
        ("questions told apart by their answers", f"{result['distinct']:.1%}"),
        ("left running", str(result["left_running"])),
        ("requests/s", f"{result['requests_per_s']:.1f}"),
        ("tokens/s", f"{result['tokens_per_s']:.1f}"),
    ]
    if latency := result["latency_ms"]:
        rows.append(("latency, median / p99", f"{latency['median']:.0f} / {latency['p99']:.0f} ms"))
    for name, memory in result["memory"].items():
        told = f"{memory['middle_mib']:.0f} → {memory['last_mib']:.0f} MiB"
        slope = memory["mib_per_1000_requests"]
        rows.append((f"memory of {name}, second half", f"{told}, {slope:+.2f} / 1000 requests"))
    return rows
