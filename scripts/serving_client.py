"""A client of OpenAI-compatible servers for benchmarks, and the texts that it sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class LostError(Exception):
    """A connection ended without an answer."""


@dataclass
class Answer:
    """What a client got.

    Attributes:
        status: 0 until there is one; 500 also for an error within a stream.
        texts: of each choice.
        times: of events with text, or of the whole answer (time.perf_counter).
        retry_after: seconds, of a refusal.
    """

    status: int = 0
    texts: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    retry_after: float = 1.0
    begin: float = 0.0

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.begin

    @property
    def gaps(self) -> list[float]:
        return np.diff(self.times).tolist()

    @property
    def tokens(self) -> int:
        return self.usage["completion_tokens"]

    @property
    def cached(self) -> int:
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


class Server:
    """An OpenAI-compatible server at an `http://` address."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            sys.exit(f"--url {url}: use http://host:port")
        self._host, self._port = parts.hostname, parts.port or 80
        self._head = f"Host: {parts.netloc}\r\nConnection: close\r\n"
        if key:
            self._head += f"Authorization: Bearer {key}\r\n"
        self.model = ""

    @contextlib.asynccontextmanager
    async def _call(
        self, method: str, path: str, body: Any = None
    ) -> AsyncIterator[tuple[int, dict[str, str], AsyncIterator[bytes]]]:
        """Status, headers, and the lines of the body. Leaving early breaks the connection off."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(data)}\r\n"
        writer = None
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 24)
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
            await writer.drain()
            status = (await reader.readline()).split(maxsplit=2)
            if len(status) < 2:
                raise LostError("the connection was closed without an answer")
            headers = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            yield int(status[1]), headers, _lines(reader, headers)
        except (OSError, EOFError, ValueError) as error:
            raise LostError(f"{type(error).__name__}: {error}") from error
        finally:
            if writer:
                writer.transport.abort()

    async def get(self, path: str) -> tuple[int, str]:
        async with self._call("GET", path) as (status, _, lines):
            return status, b"\n".join([line async for line in lines]).decode()

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self._call("POST", path, body) as (status, _, lines):
            data = b"\n".join([line async for line in lines])
            return status, json.loads(data) if status == 200 else data.decode()

    async def ask(
        self, context: str, question: str, tokens: int, stream: bool = True, **more: Any
    ) -> Answer:
        """One question. Raises LostError."""
        answer = Answer()
        await self.ask_into(answer, context, question, tokens, stream, **more)
        return answer

    async def ask_into(
        self,
        answer: Answer,
        context: str,
        question: str,
        tokens: int,
        stream: bool = True,
        n: int = 1,
        **more: Any,
    ) -> None:
        """`ask`, where others can see how far the answer is."""
        parts = [{"type": "text", "text": text} for text in (context, question)]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "n": n,
            **more,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer.texts, answer.reasons = [""] * n, [""] * n
        answer.begin = time.perf_counter()
        async with self._call("POST", "/v1/chat/completions", body) as (status, headers, lines):
            answer.status = status
            if status != 200:
                answer.error = b"\n".join([line async for line in lines]).decode()
                answer.retry_after = float(headers.get("retry-after", 1))
            elif stream:
                await self._read_events(answer, lines)
            else:
                whole = json.loads(b"\n".join([line async for line in lines]))
                answer.times.append(time.perf_counter())
                answer.usage = whole["usage"]
                for choice in whole["choices"]:
                    answer.texts[choice["index"]] = choice["message"]["content"]
                    answer.reasons[choice["index"]] = choice["finish_reason"]

    async def _read_events(self, answer: Answer, lines: AsyncIterator[bytes]) -> None:
        line = b""
        async for line in lines:
            if not line.startswith(b"data: {"):
                if line == b"data: [DONE]":
                    return
                continue
            event = json.loads(line[6:])
            if "error" in event:
                answer.status, answer.error = 500, f"within the stream: {event['error']}"
                return
            answer.usage = event.get("usage") or answer.usage
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    answer.times.append(time.perf_counter())
                    answer.texts[choice["index"]] += text
                if choice["finish_reason"]:
                    answer.reasons[choice["index"]] = choice["finish_reason"]
        raise LostError(f"the stream ended without [DONE], behind {line[:100]!r}")

    async def wait(self, process: subprocess.Popen | None, seconds: float) -> None:
        """Until it serves; then `model` is its first model, unless it is set."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if process and process.poll() is not None:
                sys.exit(f"the server ended with exit code {process.returncode}")
            with contextlib.suppress(LostError):
                status, _ = await self.get("/health")
                if status == 200:
                    if not self.model:
                        _, models = await self.get("/v1/models")
                        self.model = json.loads(models)["data"][0]["id"]
                    return
            await asyncio.sleep(0.2)
        sys.exit(f"the server is not ready after {seconds:g} s")

    async def busy(self) -> float | None:
        """Requests that its metrics say are running or waiting; None: it has none."""
        status, text = await self.get("/metrics")
        found = re.findall(r"^\w+:num_requests_(?:running|waiting)(?:{.*})? (\S+)$", text, re.M)
        return sum(map(float, found)) if status == 200 and found else None


async def _lines(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "") != "chunked":
        for line in (await reader.readexactly(int(headers["content-length"]))).split(b"\n"):
            yield line
        return
    rest = b""
    while size := int(await reader.readline(), 16):
        *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in lines:
            yield line
    yield rest


@contextlib.contextmanager
def started(command: str | None) -> Iterator[subprocess.Popen | None]:
    """The server that this command starts, ended with all that it started."""
    if command is None:
        yield None
        return
    process = subprocess.Popen(shlex.split(command), start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Texts:
    """Random words, about as many tokens as wanted."""

    def __init__(self, seed: int, tokens_per_word: float) -> None:
        self._seed = seed
        self._tokens_per_word = tokens_per_word

    def __call__(self, name: object, tokens: int) -> str:
        """The same for the same name and length."""
        rng = random.Random(f"{self._seed} {name}")
        count = max(1, round(tokens / self._tokens_per_word))
        return " ".join("".join(rng.choices(LETTERS, k=4)) for _ in range(count))


async def texts_of(server: Server, seed: int, per_word: float | None) -> Texts:
    """By the server's tokenizer, if nothing else is said."""
    count = 2000
    if per_word is None:
        sample = Texts(seed, 1.0)("sample", count)
        try:
            _, said = await server.post("/tokenize", {"model": server.model, "prompt": sample})
            per_word = said["count"] / count
        except (LostError, TypeError, KeyError):
            sys.exit("the server has no /tokenize: give --tokens-per-word")
    return Texts(seed, per_word)


def family(pid: int, name: str = "front") -> Iterator[tuple[int, str]]:
    """A server's processes, and what they are."""
    with contextlib.suppress(OSError):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        rank = re.search(rb"\0OMPI_COMM_WORLD_RANK=(\d+)", environment)
        yield pid, f"rank {rank[1].decode()}" if rank else name
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from family(int(child), Path(f"/proc/{child}/comm").read_text().strip())


def resident_mib(pid: int) -> float:
    """MiB."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def cpu_seconds(pid: int | None) -> dict[str, float]:
    """Of a server's processes, so far."""
    seconds = {}
    for process, name in family(pid) if pid else ():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        seconds[f"{name} {process}"] = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return seconds


def spread(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """Median, 99th percentile and most, by default in ms of seconds."""
    if not values:
        return {}
    p50, p99 = np.percentile(values, (50, 99)) * scale
    return {"median": p50, "p99": p99, "max": max(values) * scale, "count": len(values)}


def checked(answer: Answer) -> Answer:
    if answer.status != 200:
        sys.exit(f"the server answered {answer.status}: {answer.error}")
    return answer
