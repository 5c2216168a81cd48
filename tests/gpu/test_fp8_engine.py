"""Engines with projections in FP8 on a GPU: near the CPU's, which round by the same rule in
float32, and near 16 bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engine import MODELS, relative_error

from decode_job import COUNTS, WITHOUT
from fp8_files import quantize_folder
from helpers import run_job, run_oracle_job, save_tiny_model

pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

PAGE = 64
CASE = {"block_size": 256, "tokens_per_block": PAGE, "kv_placement": ["tail"]}


@pytest.fixture(autouse=True)
def _has_fp8():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU does not compute in FP8")


def logits(folder, processes, model, **options):
    tokens = np.random.default_rng(1).integers(0, 97, 3 * 256 + 5 + 2 * 40).astype(np.int32)
    results = run_oracle_job(folder, processes, model, tokens, 40, [dict(CASE)], **options)
    return results[0, "tail"]


def on_gpu(folder, processes, model, dtype="bfloat16", **options):
    options = {"device": "cuda", "dtype": dtype, "kv_cache_gib": 1, **options}
    return logits(folder, processes, model, **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "biases", "qwen3", "qwen3-moe"])
def test_one_rank(tmp_path, name, dtype):
    save_tiny_model(tmp_path, initializer_range=0.05, **MODELS[name])
    job = tmp_path / "job"
    oracle = logits(job, 1, tmp_path, quantization="fp8")
    wide = logits(job, 1, tmp_path, quantization="none")
    found = on_gpu(job, 1, tmp_path, dtype, quantization="fp8")
    of_rule, of_fp8 = relative_error(found, oracle), relative_error(oracle, wide)
    print(f"{name}, {dtype}: {of_rule:.1e} from the CPU's, which are {of_fp8:.1e} from float32")
    assert 1e-4 < of_fp8 < 0.1
    assert of_rule < of_fp8
    assert relative_error(found, wide) < 1.5 * of_fp8


@pytest.mark.parametrize(("processes", "tp"), [(2, 1), (2, 2), (4, 2)], ids=["2", "2-tp2", "4-tp2"])
def test_several_processes(tmp_path, processes, tp):
    if tp > 1 and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs 2 GPUs")
    save_tiny_model(tmp_path, initializer_range=0.05, vocab_size=98, **MODELS["llama"])
    job = tmp_path / "job"
    oracle = logits(job, 1, tmp_path, quantization="fp8")
    of_fp8 = relative_error(oracle, logits(job, 1, tmp_path, quantization="none"))
    found = on_gpu(job, processes, tmp_path, quantization="fp8", tp=tp)
    assert relative_error(found, oracle) < 1.5 * of_fp8


@pytest.mark.parametrize("form", ["compressed-dynamic", "fp8-block", "modelopt"])
def test_checkpoints(tmp_path, form):
    """In FP8 by themselves, and widened."""
    save_tiny_model(tmp_path, initializer_range=0.05, **MODELS["llama"])
    quantize_folder(tmp_path, form)
    job = tmp_path / "job"
    wide = logits(job, 1, tmp_path)
    of_16_bits = relative_error(on_gpu(job, 1, tmp_path, quantization="none"), wide)
    of_fp8 = relative_error(on_gpu(job, 1, tmp_path), wide)
    assert of_16_bits < 0.03
    assert 1e-4 < of_fp8 < 0.1


@pytest.mark.parametrize(("processes", "tp"), [(1, 1), (2, 1), (2, 2)], ids=["1", "2", "2-tp2"])
def test_decode_runs_by_graph(tmp_path, processes, tp):
    if tp > 1 and torch.cuda.device_count() < processes:
        pytest.skip(f"{processes} processes with --tp {tp} need as many GPUs")
    save_tiny_model(tmp_path, initializer_range=0.05, vocab_size=98, **MODELS["llama"])
    options = {"device": "cuda", "dtype": "float16", "kv_cache_gib": 1, "tp": tp}
    options["quantization"] = "fp8"
    job = Path(__file__).parents[1] / "python/decode_job.py"
    run = run_job(processes, job, tmp_path, json.dumps(options))
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["graph_steps"] == [2 * (len(COUNTS) - WITHOUT)] * processes
    assert max(result["errors"]) < 5e-3
