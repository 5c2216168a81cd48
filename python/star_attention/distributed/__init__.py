"""Communication between ranks."""

from __future__ import annotations

import os

from star_attention.distributed.base import Communicator, Traffic
from star_attention.distributed.single import SingleProcess

__all__ = ["Communicator", "SingleProcess", "Traffic", "default_communicator", "world_size"]

_WORLD_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


def world_size() -> int:
    """Ranks that mpirun started this program with; 1 without mpirun."""
    for variable in _WORLD_SIZE_VARIABLES:
        if variable in os.environ:
            return int(os.environ[variable])
    return 1


def default_communicator() -> Communicator:
    """MPI's world under mpirun, a single process otherwise."""
    if world_size() == 1:
        return SingleProcess()
    from star_attention.distributed.mpi import MpiCommunicator

    return MpiCommunicator()
