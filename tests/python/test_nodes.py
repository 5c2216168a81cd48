"""Ranks on two nodes, which are network namespaces of this machine, joined by a cable of their own:
all that goes from one to the other goes over TCP."""

import contextlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from helpers import HERE, run_job, save_tiny_model
from nodes_job import METHODS, answers
from star_attention.distributed import SingleProcess, topology
from star_attention.distributed.launch import find_mpirun
from star_attention.engines.options import EngineOptions
from thread_ranks import ThreadRanks

ADDRESSES = "192.0.2.1", "192.0.2.2"
# A node lives as long as its standard input is open.
NODE = (
    "import os, socket, sys\n"
    "socket.sethostname(sys.argv[1])\n"
    "print(os.getpid(), flush=True)\n"
    "sys.stdin.read()\n"
)


class Nodes:
    """Two of them, each with a host name and a network of its own.

    Raises:
        OSError: they cannot be made here.
    """

    def __init__(self, folder, stack):
        missing = [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]
        if missing:
            raise OSError(f"there is no {', '.join(missing)} (Debian: iproute2, util-linux)")
        # Where only root may, both are in a user namespace in which one is root.
        as_it_is = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True)
        self._user = ["--user"] if as_it_is.returncode else []
        self._nodes = []
        mapped = [*self._user, "--map-root-user"] if self._user else []
        self._start(stack, "node0", ["unshare", "--net", "--uts", *mapped])
        self._start(stack, "node1", [*self.on(0), "unshare", "--net", "--uts"])
        second = str(self._nodes[1])
        cable = "link add cable type veth peer name cable netns"
        self._call(0, "ip", *cable.split(), second)
        for node, address in enumerate(ADDRESSES):
            self._call(node, "ip", "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self._call(node, "ip", "link", "set", device, "up")
        self._agent = folder / "agent"  # what mpirun calls as it would ssh: HOST COMMAND...
        self._agent.write_text(
            f'#!/bin/sh\n[ "$1" = {ADDRESSES[1]} ] || exit 1\nshift\n'
            f'exec nsenter --target {second} --net --uts sh -c "$*"\n'
        )
        self._agent.chmod(0o755)

    def on(self, node):
        """Runs the command that follows on a node."""
        keep = ["--preserve-credentials"] if self._user else []
        return ["nsenter", "--target", str(self._nodes[node]), *self._user, *keep, "--net", "--uts"]

    def mpirun(self, ranks_each):
        """Runs the command that follows as ranks, the first half of them on the first node."""
        options = {
            "--host": ",".join(f"{address}:{ranks_each}" for address in ADDRESSES),
            "--map-by": "slot",
            "--bind-to": "none",
            "--prtemca plm_ssh_agent": self._agent,
            "--mca pml": "ob1",
            "--mca btl": "tcp,self",  # no shared memory, also inside a node
            "--mca btl_tcp_if_include": f"{ADDRESSES[0]}/24",
        }
        words = [word for name, value in options.items() for word in (*name.split(), str(value))]
        root = "--allow-run-as-root"
        return [*self.on(0), find_mpirun(), "-n", str(2 * ranks_each), root, *words]

    def _start(self, stack, name, command):
        process = subprocess.Popen(
            [*command, sys.executable, "-S", "-c", NODE, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(process.communicate)
        number = process.stdout.readline()
        if not number:
            raise OSError(process.stderr.read().strip())
        self._nodes.append(int(number))

    def _call(self, node, *command):
        run = subprocess.run(
            [*self.on(node), *command], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise OSError(f"{' '.join(command)}: {run.stderr.strip()}")


@pytest.fixture
def nodes(tmp_path):
    with contextlib.ExitStack() as stack:
        try:
            made = Nodes(tmp_path, stack)
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield made


def test_two_nodes(tmp_path, nodes):
    model, output = tmp_path / "model", tmp_path / "output.pickle"
    save_tiny_model(model, max_position_embeddings=4096)
    job = HERE / "nodes_job.py", model, output, json.dumps({}), "hosts"
    run_job(4, *job, launcher=nodes.mpirun(2), timeout=60)
    where, found = pickle.loads(output.read_bytes())
    assert [name.split()[0] for name in where] == ["node0", "node0", "node1", "node1"]
    alone = answers(SingleProcess(), model, EngineOptions())
    for method in METHODS:
        there, here = found[method], alone[method]
        assert there["tokens"] == here["tokens"]
        error = np.abs(there["logits"] - here["logits"]).max()
        assert error <= 1e-4, f"{method}: max abs error {error}"
        planned = there["planned"]  # from rank, to rank
        assert there["counted"] == list(zip(planned.sum(1), planned.sum(0), strict=True))
        for node, (mine, others) in enumerate([([0, 1], [2, 3]), ([2, 3], [0, 1])]):
            crossed, left = planned[np.ix_(mine, others)].sum(), there["left"][mine[0]]
            print(f"{method}: {crossed} bytes from node {node}, {left} over its link")
            assert crossed > 1e5
            assert crossed < left < 1.1 * crossed


def test_containers_share_a_machines_cores(monkeypatch):
    """They have host names of their own."""
    names, threads = threading.local(), []
    monkeypatch.setattr(socket, "gethostname", lambda: names.host)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: names.cores)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def work(comm):
        names.host, names.cores = f"container{comm.rank // 2}", set(range(8))
        topology.share_cores(comm)
        return topology.machine()

    assert len(set(ThreadRanks(4).run(work))) == 2
    assert threads == [2, 2, 2, 2]
