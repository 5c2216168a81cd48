"""Weights, device and communicators of a torch engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from star_attention.distributed import Communicator
from star_attention.distributed.base import agree
from star_attention.distributed.topology import local_device, share_cores
from star_attention.engines.base import Limits
from star_attention.engines.options import (
    DTYPES,
    FP8_CAPABILITY,
    EngineOptions,
    check_gpu_model,
    free_memory,
)
from star_attention.engines.torch.engine import TorchEngine
from star_attention.engines.torch.memory import pass_limits
from star_attention.engines.torch.operators import Rows
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.models.quantization import Quantization
from star_attention.models.weights import ModelWeights


def load_torch_engine(
    config: ModelConfig,
    make_weights: Callable[..., ModelWeights[Rows]],
    comm: Communicator,
    tokens_per_block: int,
    options: EngineOptions,
) -> TorchEngine:
    """The engine of this process; every process of the job takes part.

    Args:
        make_weights: called with dtype, device, part, parts and quantization, as `load_weights`.
        comm: the ranks that have the same part of the model.

    Raises:
        UserError: on every rank, if one lacks the device or its memory.
    """
    dtype = getattr(torch, options.dtype or DTYPES[options.device][0])
    device = torch.device("cpu")
    world = comm.world
    share_cores(world)
    group = world.split(world.rank // options.tp) if options.tp > 1 else None
    on_gpu = options.device == "cuda"
    config.check_kv_dtype(options.kv_dtype)
    if on_gpu:
        device = _take_gpu(world)
        agree(world, lambda: check_gpu_model(config))
    quantization = agree(world, lambda: _quantization(options))
    if on_gpu:
        comm = _on_gpu(comm, device, options.merge)
        group = group and _on_gpu(group, device, "nccl")
    ranks_here = comm.ranks_here if on_gpu and comm.size > 1 else 1

    def load() -> ModelWeights[Rows]:
        try:
            part = group.rank if group else 0
            return make_weights(dtype, device, part, options.tp, quantization)
        except torch.OutOfMemoryError as error:
            raise UserError(f"the weights do not fit into the GPU's memory: {error}") from None

    def pages() -> int | None:
        if not on_gpu and options.kv_cache_gib is None:
            return None
        free = torch.cuda.mem_get_info()[0] // ranks_here if on_gpu else free_memory()
        part = config.shard(options.tp)
        page_bytes = part.kv_bytes(tokens_per_block, dtype.itemsize)
        if options.kv_dtype != "auto":  # with room for scales
            page_bytes = dtype.itemsize * part.kept_kv_bytes(tokens_per_block)
        found = options.kv_cache_bytes(free) // page_bytes
        if not found:
            raise UserError(f"--kv-cache-gib {options.kv_cache_gib:g} holds no page: use more")
        return found

    def limits() -> Limits:
        free = torch.cuda.mem_get_info()[0] // ranks_here
        part = config.shard(options.tp)
        quantized, quantized_kv = engine.quantization is not None, options.kv_dtype != "auto"
        return pass_limits(
            part,
            dtype.itemsize,
            comm.size,
            max_pages,
            tokens_per_block,
            free,
            quantized,
            quantized_kv,
        )

    weights = agree(world, load)
    every = world.gather_objects(agree(world, pages))
    max_pages = min((each for each in every if each is not None), default=None)
    engine = TorchEngine(
        config, weights, comm, tokens_per_block, max_pages, group, options.kv_dtype
    )
    if on_gpu:
        world.gather_objects(None)  # ranks that share a GPU have their pools
        engine.limits = agree(world, limits)
    return engine


def _quantization(options: EngineOptions) -> Quantization:
    """What `options` come to on this process's device."""
    if options.device == "cpu":
        return "none" if options.quantization == "auto" else options.quantization
    capability = torch.cuda.get_device_capability()
    if capability >= FP8_CAPABILITY:
        return options.quantization
    if options.quantization == "fp8":
        found, needed = (".".join(map(str, each)) for each in (capability, FP8_CAPABILITY))
        raise UserError(
            f"--quantization fp8 needs a GPU of compute capability {needed} or newer, this one has "
            f"{found}: leave it away"
        )
    return "none"


def _take_gpu(world: Communicator) -> torch.device:
    """Makes this process's GPU torch's current one."""

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
        index = local_device(world)
        torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _on_gpu(comm: Communicator, device: torch.device, merge: str) -> Communicator:
    """`comm`, but one that reaches the GPU."""
    if comm.size == 1:
        return comm
    from star_attention.distributed.gpu import GpuCommunicator

    return GpuCommunicator(comm, device.index, merge=merge)
