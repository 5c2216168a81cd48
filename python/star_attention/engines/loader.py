"""From a model's files to an engine on this rank."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal

from star_attention.distributed import Communicator
from star_attention.engines.base import ModelEngine
from star_attention.errors import UserError

LoadFormat = Literal["auto", "dummy"]
LOAD_FORMATS: tuple[LoadFormat, ...] = ("auto", "dummy")
# What each device computes in; the first is the default.
DTYPES = {"cpu": ("float32", "bfloat16", "float16"), "cuda": ("bfloat16", "float16")}


def load_engine(
    path: Path,
    comm: Communicator,
    dtype: str | None,
    device: str,
    tokens_per_block: int,
    load_format: LoadFormat = "auto",
) -> ModelEngine:
    """The torch engine with the weights of `path`, or random ones (load format `dummy`).

    Raises:
        UserError: the weights cannot be used, or the machine lacks the device.
    """
    import torch

    from star_attention.engines.torch_engine import TorchEngine
    from star_attention.models.checkpoint import open_checkpoint
    from star_attention.models.llama import load_weights, random_weights

    if device not in DTYPES:
        raise UserError(f"--device is {device!r}: use one of {', '.join(DTYPES)}")
    dtype = dtype or DTYPES[device][0]
    if dtype not in DTYPES[device]:
        raise UserError(
            f"--dtype is {dtype!r} with --device {device}: use {' or '.join(DTYPES[device])}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here: use --device cpu")
    if device == "cuda" and comm.size > 1:
        raise UserError(f"--device cuda runs on one rank so far, not {comm.size}")
    checkpoint = open_checkpoint(path)
    where = getattr(torch, dtype), torch.device(device)
    if load_format == "dummy":
        weights = random_weights(checkpoint.config, *where)
    else:
        weights = load_weights(checkpoint, *where)
    return TorchEngine(checkpoint.config, weights, comm, tokens_per_block)


def share_cores(comm: Communicator) -> None:
    """Gives torch the cores that this rank may use, divided by the ranks that have the same ones,
    unless OMP_NUM_THREADS says otherwise. Every rank takes part."""
    import torch

    mine = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    sharing = comm.gather_objects(mine).count(mine)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(mine[1]) // sharing))
