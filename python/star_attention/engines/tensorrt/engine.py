"""The model as a TensorRT engine. Buffers are CuPy's; nothing here needs torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from star_attention.distributed import Communicator
from star_attention.distributed.base import agree, require_same
from star_attention.distributed.topology import local_device
from star_attention.engines.base import (
    Exchange,
    Limits,
    PagedStep,
    Pages,
    is_decode_step,
    padded_count,
    runs_of,
)
from star_attention.engines.options import EngineOptions
from star_attention.engines.page_copies import split_kept
from star_attention.engines.tensorrt.folder import ROTARY, EngineConfig, plan_file
from star_attention.engines.tensorrt.library import gpu_of, load_tensorrt, require_cupy, session_log
from star_attention.engines.tensorrt.page_copies import CupyPageCopies
from star_attention.engines.tensorrt.read import read_engine_config
from star_attention.errors import RankError, UserError
from star_attention.trtllm.engine_folder import load_plugins

CONTEXT, GENERATION = 0, 1  # an engine's profiles
_ALIGNMENT = 64  # int32 elements: TensorRT takes tensors at multiples of 256 bytes
# Tokens of all questions of a pass, over several ranks: their partial attention takes memory.
_MAX_MERGE_TOKENS = 4096


class _Inputs(NamedTuple):
    """Of each of a step's int32 inputs something: values, a shape, a piece of memory. Those of the
    prefix are the step's context's, and mean nothing without one; all others the engine's."""

    input_ids: Any
    position_ids: Any
    slot_mapping: Any
    cu_seqlens_q: Any
    kv_lens: Any
    page_table: Any
    logit_rows: Any
    prefix_kv_lens: Any
    prefix_page_table: Any

    def of_engine(self) -> dict[str, Any]:
        return {name: x for name, x in self._asdict().items() if not name.startswith("prefix_")}


class TensorRtEngine:
    """Runs a TensorRT engine on this rank's GPU. See `ModelEngine`.

    Steps of one token a sequence take the generation profile and are captured in a CUDA graph, one
    for each of a few padded numbers of sequences; all others take the context profile.

    Args:
        folder: the engine's.
        comm: connects the ranks; a `GpuCommunicator` if there are several.
        device: this rank's GPU, CuPy's current one.
        kv_dtype: `fp8` or `int8`: contexts are quantised once they are read; `auto`: not.

    Raises:
        UserError: the engine cannot run here.
    """

    # A prefix in 8 bits is one of each sequence, not of several.
    has_hops = has_prefix = has_selection = False

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        comm: Communicator,
        device: int,
        kv_dtype: str = "auto",
    ) -> None:
        import cupy

        self._cupy = cupy
        self._trt = load_tensorrt()
        self._check_machine(config, device)
        self.config, self._built = config.model, config.limits
        self.tokens_per_block, self.dtype = config.limits.tokens_per_block, config.dtype
        self.quantization = config.quantization
        self.kv_dtype = kv_dtype
        self.kv_packing = 1 if kv_dtype == "auto" else 2
        self.kept_dtype = self.dtype if kv_dtype == "auto" else f"{self.dtype} in {kv_dtype}"
        self.has_exchanges = comm.size == 1 or comm.nccl is not None
        self.wait_seconds = 0.0
        self.graph_steps = 0
        self._comm = comm
        self._device = device
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._log = session_log()
        try:
            self._session = self._trt.Session(str(plan_file(folder)), device, self._log)
            self._execution = self._session.execution(CONTEXT)
        except (RuntimeError, ValueError) as error:
            raise self._log.explain(error) from None
        self._rotary = self._read_rotary(folder / ROTARY)
        self._workspace = self._make_workspace()
        self._copies = CupyPageCopies(cupy, device, self._stream, self.kv_packing)
        self.allocate_pool(0)
        self._graphs: dict[int, _DecodeGraph] = {}  # by sequences

    @property
    def peak_memory_bytes(self) -> int:
        ours = self._cupy.get_default_memory_pool().total_bytes()
        return self._session.weight_bytes + self._session.activation_bytes + ours

    @property
    def memory_report(self) -> dict[str, int]:
        """Bytes of device memory by use."""
        return {
            "weights": self._session.weight_bytes,
            "activations": self._session.activation_bytes,
            "kv_cache": self._pool.nbytes + (0 if self._scales is None else self._scales.nbytes),
            "workspace": self._workspace.nbytes,
        }

    @property
    def kept_page_bytes(self) -> int:
        if self.kv_packing == 1:
            return self.page_bytes
        return self.config.kept_kv_bytes(self.tokens_per_block) // self.config.num_layers

    @property
    def page_bytes(self) -> int:
        config = self.config
        return config.kv_bytes(self.tokens_per_block, self._pool.itemsize) // config.num_layers

    def allocate_pool(self, num_pages: int) -> None:
        """Makes room for so many pages, once, before the first step."""
        shape = self.config.kv_shape(num_pages, self.tokens_per_block)
        # Nobody but the kernels knows the type of its 16-bit elements.
        self._pool = self._cupy.empty(shape, self._cupy.uint16)
        self._codes = self._scales = None
        if self.kv_packing > 1 and num_pages:
            layers, pages, *page = shape
            self._codes = self._pool.view(self._cupy.uint8).reshape(layers, 2 * pages, *page)
            self._scales = self._cupy.empty(self._codes.shape[:4], self._cupy.float32)
        built = self._built
        questions = built.max_num_tokens
        if self._merges:
            questions = min(questions, _MAX_MERGE_TOKENS)
        self.limits = Limits(
            pages=num_pages,
            pass_tokens=built.max_num_tokens,
            pass_sequences=built.max_sequences,
            question_tokens=questions,
            questions=built.max_batch_size,
            input_len=built.max_input_len,
            seq_len=built.max_seq_len,
        )

    @property
    def _merges(self) -> bool:
        """Whether questions' attention is merged, over ranks or with a prefix."""
        return self._comm.size > 1 or self.kv_packing > 1

    def quantize_pages(self, pages: np.ndarray, tokens: np.ndarray) -> None:
        listed = pages.tolist()
        self._copies.before(listed, listed)
        self._convert(self._trt.quantize_pages, pages=pages, tokens=tokens)

    def dequantize_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._copies.before((sources // self.kv_packing).tolist(), targets.tolist())
        self._convert(self._trt.dequantize_pages, pages=sources, targets=targets)

    def _convert(self, convert: Callable[..., None], **lists: np.ndarray) -> None:
        with self._stream:
            convert(
                kv_pool=self._pool,
                scales=self._scales,
                **{name: self._cupy.asarray(each) for name, each in lists.items()},
                dtype=self.dtype,
                kv_dtype=self.kv_dtype,
                stream=self._stream.ptr,
            )

    def reserve_pages(self, num_pages: int) -> None:
        if num_pages > self._pool.shape[1]:
            raise ValueError(f"{num_pages} pages are asked for, there are {self._pool.shape[1]}")

    def reserve_positions(self, positions: int) -> None:
        if positions > self._built.max_seq_len:
            raise ValueError(
                f"{positions} positions are asked for, the engine has {self._built.max_seq_len}"
            )

    def close(self) -> None:
        self.finish_copies()
        self._graphs.clear()
        self._execution = self._session = self._workspace = self._rotary = None
        self._pool = self._codes = self._scales = None
        self._comm.close()
        self._cupy.get_default_memory_pool().free_all_blocks()

    def copy_page(self, source: int, target: int) -> None:
        self._copies.before([source], [target])
        with self._stream:
            self._pool[:, target] = self._pool[:, source]

    def read_layer(self, layer: int, pages: Sequence[int], out: np.ndarray) -> None:
        for pool, host in self._kept(layer, out):
            self._copies.read(pool, pages, host)

    def write_layer(self, layer: int, pages: Sequence[int], data: np.ndarray) -> None:
        for pool, host in self._kept(layer, data):
            self._copies.write(pool, pages, host)

    def _kept(self, layer: int, host: np.ndarray) -> list[tuple[Any, np.ndarray]]:
        """A layer of what is kept of contexts, and where it is in `host`."""
        if self.kv_packing == 1:
            return [(self._pool[layer], host)]
        pools = self._codes[layer], self._scales[layer]
        return list(zip(pools, split_kept(host, pools[0][0].nbytes), strict=True))

    def finish_steps(self) -> None:
        """They are."""

    def finish_copies(self) -> None:
        self._copies.finish()

    def pin(self, buffer: np.ndarray) -> None:
        self._copies.pin(buffer)

    def unpin(self, buffer: np.ndarray) -> None:
        self._copies.unpin(buffer)

    def step(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        attention: PagedStep,
        logit_rows: np.ndarray,
        on_layer: Callable[[float], None] | None = None,
    ) -> Any:
        assert not attention.hops
        decodes = is_decode_step(attention, logit_rows)
        self._check_step(positions, attention, len(logit_rows), decodes)
        self._copies.before_step(attention, self.tokens_per_block)
        with self._stream:
            try:
                if decodes:
                    logits = self._decode(token_ids, positions, attention)
                else:
                    logits = self._run(token_ids, positions, attention, logit_rows)
                self._stream.synchronize()
            except RuntimeError as error:
                raise RankError(str(self._log.explain(error))) from None
        self._comm.check()
        return logits

    def _run(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        step: PagedStep,
        logit_rows: np.ndarray,
    ) -> Any:
        wanted = len(logit_rows)
        inputs = _not_empty(
            _Inputs(
                token_ids,
                positions,
                step.slot_mapping,
                step.cu_seqlens_q,
                step.kv_lens,
                step.page_table,
                logit_rows,
                *self._prefix(step),
            )
        )
        exchange = self._page_exchange(step.exchanges)
        context = self._context(step, attends_last=wanted > 0, exchange=exchange)
        context.max_q_len = int(np.diff(inputs.cu_seqlens_q).max())
        context.max_kv_len = int(inputs.kv_lens.max())
        arrays = _InputArrays(self._cupy, _Inputs(*(array.shape for array in inputs)))
        for array, value in zip(arrays.host, inputs, strict=True):
            array[...] = value
        logits = self._bind(self._execution, arrays, context)
        if step.prefix:
            self._set_prefix(context, arrays, int(inputs.prefix_kv_lens.max()))
        arrays.upload()
        self._execution.enqueue(self._stream.ptr)
        self._stream.synchronize()
        if exchange:
            self.wait_seconds += exchange.wait_seconds()
        self._count_traffic(len(token_ids), step)
        return logits[:wanted]

    def _decode(self, token_ids: np.ndarray, positions: np.ndarray, step: PagedStep) -> Any:
        count = min(padded_count(len(step.kv_lens)), self._built.max_batch_size)
        graph = self._graphs.get(count)
        if graph is None:
            graph = self._graphs[count] = _DecodeGraph(self, count, step)
        logits = graph.run(token_ids, positions, step)
        self._count_traffic(count, step)
        return logits[: len(step.kv_lens)]

    def _bind(self, execution: Any, inputs: _InputArrays, context: Any) -> Any:
        """Gives a step its tensors and returns the one for its logits."""
        cupy = self._cupy
        for name, array in inputs.device.of_engine().items():
            execution.bind(name, array)
        execution.bind("rotary", self._rotary)
        execution.bind_context(context)
        rows = len(inputs.host.logit_rows)
        logits = cupy.empty((rows, self.config.vocab_size), cupy.float32)
        execution.bind("logits", logits)
        return logits

    def _context(self, step: PagedStep, *, attends_last: bool, exchange: Any = None) -> Any:
        merges = step.merge and self._comm.size > 1
        return self._trt.StepContext(
            kv_pool=self._pool,
            causal=step.causal,
            max_q_len=1,
            max_kv_len=0,
            attending_layers=self.config.num_layers - (not attends_last),
            merge=self._comm.rank_merge if merges else None,
            exchange=exchange,
            workspace=self._workspace,
        )

    def _prefix(self, step: PagedStep) -> tuple[np.ndarray, np.ndarray]:
        """Lengths and pages of what stands in front of each sequence's."""
        if step.prefix is None:
            return np.zeros(1, np.int32), np.zeros((1, 1), np.int32)
        assert np.array_equal(step.prefix.cu_seqlens_q, step.cu_seqlens_q)
        return step.prefix.kv_lens, step.prefix.page_table

    def _set_prefix(self, context: Any, inputs: _InputArrays, max_kv_len: int) -> None:
        context.set_prefix(
            scales=self._scales,
            kv_dtype=self.kv_dtype,
            page_table=inputs.device.prefix_page_table,
            kv_lens=inputs.device.prefix_kv_lens,
            max_kv_len=max_kv_len,
        )

    def _page_exchange(self, exchanges: Sequence[Exchange]) -> Any:
        if not exchanges or self._comm.size == 1:
            return None
        return self._trt.PageExchange(self._comm.nccl, *exchange_runs(exchanges, self._comm))

    def _check_step(
        self, positions: np.ndarray, step: PagedStep, num_rows: int, decodes: bool
    ) -> None:
        """Raises ValueError for a step beyond `limits`, which no rank may be given."""
        built, limits = self._built, self.limits
        merges = step.merge and self._merges
        if step.exchanges and not self.has_exchanges:
            raise UserError(
                "TensorRT engines share phase 1 among ranks with a GPU each only: use as many GPUs "
                "as ranks, or --anchor-mode local"
            )
        for what, needed, most in (
            ("rotary rows", int(positions.max(initial=-1)) + 1, len(self._rotary)),
            ("tokens", len(positions), limits.question_tokens if merges else limits.pass_tokens),
            ("sequences", len(step.kv_lens), limits.questions if decodes else built.max_sequences),
            ("rows of logits", num_rows, built.max_logit_rows),
        ):
            if needed > most:
                raise ValueError(f"a step of {needed} {what}, the engine takes {most}")

    def _check_machine(self, config: EngineConfig, device: int) -> None:
        name, capability = gpu_of(device)
        if capability != config.compute_capability:
            raise UserError(
                f"the engine was built for {config.gpu} (compute capability "
                f"{config.compute_capability}), this GPU is {name} ({capability}): "
                "build it on this machine"
            )
        if self._trt.version() != config.tensorrt:
            raise UserError(
                f"the engine was built with TensorRT {config.tensorrt}, here is "
                f"{self._trt.version()}: build it again, or name the other's folder"
            )

    def _count_traffic(self, tokens: int, step: PagedStep) -> None:
        """What the plugin sends and receives, per peer, as `GpuCommunicator` counts."""
        config, peers = self.config, self._comm.size - 1
        traffic = self._comm.traffic
        if step.merge and peers:
            each = 4 * config.num_q_heads * (config.head_dim + 1)
            merged = each * tokens * config.num_layers * peers
            traffic.sent += merged
            traffic.received += merged
        each = self.page_bytes * config.num_layers
        for exchange in step.exchanges:
            traffic.sent += each * sum(len(part.pages) for part in exchange.sends)
            traffic.received += each * sum(len(part.pages) for part in exchange.receives)

    def _read_rotary(self, path: Path) -> Any:
        table = np.memmap(path, np.float32, "r").reshape(-1, self.config.head_dim)
        if len(table) != self._built.max_seq_len * self.config.rope.rows_per_position:
            raise UserError(f"{path} is damaged: build the engine again")
        return self._cupy.asarray(table)

    def _make_workspace(self) -> Any:
        config = self.config
        size = self._trt.step_workspace_bytes(
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_q_len=self._built.max_num_tokens,
            max_merge_tokens=_MAX_MERGE_TOKENS if self._merges else 0,
            has_prefix=self.kv_packing > 1,
            device=self._device,
        )
        return self._cupy.empty(size, self._cupy.uint8)


Run = tuple[int, int, int]  # of another rank: its number, the first page, how many


def exchange_runs(exchanges: Iterable[Exchange], comm: Communicator) -> tuple[list[Run], list[Run]]:
    """What this rank sends and receives in each layer, in runs of consecutive pages: the runs of
    one rank to another have the same lengths on both. Every rank of the job takes part."""
    sends = _by_rank(exchange.sends for exchange in exchanges)
    receives = _by_rank(exchange.receives for exchange in exchanges)
    every = comm.gather_objects((sends, receives))

    def cut(mine: dict[int, np.ndarray], other_way: int) -> list[Run]:
        runs = []
        for rank, pages in mine.items():
            theirs = every[rank][other_way].get(comm.rank, ())
            if len(pages) != len(theirs):
                raise ValueError(f"{len(pages)} pages here are {len(theirs)} on rank {rank}")
            runs += [(rank, *run) for run in runs_of(pages, (pages, theirs))]
        return runs

    return cut(sends, 1), cut(receives, 0)


def _by_rank(parts: Iterable[Sequence[Pages]]) -> dict[int, np.ndarray]:
    """All pages that go to, or come from, each rank."""
    lists: dict[int, list[np.ndarray]] = {}
    for part in itertools.chain.from_iterable(parts):
        lists.setdefault(part.rank, []).append(part.pages)
    return {rank: np.concatenate(pages) for rank, pages in lists.items()}


def _not_empty(inputs: _Inputs) -> _Inputs:
    """TensorRT knows no empty tensors: a token that is not kept stands for none, row 0 for none."""
    if not len(inputs.input_ids):
        zero = np.zeros(1, np.int32)
        nowhere, starts = np.full(1, -1, np.int32), np.array([0, 1], np.int32)
        return inputs._replace(
            input_ids=zero,
            position_ids=zero,
            slot_mapping=nowhere,
            cu_seqlens_q=starts,
            kv_lens=zero,
            page_table=zero[None],
            logit_rows=zero,
        )
    if not len(inputs.logit_rows):
        inputs = inputs._replace(logit_rows=np.zeros(1, np.int32))
    if not inputs.page_table.shape[1]:
        inputs = inputs._replace(page_table=np.zeros((len(inputs.kv_lens), 1), np.int32))
    if not inputs.prefix_page_table.shape[1]:
        none = np.zeros((len(inputs.prefix_kv_lens), 1), np.int32)
        inputs = inputs._replace(prefix_page_table=none)
    return inputs


class _InputArrays:
    """A step's int32 inputs, in one piece of host and one of device memory.

    Attributes:
        host, device: views of them.
    """

    def __init__(self, cupy: Any, shapes: _Inputs) -> None:
        import cupyx

        sizes = [int(np.prod(shape)) for shape in shapes]
        starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)])
        self._pinned = cupyx.zeros_pinned(int(starts[-1]), np.int32)
        self._memory = cupy.empty(int(starts[-1]), np.int32)

        def views(whole: Any) -> _Inputs:
            return _Inputs(
                *(
                    whole[start : start + size].reshape(shape)
                    for start, size, shape in zip(starts[:-1], sizes, shapes, strict=True)
                )
            )

        self.host, self.device = views(self._pinned), views(self._memory)

    def upload(self) -> None:
        """Follows what CuPy's current stream holds."""
        self._memory.set(self._pinned)


class _DecodeGraph:
    """One token for each of `count` sequences. The first step runs as it is, which prepares
    TensorRT for its shapes, and is captured then; the others replay it."""

    def __init__(self, engine: TensorRtEngine, count: int, step: PagedStep) -> None:
        page = engine.tokens_per_block
        width = min(engine.limits.pages, engine._built.max_pages_of_sequence)
        each, prefixes, prefix_width = (count,), 1, 1
        if step.prefix:
            prefixes = count
            prefix_width = min(
                engine.kv_packing * engine.limits.pages, engine._built.max_pages_of_sequence
            )
        shapes = _Inputs(
            each,
            each,
            each,
            (count + 1,),
            each,
            (count, width),
            each,
            (prefixes,),
            (prefixes, prefix_width),
        )
        self._engine, self._stream = engine, engine._stream
        self._execution = engine._session.execution(GENERATION)
        self._inputs = _InputArrays(engine._cupy, shapes)
        self._context = engine._context(step, attends_last=True)
        self._context.causal = False  # a row is the last of what it sees
        self._context.max_kv_len = width * page
        if step.prefix:
            engine._set_prefix(self._context, self._inputs, prefix_width * page)
        self._graph: Any = None
        self._logits = engine._bind(self._execution, self._inputs, self._context)
        self._inputs.host.cu_seqlens_q[:] = np.arange(count + 1)
        self._inputs.host.logit_rows[:] = np.arange(count)

    def run(self, token_ids: np.ndarray, positions: np.ndarray, step: PagedStep) -> Any:
        host, count = self._inputs.host, len(token_ids)
        for array, given, beyond in (  # rows beyond the sequences store and see nothing
            (host.input_ids, token_ids, 0),
            (host.position_ids, positions, 0),
            (host.slot_mapping, step.slot_mapping, -1),
            (host.kv_lens, step.kv_lens, 0),
        ):
            array[:count] = given
            array[count:] = beyond
        host.page_table[:count, : step.page_table.shape[1]] = step.page_table
        if step.prefix:
            lens, table = self._engine._prefix(step)
            host.prefix_kv_lens[:count], host.prefix_kv_lens[count:] = lens, 0
            host.prefix_page_table[:count, : table.shape[1]] = table
        self._inputs.upload()
        if self._graph:
            self._graph.launch(self._stream.ptr)
            self._engine.graph_steps += 1
        else:
            self._execution.enqueue(self._stream.ptr)
            self._stream.synchronize()
            self._graph = self._execution.capture(self._stream.ptr)
        return self._logits


def load_trt_engine(folder: Path, comm: Communicator, options: EngineOptions) -> TensorRtEngine:
    """The engine of `folder` on this rank; every rank of the job takes part.

    Args:
        comm: of all ranks, for host memory.

    Raises:
        UserError: on every rank, if it cannot run on any.
    """

    def prepare() -> EngineConfig:
        require_cupy()
        load_tensorrt()
        load_plugins(folder)
        return read_engine_config(folder)

    config = agree(comm, prepare)
    require_same(comm, weights=config.weights_sha256, engine=config.tensorrt)
    ranks = config.limits.cp_size
    if ranks is not None and ranks != comm.size:
        raise UserError(
            f"the engine was built for --cp_size {ranks}, there are {comm.size} ranks: use "
            f"mpirun -n {ranks}, or build it without --cp_size"
        )
    if options.kv_dtype == "fp8" and config.model.qkv_bias:
        raise UserError(
            "--kv-dtype is fp8, but the model adds a bias to its keys, whose largest values FP8 "
            "rounds by more than the others differ: use int8, or auto"
        )
    import cupy

    from star_attention.distributed.gpu import GpuCommunicator

    device = local_device(comm)
    cupy.cuda.Device(device).use()
    ranks_here = 1
    if comm.size > 1:
        comm = GpuCommunicator(comm, device, merge=options.merge)
        agree(comm, lambda: _check_merge(comm))
        ranks_here = comm.ranks_here
    engine = agree(comm, lambda: TensorRtEngine(folder, config, comm, device, options.kv_dtype))
    page_bytes = config.model.kv_bytes(config.limits.tokens_per_block, itemsize=2)
    if engine.kv_packing > 1:  # with room for scales
        page_bytes = engine.kv_packing * config.model.kept_kv_bytes(config.limits.tokens_per_block)
    free, _ = cupy.cuda.runtime.memGetInfo()
    pages = agree(comm, lambda: options.kv_cache_bytes(free // ranks_here)) // page_bytes
    engine.allocate_pool(min(comm.gather_objects(pages)))
    return engine


def _check_merge(comm: Any) -> None:
    if comm.rank_merge is None:
        raise UserError(
            "ranks that share a GPU merge over peer memory, which these cannot reach: "
            "use a GPU for each rank"
        )
