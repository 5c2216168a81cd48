"""Two GPUs of one machine that NCCL takes for two hosts: what it sends goes over sockets."""

import json
import pickle

import numpy as np
import pytest
import torch

from helpers import HERE, run_job, save_tiny_model
from nodes_job import METHODS

pytest.importorskip("star_attention.distributed.gpu", exc_type=ImportError)
pytest.importorskip("mpi4py", exc_type=ImportError)

SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket"}
TELL = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"}
OPTIONS = {"device": "cuda", "dtype": "bfloat16", "kv_cache_gib": 1, "merge": "nccl"}


def test_two_hosts(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs 2 GPUs")
    model = tmp_path / "model"
    sizes = {"hidden_size": 256, "max_position_embeddings": 4096}
    save_tiny_model(model, initializer_range=0.05, **sizes)

    def run(nodes, **environment):
        output = tmp_path / f"{nodes}.pickle"
        job = HERE / "nodes_job.py", model, output, json.dumps(OPTIONS), nodes
        told = run_job(2, *job, **TELL, **environment)
        return told.stdout + told.stderr, pickle.loads(output.read_bytes())[1]

    told, together = run("hosts")
    assert "nNodes 1" in told
    assert "via NET/" not in told
    told, apart = run("nccl", **SOCKETS)
    assert "nNodes 2" in told
    assert "via NET/Socket" in told
    for method in METHODS:
        there, here = apart[method], together[method]
        assert there["tokens"] == here["tokens"]
        assert np.array_equal(there["logits"], here["logits"])
        planned = there["planned"]  # from rank, to rank
        assert planned.sum() > 1e5
        assert there["counted"] == list(zip(planned.sum(1), planned.sum(0), strict=True))
