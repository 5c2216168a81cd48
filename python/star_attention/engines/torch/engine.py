"""The model in torch, on the CPU and on CUDA GPUs."""

from __future__ import annotations

import functools
import resource
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from star_attention import ops
from star_attention.distributed import Communicator, SingleProcess
from star_attention.engines.base import Limits, PagedStep, is_decode_step
from star_attention.engines.page_copies import split_kept
from star_attention.engines.torch.attention import (
    Attention,
    QuantizedKv,
    attention_on,
    to_device,
)
from star_attention.engines.torch.graphs import DecodeGraphs
from star_attention.engines.torch.kv_pool import KvPool
from star_attention.engines.torch.operators import PassInputs, Rows, TorchOperators
from star_attention.engines.torch.page_copies import TorchPageCopies
from star_attention.models.config import ModelConfig
from star_attention.models.decoder import decode
from star_attention.models.rotary import key_centers, rotary_table
from star_attention.models.weights import ModelWeights
from star_attention.ops.quantized import QuantizedRows

# The rotary table grows by so many positions at a time.
_POSITIONS = 65536
# Tokens of a pass whose layers are worth telling of; shorter ones are over at once.
_LONG_PASS = 4096
# A pass without logits is not waited for in its last layers: the GPU has them to do while the host
# prepares the next one. The last is short, it only stores KV.
_LAYERS_AHEAD = 2


class TorchEngine:
    """Runs a Llama-family model on one device. See `ModelEngine`.

    On a GPU, steps of one token a sequence are replays of CUDA graphs; see `DecodeGraphs`.

    Args:
        config: the model's shape.
        weights: on the device and in the dtype to compute with, projections also in FP8.
        comm: connects the ranks; reaches the device's memory.
        tokens_per_block: tokens a page holds.
        max_pages: pages of the KV pool, allocated at once; None: it grows (CPU only).
        kv_dtype: `fp8` or `int8`: contexts are quantised once they are read; `auto`: not.
        group: the ranks that have the other parts of `weights`, and the same tokens (tensor
            parallelism); `comm` connects this rank with those that have the same part.
    """

    has_exchanges = has_hops = has_prefix = True

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights[Rows],
        comm: Communicator,
        tokens_per_block: int = 128,
        max_pages: int | None = None,
        group: Communicator | None = None,
        kv_dtype: str = "auto",
    ) -> None:
        self.config = config
        self.tokens_per_block = tokens_per_block
        self.wait_seconds = 0.0
        self._group = group or SingleProcess()
        self._part = config.shard(self._group.size)
        self._weights = weights
        self._comm = comm
        embedding = weights.embedding
        self.dtype = str(embedding.dtype).removeprefix("torch.")
        every = (each for layer in weights.layers for each in vars(layer).values())
        kinds = (each.kind for each in every if isinstance(each, QuantizedRows))
        self.quantization = next(kinds, None)
        self._device = embedding.device
        self._scale = config.attention_scale
        on_gpu = self._device.type == "cuda"
        self.has_selection = not on_gpu or tokens_per_block == ops.CUDA_SELECTED_PAGE
        # On a GPU it is there before memory is divided up, and no graph is lost to its growth.
        self._make_rotary(config.max_position if on_gpu else 0)
        self.kv_dtype = kv_dtype
        self.kv_packing = 1 if kv_dtype == "auto" else embedding.itemsize
        self._pool = KvPool(
            self._part,
            tokens_per_block,
            embedding.dtype,
            self._device,
            max_pages,
            None if kv_dtype == "auto" else kv_dtype,
            None if kv_dtype == "auto" else key_centers(self._part, weights),
        )
        self._peers = comm.map_peers(self._pool.data) if on_gpu and comm.size > 1 else None
        self._copies = TorchPageCopies(self._device, self.kv_packing)
        self.limits = Limits(pages=max_pages)
        self._under_way: list[Attention] = []  # of passes, the last of which may not be over
        self._reads_peers = False  # or did, since ranks have met
        self._graphs: DecodeGraphs | None = None
        if on_gpu and comm.capturable and self._group.capturable:
            forward = functools.partial(self._forward, is_captured=True)
            self._graphs = DecodeGraphs(
                forward,
                comm,
                self._scale,
                self._device,
                max_pages,
                tokens_per_block,
                self._quantized,
                config.window,
                config.windowed_layers,
            )

    @property
    def graph_steps(self) -> int:
        return self._graphs.replays if self._graphs else 0

    @property
    def peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def page_bytes(self) -> int:
        itemsize = self._pool.data.itemsize
        return self._part.kv_bytes(self.tokens_per_block, itemsize) // self._part.num_layers

    def reserve_pages(self, num_pages: int) -> None:
        self._pool.reserve(num_pages)

    def reserve_positions(self, positions: int) -> None:
        if positions * self.config.rope.rows_per_position > len(self._rotary):
            rows = -(-positions // _POSITIONS) * _POSITIONS
            if positions <= self.config.max_position < rows:
                rows = self.config.max_position
            self._rotary = self._window_rotary = None  # never two tables at a time
            self._make_rotary(rows)
            if self._graphs:
                self._graphs.clear()

    @property
    def kept_dtype(self) -> str:
        if self.kv_packing == 1:
            return self.dtype
        centred = "" if self._pool.centers is None else ", centred keys"
        return f"{self.dtype} in {self.kv_dtype}{centred}"

    @property
    def _quantized(self) -> QuantizedKv | None:
        if self.kv_packing == 1:
            return None
        return QuantizedKv(self._pool.codes, self._pool.scales, self._pool.centers)

    @property
    def kept_page_bytes(self) -> int:
        if self.kv_packing == 1:
            return self.page_bytes
        return self._part.kept_kv_bytes(self.tokens_per_block) // self._part.num_layers

    def quantize_pages(self, pages: np.ndarray, tokens: np.ndarray) -> None:
        listed = pages.tolist()
        self._copies.before(listed, listed)
        self._pool.quantize(*(to_device(array, self._device) for array in (pages, tokens)))

    def dequantize_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._copies.before((sources // self.kv_packing).tolist(), targets.tolist())
        self._pool.dequantize(*(to_device(array, self._device) for array in (sources, targets)))

    def copy_page(self, source: int, target: int) -> None:
        self._copies.before([source], [target])
        self._pool.copy_page(source, target)

    def read_layer(self, layer: int, pages: Sequence[int], out: np.ndarray) -> None:
        for pool, host in self._kept(layer, out):
            self._copies.read(pool, pages, host)

    def write_layer(self, layer: int, pages: Sequence[int], data: np.ndarray) -> None:
        for pool, host in self._kept(layer, data):
            self._copies.write(pool, pages, host)

    def _kept(self, layer: int, host: np.ndarray) -> list[tuple[torch.Tensor, np.ndarray]]:
        """A layer of what is kept of contexts, and where it is in `host`."""
        if self.kv_packing == 1:
            return [(self._pool.data[layer], host)]
        pools = self._pool.codes[layer], self._pool.scales[layer]
        return list(zip(pools, split_kept(host, pools[0][0].nbytes), strict=True))

    def finish_copies(self) -> None:
        self._copies.finish()

    def pin(self, buffer: np.ndarray) -> None:
        self._copies.pin(buffer)

    def unpin(self, buffer: np.ndarray) -> None:
        self._copies.unpin(buffer)

    def close(self) -> None:
        self.finish_copies()
        if self._graphs:
            self._graphs.clear()
        self._graphs = self._peers = self._pool = self._weights = None
        self._rotary = self._window_rotary = None
        for comm in (self._comm, self._group):
            comm.close()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def step(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        attention: PagedStep,
        logit_rows: np.ndarray,
        on_layer: Callable[[float], None] | None = None,
    ) -> torch.Tensor:
        beyond = int(positions.max(initial=-1)) + 1
        if beyond > len(self._rotary):
            raise ValueError(
                f"row {beyond - 1} of the rotary table is not there: reserve_positions comes first"
            )
        self._copies.before_step(attention, self.tokens_per_block)
        try:
            if self._graphs and is_decode_step(attention, logit_rows):
                logits = self._graphs.step(token_ids, positions, attention)
                self._wait()
                return logits
            peers = self._peers and self._peers.addresses
            attend = attention_on(
                attention,
                self._comm,
                self._scale,
                self._pool.data,
                peers,
                self._quantized,
                self.config.windowed_layers,
                self.config.score_cap,
            )
            self._reads_peers |= attend.reads_peers
            inputs = self._to_device(token_ids, positions, attention.slot_mapping, logit_rows)
            progress = _Progress(self.config.num_layers, self._device, on_layer, len(token_ids))
            logits = self._forward(inputs, attend, progress)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"{len(token_ids)} tokens in one pass do not fit beside the KV cache: use more "
                f"ranks, smaller blocks or a smaller --kv-cache-gib ({error})"
            ) from None
        attend.end()
        self._under_way.append(attend)
        self._wait(None if len(logit_rows) else progress.nearly_over)
        return logits

    def finish_steps(self) -> None:
        self._wait()
        if self._reads_peers:
            self._comm.gather_objects(None)
        self._reads_peers = False

    def _forward(
        self,
        inputs: PassInputs,
        attention: Attention,
        on_layer: Callable[[int], None] = lambda layer: None,
        is_captured: bool = False,
    ) -> torch.Tensor:
        operators = TorchOperators(
            self._part,
            inputs,
            self._pool.data,
            self._rotary,
            attention,
            self._group,
            is_captured,
            self._window_rotary,
        )
        logits = decode(operators, self._weights, on_layer)
        if logits is None:
            return torch.empty(0, self.config.vocab_size, device=self._device)
        return logits

    def _to_device(self, *arrays: np.ndarray) -> PassInputs:
        *tokens, logit_rows = arrays
        wants_all = np.array_equal(logit_rows, np.arange(len(tokens[0])))
        return PassInputs(
            *(to_device(array, self._device) for array in tokens),
            None if wants_all and len(logit_rows) else to_device(logit_rows, self._device),
        )

    def _wait(self, nearly_over: torch.cuda.Event | None = None) -> None:
        """For all steps, or for the last one to come so far."""
        if self._device.type == "cuda":
            (nearly_over or torch.cuda.current_stream()).synchronize()
            self._comm.check()
            self._group.check()
        over = len(self._under_way) - (nearly_over is not None)
        self.wait_seconds += sum(attend.wait_seconds for attend in self._under_way[:over])
        del self._under_way[:over]

    def _make_rotary(self, positions: int) -> None:
        config = self.config
        tables = [
            rope and rotary_table(rope, config.head_dim, positions, self._device)
            for rope in (config.rope, config.window_rope)
        ]
        self._rotary, self._window_rotary = tables


class _Progress:
    """To be told of each layer of a pass that is enqueued.

    Tells `on_layer` of the share of layers that are done, and lets the host run at most a layer
    ahead of a GPU then, so that it is true: in a long pass only, as the host may be the slower one.

    Attributes:
        nearly_over: on a GPU, when all but the last layers are done; None: there are only those.
    """

    def __init__(
        self,
        num_layers: int,
        device: torch.device,
        on_layer: Callable[[float], None] | None,
        tokens: int,
    ) -> None:
        self._num_layers, self._on_layer = num_layers, on_layer
        self._on_gpu = device.type == "cuda"
        self._tells = on_layer is not None and (not self._on_gpu or tokens >= _LONG_PASS)
        self._done: deque[torch.cuda.Event] = deque()
        self.nearly_over: torch.cuda.Event | None = None

    def __call__(self, layer: int) -> None:
        left = self._num_layers - 1 - layer
        if self._on_gpu and (self._tells or left == _LAYERS_AHEAD):
            event = torch.cuda.Event()
            event.record()
            self._done.append(event)
            if left == _LAYERS_AHEAD:
                self.nearly_over = event
        if self._tells:
            if len(self._done) > 1:
                self._done.popleft().synchronize()
            self._on_layer((layer + 1) / self._num_layers)
