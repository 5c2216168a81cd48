"""Star Attention's models for TensorRT-LLM's PyTorch backend with the CUDA kernels, over the
stand-in for it: two ranks, on a GPU each or sharing one, and one rank."""

import re
from pathlib import Path

import pytest

from helpers import run_job, save_tiny_model

pytest.importorskip("star_attention.distributed.gpu", exc_type=ImportError)
pytest.importorskip("mpi4py", exc_type=ImportError)

JOB = Path(__file__).parent / "trtllm_job.py"


@pytest.mark.parametrize("ranks", [1, 2])
def test_logits(tmp_path, ranks):
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
    save_tiny_model(tmp_path, initializer_range=0.05, **sizes)
    printed = run_job(ranks, JOB, tmp_path).stdout
    print(printed)
    error, allowed = re.search(r"off by (\S+), Hugging Face by (\S+)", printed).groups()
    assert float(error) <= 1.5 * float(allowed)
