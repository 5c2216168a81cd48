"""What is counted, for Prometheus; names after vLLM's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from star_attention.runtime.requests import FinishReason
from star_attention.serve.engine import Engine
from star_attention.serve.messages import Opened, Progress

_PREFIX = "star_attention:"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
_TOKEN_SECONDS = (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3, 10)


class Metrics:
    """Attributes:
    readings: of requests in phase 1, the share that is read, by any key.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.readings: dict[object, float] = {}

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(_PREFIX + name, text, buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(_PREFIX + name, text, registry=self.registry)

        self.running = gauge("num_requests_running", "Answers whose context is opened.")
        self.waiting = gauge("num_requests_waiting", "Answers that the engine has not begun.")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _SECONDS
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between tokens of an answer.", _TOKEN_SECONDS
        )
        self.latency = histogram(
            "e2e_request_latency_seconds", "From the request to its last token.", _SECONDS
        )
        self.context_read = histogram(
            "context_read_seconds", "Of phase 1, where anything was read.", _SECONDS
        )
        self.prompt_tokens = counter("prompt_tokens", "Of contexts and questions.")
        self.cached_prompt_tokens = counter("cached_prompt_tokens", "That were not read again.")
        self.generation_tokens = counter("generation_tokens", "Of answers.")
        self.success = counter("request_success", "Answers that ended.", ("finished_reason",))
        self.aborted = counter("requests_aborted", "Whose client left, or whose time was over.")
        self.refused = counter("requests_refused", "Answered with an error.", ("status",))
        self.http = counter("http_requests", "By route.", ("method", "path", "status"))
        self.registry.register(_EngineCollector(engine, self.readings))


class _EngineCollector(Collector):
    """What the engine says of itself, read when it is asked for."""

    def __init__(self, engine: Engine, readings: dict[object, float]) -> None:
        self._engine = engine
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        restarts = CounterMetricFamily(_PREFIX + "engine_restarts", "Of the ranks.")
        restarts.add_metric((), self._engine.restarts)
        yield restarts
        reading = GaugeMetricFamily(_PREFIX + "contexts_being_read", "Requests in phase 1.")
        reading.add_metric((), len(self._readings))
        yield reading
        progress = GaugeMetricFamily(
            _PREFIX + "context_read_progress", "The mean share that is read of them; 1: none is."
        )
        shares = list(self._readings.values())
        progress.add_metric((), sum(shares) / len(shares) if shares else 1.0)
        yield progress
        statistics = self._engine.statistics
        if statistics is None:
            return
        usage = GaugeMetricFamily(_PREFIX + "kv_cache_usage_perc", "1: all pages are in use.")
        usage.add_metric((), statistics.pages_used / max(1, statistics.pages))
        yield usage
        for name, text, values in (
            ("cached_blocks", "Context blocks kept for later.", statistics.cached_blocks),
            ("cached_bytes", "Their size on all ranks.", statistics.cached_bytes),
        ):
            family = GaugeMetricFamily(_PREFIX + name, text, labels=("tier",))
            for tier, value in values.items():
                family.add_metric((tier,), value)
            yield family


class AnswerTimes:
    """Measures one answer, from `start` (time.monotonic) on. Close it whatever happens."""

    def __init__(self, metrics: Metrics, start: float) -> None:
        self._metrics = metrics
        self._start = start
        self._opened: float | None = None
        self._last: float | None = None
        self._reads = False
        metrics.waiting.inc()

    def opened(self, event: Opened) -> None:
        self._opened = time.monotonic()
        self._metrics.waiting.dec()
        self._metrics.running.inc()
        self._reads = any(block.source == "new" for block in event.blocks)
        if self._reads:
            self._metrics.readings[self] = share_read(event, done_at_first(event))

    def progress(self, opened: Opened, event: Progress) -> None:
        if self in self._metrics.readings:
            self._metrics.readings[self] = share_read(opened, event.done)

    def token(self) -> None:
        now = time.monotonic()
        self._metrics.generation_tokens.inc()
        if self._last is None:
            self._metrics.first_token.observe(now - self._start)
            if self._reads and self._opened is not None:
                self._metrics.context_read.observe(now - self._opened)
            self._metrics.readings.pop(self, None)
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._last = now

    def finished(self, reason: FinishReason) -> None:
        self._metrics.success.labels(reason).inc()
        self._metrics.latency.observe(time.monotonic() - self._start)

    def close(self) -> None:
        self._metrics.readings.pop(self, None)
        (self._metrics.waiting if self._opened is None else self._metrics.running).dec()


def done_at_first(opened: Opened) -> tuple[float, ...]:
    """What is there of each block when a context is opened."""
    return tuple(float(block.source != "new") for block in opened.blocks)


def share_read(opened: Opened, done: Sequence[float]) -> float:
    """The share of a context's tokens that is there."""
    sizes = [block.end - block.start for block in opened.blocks]
    there = sum(size * share for size, share in zip(sizes, done, strict=True))
    return there / sum(sizes) if sizes else 1.0
