"""Communication between ranks."""

from __future__ import annotations

import os

from star_attention.distributed.base import Communicator, Traffic
from star_attention.distributed.single import SingleProcess

# The process that is the rank of mpirun's variables.
RANK_PROCESS = "STAR_ATTENTION_RANK_PROCESS"

__all__ = [
    "Communicator",
    "SingleProcess",
    "Traffic",
    "default_communicator",
    "world_rank",
    "world_size",
]


def world_size() -> int:
    """Ranks that mpirun started this program with; 1 without mpirun."""
    return _from_launcher("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1)


def world_rank() -> int:
    """This program's rank among them; 0 without mpirun."""
    return _from_launcher("OMPI_COMM_WORLD_RANK", "PMI_RANK", default=0)


def _from_launcher(*variables: str, default: int) -> int:
    if os.environ.get(RANK_PROCESS, str(os.getpid())) != str(os.getpid()):
        return default  # started by a rank, whose variables it has
    return next((int(os.environ[name]) for name in variables if name in os.environ), default)


def default_communicator() -> Communicator:
    """MPI's world under mpirun, a single process otherwise."""
    if world_size() == 1:
        return SingleProcess()
    os.environ[RANK_PROCESS] = str(os.getpid())
    from star_attention.distributed.mpi import MpiCommunicator

    return MpiCommunicator()
