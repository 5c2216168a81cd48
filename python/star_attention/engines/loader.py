"""From a model's files to an engine on this rank."""

from __future__ import annotations

import functools
from pathlib import Path

from star_attention.config import StarConfig
from star_attention.distributed import Communicator
from star_attention.distributed.base import agree
from star_attention.engines.base import ModelEngine
from star_attention.engines.options import EngineOptions
from star_attention.errors import UserError
from star_attention.models.checkpoint import is_engine_folder, open_checkpoint
from star_attention.models.config import ModelConfig


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
    from star_attention.engines.tensorrt.read import read_engine_config

    engine = read_engine_config(path)
    if options.dtype not in (None, engine.dtype):
        raise UserError(
            f"--dtype is {options.dtype}, but the engine computes in {engine.dtype}: leave it away"
        )
    if options.tp > 1:
        raise UserError(f"--tp is {options.tp}: TensorRT engines have no tensor parallelism")
    if options.load_format != "auto":
        raise UserError(f"--load-format is {options.load_format}: an engine has its weights")
    built = engine.quantization or "none"
    if options.quantization not in ("auto", built):
        raise UserError(
            f"--quantization is {options.quantization}, but the engine was built with "
            f"--quantization {built}: leave it away"
        )
    return engine.limits.divide(config)


def load_engine(
    path: Path, comm: Communicator, tokens_per_block: int, options: EngineOptions
) -> ModelEngine:
    """The TensorRT engine of the folder `path`, or the torch engine with the weights of `path`.
    Every process of the job takes part; `Limits.common` of all engines is what a job can do.

    Args:
        comm: `star_ranks` of the job.

    Raises:
        UserError: on every rank, if the weights cannot be used or a rank lacks the device or its
            memory.
    """
    if is_engine_folder(path):
        from star_attention.engines.tensorrt.engine import load_trt_engine

        return load_trt_engine(path, comm, options)

    from star_attention.engines.torch.load import load_torch_engine
    from star_attention.models.loading import load_weights

    is_dummy = options.load_format == "dummy"
    checkpoint = agree(comm.world, lambda: open_checkpoint(path, with_weights=not is_dummy))
    if is_dummy:
        return dummy_engine(checkpoint.config, comm, tokens_per_block, options)
    load = functools.partial(load_weights, checkpoint)
    return load_torch_engine(checkpoint.config, load, comm, tokens_per_block, options)


def dummy_engine(
    config: ModelConfig, comm: Communicator, tokens_per_block: int, options: EngineOptions
) -> ModelEngine:
    """The torch engine with random weights, as `load_engine`."""
    from star_attention.engines.torch.load import load_torch_engine
    from star_attention.models.loading import random_weights

    load = functools.partial(random_weights, config)
    return load_torch_engine(config, load, comm, tokens_per_block, options)
