"""Decode steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from star_attention.distributed import Communicator, Traffic
from star_attention.engines.base import PagedStep, padded_count
from star_attention.engines.torch.attention import Attention, PagedTables, QuantizedKv
from star_attention.engines.torch.operators import PassInputs

# A forward pass over inputs that stay where they are: logits.
Forward = Callable[[PassInputs, Attention], torch.Tensor]


class DecodeGraphs:
    """A graph for each of a few padded numbers of sequences and of prefixes, all in one memory
    pool.

    A shape's first step runs without a graph, which prepares what kernels need; the second is
    captured, which can be a collective call: every rank sees the same decode steps, so all ranks
    capture at the same one.

    Args:
        forward: what is captured.
        max_pages, tokens_per_block: of the KV pool, whose address is fixed.
        quantized, windowed: as in `attention_on`.
        window: tokens that rows of these layers see; None: there are none.

    Attributes:
        replays: steps that were replays so far.
    """

    def __init__(
        self,
        forward: Forward,
        comm: Communicator,
        scale: float,
        device: torch.device,
        max_pages: int,
        tokens_per_block: int,
        quantized: QuantizedKv | None = None,
        window: int | None = None,
        windowed: Collection[int] = (),
    ) -> None:
        self._quantized = quantized
        self._windowed = windowed
        # Pages that a row sees of a window, which may begin and end within one.
        pages = 0 if window is None else -(-window // tokens_per_block) + 1
        self._window_width = min(pages, max_pages)
        self._prefix_width = quantized.codes.shape[1] if quantized else max_pages
        self._forward = forward
        self._comm = comm
        self._scale = scale
        self._device = device
        self._width = max_pages
        self._tokens_per_block = tokens_per_block
        self.replays = 0
        self.clear()

    def clear(self) -> None:
        """Memory that they read has moved. Every rank calls it at the same step."""
        self._shapes: dict[tuple[int, int, bool], _DecodeGraph] = {}
        self._memory: Any = None

    def step(self, token_ids: np.ndarray, positions: np.ndarray, step: PagedStep) -> torch.Tensor:
        """One token for each sequence: float32 [S, vocab_size], valid until the next step."""
        lists = padded_count(len(step.prefix.kv_lens)) if step.prefix else 0
        shape = padded_count(len(token_ids)), lists, step.merge
        graph = self._shapes.get(shape)
        is_new = graph is None
        if is_new:
            graph = self._shapes[shape] = self._make(*shape)
        graph.fill(token_ids, positions, step)
        if is_new:
            logits = graph.run()
        else:
            if not graph.captured:
                self._memory = self._memory or graph_memory()
                graph.capture(self._memory)
            logits = graph.replay()
            self.replays += 1
        return logits[: len(token_ids)]

    def _make(self, count: int, lists: int, merge: bool) -> _DecodeGraph:
        widths = self._width, self._prefix_width, self._window_width
        inputs = _DecodeInputs(count, lists, *widths, self._device)
        max_kv_len = self._width * self._tokens_per_block
        starts = torch.arange(count + 1, dtype=torch.int32, device=self._device)
        tables = [PagedTables(inputs.page_table, starts, inputs.kv_lens, False, 1, max_kv_len)]
        if lists:
            most = self._prefix_width * self._tokens_per_block
            prefix = PagedTables(*inputs.prefix, False, count, most, self._quantized)
            tables.insert(0, prefix)
        window = None
        if self._window_width:
            table, kv_lens, first = inputs.window
            most = self._window_width * self._tokens_per_block
            window = PagedTables(table, starts, kv_lens, False, 1, most, starts=first)

        def run() -> torch.Tensor:
            attention = Attention(
                tables,
                self._comm,
                self._scale,
                merge,
                window=window,
                windowed=self._windowed,
            )
            return self._forward(inputs.tokens, attention)

        return _DecodeGraph(inputs, run, self._comm.traffic)


class _DecodeInputs:
    """A token for each of `count` sequences, `lists` of pages that some have in front, and what
    they see of windows, in one piece of host and one of device memory. Widths are in pages.

    Attributes:
        tokens, kv_lens, page_table: on the device.
        prefix: page_table, cu_seqlens_q and kv_lens of the lists.
        window: page_table, kv_lens and starts.
    """

    def __init__(
        self,
        count: int,
        lists: int,
        width: int,
        prefix_width: int,
        window_width: int,
        device: torch.device,
    ) -> None:
        sizes = [count] * 4 + [count * width, lists + 1, lists, lists * prefix_width]
        sizes += [count, count, count * window_width]
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=on_gpu)
        self._device = self._host.to(device, copy=True)
        *columns, table, starts, lens, pages, window_lens, window_starts, window_pages = np.split(
            self._host.numpy(), np.cumsum(sizes)[:-1]
        )
        self._columns, self._table = columns, table.reshape(count, width)
        self._starts, self._lens, self._pages = starts, lens, pages.reshape(lists, prefix_width)
        self._window = window_lens, window_starts, window_pages.reshape(count, window_width)
        token_ids, positions, slots, self.kv_lens, table, *prefix = self._device.split(sizes)
        self.tokens = PassInputs(token_ids, positions, slots, None)
        self.page_table = table.view(count, width)
        starts, lens, pages, window_lens, window_starts, window_pages = prefix
        self.prefix = pages.view(lists, prefix_width), starts, lens
        self.window = window_pages.view(count, window_width), window_lens, window_starts

    def fill(self, token_ids: np.ndarray, positions: np.ndarray, step: PagedStep) -> None:
        """Rows beyond the sequences store nothing and see nothing."""
        count = len(token_ids)
        values = token_ids, positions, step.slot_mapping, step.kv_lens
        for column, given, beyond in zip(self._columns, values, (0, 0, -1, 0), strict=True):
            column[:count] = given
            column[count:] = beyond
        self._table[:count, : step.page_table.shape[1]] = step.page_table
        if step.window:
            lens, starts, pages = self._window
            lens[:count], lens[count:] = step.window.kv_lens, 0
            starts[:count], starts[count:] = step.window.starts, 0
            pages[:count, : step.window.page_table.shape[1]] = step.window.page_table
        if step.prefix:
            lists, width = step.prefix.page_table.shape
            self._pages[:lists, :width] = step.prefix.page_table
            self._lens[:lists], self._lens[lists:] = step.prefix.kv_lens, 0
            # Rows beyond the sequences belong to the last list.
            self._starts[:lists] = step.prefix.cu_seqlens_q[:lists]
            self._starts[lists:] = len(self._columns[0])
        self._device.copy_(self._host, non_blocking=True)


class _DecodeGraph:
    """A pass over its inputs, to be run as it is and then captured and replayed."""

    def __init__(
        self, inputs: _DecodeInputs, run: Callable[[], torch.Tensor], traffic: Traffic
    ) -> None:
        self.fill = inputs.fill
        self.run = run
        self._traffic = traffic
        self._replay: Callable[[], None] | None = None

    @property
    def captured(self) -> bool:
        return self._replay is not None

    def capture(self, memory: Any) -> None:
        before = self._traffic.copy()
        self._replay, self._logits = capture(self.run, memory)
        self._per_step = self._traffic - before
        self._traffic.add(Traffic() - self._per_step)  # nothing was sent yet

    def replay(self) -> torch.Tensor:
        self._replay()
        self._traffic.add(self._per_step)
        return self._logits


def graph_memory() -> Any:
    """A memory pool for graphs that are never replayed at the same time."""
    return torch.cuda.graph_pool_handle()


def capture(
    run: Callable[[], torch.Tensor], memory: Any
) -> tuple[Callable[[], None], torch.Tensor]:
    """What launches the work that `run` queues, and its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result
