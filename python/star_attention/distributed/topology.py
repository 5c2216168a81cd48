"""What ranks of one machine share: its GPUs and its cores."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from star_attention.distributed.base import Communicator, agree
from star_attention.errors import UserError


def machine() -> str:
    """Tells machines apart, also those of one name, and containers of one machine by their host
    names: they may see other GPUs, and do not reach each other's memory."""
    return f"{socket.gethostname()} {_boot()}"


def _boot() -> str:
    """The same for all containers of a machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def local_device(host: Communicator) -> int:
    """This rank's GPU: ranks of a machine take the GPUs that they see in turn. A rank that was
    bound to a single core, as mpirun does by itself to two ranks, is not any more: those that feed
    a GPU have threads for transfers, copies and requests besides.

    Raises:
        UserError: a rank sees no GPU.
    """
    from star_attention import _C

    def count() -> int:
        if num_devices := _C.device_count():
            return num_devices
        raise UserError(f"--device is cuda, but rank {host.rank} sees no GPU: use --device cpu")

    num_devices = agree(host, count)
    if host.size > 1 and len(os.sched_getaffinity(0)) == 1:
        os.sched_setaffinity(0, range(os.cpu_count()))
    machines = host.gather_objects(machine())
    return machines[: host.rank].count(machines[host.rank]) % num_devices


def share_cores(comm: Communicator) -> None:
    """Gives torch the cores that this rank may use, divided by the ranks that have the same ones,
    unless OMP_NUM_THREADS says otherwise. Every rank takes part."""
    import torch

    mine = (_boot(), sorted(os.sched_getaffinity(0)))
    sharing = comm.gather_objects(mine).count(mine)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(mine[1]) // sharing))
