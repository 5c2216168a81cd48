"""From a model's files to an engine on this rank."""

from __future__ import annotations

import functools
import importlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from star_attention.config import MERGE_PATHS, MergePath, StarConfig
from star_attention.distributed import Communicator
from star_attention.distributed.base import agree
from star_attention.engines.base import ModelEngine
from star_attention.errors import UserError
from star_attention.models.checkpoint import is_engine_folder
from star_attention.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from star_attention.models.llama import LlamaWeights

LoadFormat = Literal["auto", "dummy"]
LOAD_FORMATS: tuple[LoadFormat, ...] = ("auto", "dummy")
# What each device computes in; the first is the default.
DTYPES = {"cpu": ("float32", "bfloat16", "float16"), "cuda": ("bfloat16", "float16")}
# Share of a GPU's free memory that the KV cache takes; activations of long blocks need the rest.
_KV_CACHE_SHARE = 0.8


@dataclass(frozen=True)
class EngineOptions:
    """How a model is computed on a rank.

    Attributes:
        device: `cpu` or `cuda`; on `cuda`, ranks of a machine take its GPUs in turn.
        dtype: `float32` (the CPU's default), `bfloat16` (CUDA's) or `float16`.
        load_format: `dummy`: random weights for the model's config, to try speed and memory.
        kv_cache_gib: memory of the KV cache on a GPU; None: 0.8 of what the weights leave free.
        merge: how ranks on GPUs merge attention: over `peer` memory, `nccl`, or `auto`.
        tp: processes that share a rank's model (tensor parallelism), neighbours in the job.
    """

    device: str = "cpu"
    dtype: str | None = None
    load_format: LoadFormat = "auto"
    kv_cache_gib: float | None = None
    merge: MergePath = "auto"
    tp: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("device", tuple(DTYPES)),
            ("load_format", LOAD_FORMATS),
            ("merge", MERGE_PATHS),
        ):
            if getattr(self, name) not in allowed:
                option = "--" + name.replace("_", "-")
                raise UserError(
                    f"{option} is {getattr(self, name)!r}: use one of {', '.join(allowed)}"
                )
        if self.dtype not in (None, *DTYPES[self.device]):
            raise UserError(
                f"--dtype is {self.dtype!r} with --device {self.device}: "
                f"use {' or '.join(DTYPES[self.device])}"
            )
        if self.kv_cache_gib is not None and self.kv_cache_gib <= 0:
            raise UserError(f"--kv-cache-gib is {self.kv_cache_gib}: use more than 0")
        if self.tp < 1:
            raise UserError(f"--tp is {self.tp}: use 1 or more")
        if self.tp > 1 and self.device == "cpu" and self.dtype not in (None, "float32"):
            raise UserError(f"--tp {self.tp} on the CPU computes in float32, not {self.dtype}")


def star_ranks(world: Communicator, tp: int) -> Communicator:
    """The ranks of Star Attention: those of the job that have the same part of the model.

    Raises:
        UserError: tp does not divide the job's processes.
    """
    if world.size % tp:
        raise UserError(f"--tp is {tp}, which does not divide the {world.size} processes")
    return world if tp == 1 else world.split(world.rank % tp)


def division_of(path: Path, config: StarConfig, options: EngineOptions) -> StarConfig:
    """`config`, completed by what a TensorRT engine was built for, if `path` is one's folder.

    Raises:
        UserError: the engine allows neither this nor `options`.
    """
    if not is_engine_folder(path):
        return config
    from star_attention.engines.tensorrt.folder import read_engine_config

    engine = read_engine_config(path)
    if options.dtype not in (None, engine.dtype):
        raise UserError(
            f"--dtype is {options.dtype}, but the engine computes in {engine.dtype}: leave it away"
        )
    if options.tp > 1:
        raise UserError(f"--tp is {options.tp}: TensorRT engines have no tensor parallelism")
    if options.load_format != "auto":
        raise UserError(f"--load-format is {options.load_format}: an engine has its weights")
    return engine.limits.divide(config)


def load_engine(
    path: Path, comm: Communicator, tokens_per_block: int, options: EngineOptions
) -> ModelEngine:
    """The TensorRT engine of the folder `path`, or the torch engine with the weights of `path`.
    Every process of the job takes part.

    Args:
        comm: `star_ranks` of the job.

    Raises:
        UserError: on every rank, if the weights cannot be used or a rank lacks the device or its
            memory.
    """
    if is_engine_folder(path):
        from star_attention.engines.tensorrt.engine import load_trt_engine

        share = functools.partial(_kv_cache_bytes, kv_cache_gib=options.kv_cache_gib)
        return load_trt_engine(path, comm, share, options.merge)

    from star_attention.models.checkpoint import open_checkpoint
    from star_attention.models.llama import load_weights

    checkpoint = agree(comm.world, lambda: open_checkpoint(path))
    if options.load_format == "dummy":
        return dummy_engine(checkpoint.config, comm, tokens_per_block, options)
    return _make_engine(
        checkpoint.config,
        functools.partial(load_weights, checkpoint),
        comm,
        tokens_per_block,
        options,
    )


def dummy_engine(
    config: ModelConfig, comm: Communicator, tokens_per_block: int, options: EngineOptions
) -> ModelEngine:
    """The torch engine with random weights, as `load_engine`."""
    from star_attention.models.llama import random_weights

    return _make_engine(
        config,
        functools.partial(random_weights, config),
        comm,
        tokens_per_block,
        options,
    )


def _make_engine(
    config: ModelConfig,
    make_weights: Callable[..., LlamaWeights],
    comm: Communicator,
    tokens_per_block: int,
    options: EngineOptions,
) -> ModelEngine:
    import torch

    from star_attention.engines.torch.engine import TorchEngine

    dtype = getattr(torch, options.dtype or DTYPES[options.device][0])
    device = torch.device("cpu")
    world = comm.world
    share_cores(world)
    group = world.split(world.rank // options.tp) if options.tp > 1 else None
    if options.device == "cuda":
        device = _take_gpu(world)
        comm = _on_gpu(comm, device, options.merge)
        group = group and _on_gpu(group, device, "nccl")

    def load() -> LlamaWeights:
        try:
            return make_weights(dtype, device, group.rank if group else 0, options.tp)
        except torch.OutOfMemoryError as error:
            raise UserError(f"the weights do not fit into the GPU's memory: {error}") from None

    weights = agree(world, load)
    max_pages = None
    if options.device == "cuda":
        page_bytes = config.shard(options.tp).kv_bytes(tokens_per_block, dtype.itemsize)
        room = agree(world, lambda: _kv_cache_bytes(_free_gpu_bytes(comm), options.kv_cache_gib))
        max_pages = min(world.gather_objects(room // page_bytes))
    return TorchEngine(config, weights, comm, tokens_per_block, max_pages, group)


def _take_gpu(world: Communicator) -> torch.device:
    """Makes this process's GPU torch's current one."""
    import torch

    def check() -> None:
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here: use --device cpu")
        try:
            importlib.import_module("star_attention.ops.cuda")
        except ImportError as error:
            raise UserError(f"--device cuda: {error}") from None

    agree(world, check)
    index = torch.cuda.current_device()
    if world.size > 1:
        from star_attention.distributed.gpu import local_device

        index = local_device(world)
        torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _on_gpu(comm: Communicator, device: torch.device, merge: MergePath) -> Communicator:
    """`comm`, but one that reaches the GPU."""
    if comm.size == 1:
        return comm
    from star_attention.distributed.gpu import GpuCommunicator

    return GpuCommunicator(comm, device.index, merge=merge)


def _free_gpu_bytes(comm: Communicator) -> int:
    """This rank's share of what the weights of all ranks have left of its GPU's memory."""
    import torch

    return torch.cuda.mem_get_info()[0] // (comm.ranks_here if comm.size > 1 else 1)


def _kv_cache_bytes(free: int, kv_cache_gib: float | None) -> int:
    """Memory that the KV cache may take of `free` bytes."""
    if kv_cache_gib is None:
        return int(_KV_CACHE_SHARE * free)
    if kv_cache_gib * 2**30 > free:
        raise UserError(
            f"--kv-cache-gib is {kv_cache_gib:g}, but the weights leave {free / 2**30:.1f} GiB for "
            f"this rank: use at most {_KV_CACHE_SHARE * free / 2**30:.1f}"
        )
    return int(kv_cache_gib * 2**30)


def share_cores(comm: Communicator) -> None:
    """Gives torch the cores that this rank may use, divided by the ranks that have the same ones,
    unless OMP_NUM_THREADS says otherwise. Every rank takes part."""
    import torch

    mine = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    sharing = comm.gather_objects(mine).count(mine)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(mine[1]) // sharing))
