"""The table of weights against Hugging Face's and GGUF's names, and how it is divided."""

import gguf
import pytest
import torch

from helpers import save_tiny_model
from star_attention.models.checkpoint import open_checkpoint
from star_attention.models.loading import load_weights
from star_attention.models.weights import weight_table

CPU = torch.device("cpu")
HF_MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None, "head_dim": 32}),
    ("qwen2", {}),
]


@pytest.mark.parametrize(("architecture", "overrides"), HF_MODELS)
def test_every_weight_is_in_the_table_once(tmp_path, architecture, overrides):
    hf_model = save_tiny_model(tmp_path, architecture, **overrides)
    table = list(weight_table(open_checkpoint(tmp_path).config))
    parameters = {name: tuple(weight.shape) for name, weight in hf_model.named_parameters()}
    assert len(table) == len(parameters)  # a tied lm_head is no parameter
    assert {weight.name: weight.shape for weight in table} == parameters
    arch = {"qwen2": gguf.MODEL_ARCH.QWEN2}.get(architecture, gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(arch, 3)
    for weight in table:
        assert weight.gguf == names.get_name(weight.name, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_parts_are_those_of_the_whole(tmp_path, architecture):
    """Each part has its heads' rows of the fused projections, so that parts of a layer add up."""
    save_tiny_model(tmp_path, architecture, vocab_size=98)
    checkpoint = open_checkpoint(tmp_path)
    whole = load_weights(checkpoint, torch.float32, CPU)
    parts = [load_weights(checkpoint, torch.float32, CPU, part, 2) for part in range(2)]
    config = checkpoint.config
    rows = [config.num_q_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    half = [size // 2 for size in rows]
    for index, layer in enumerate(whole.layers):
        halves = [part.layers[index] for part in parts]
        for name in ("qkv", "qkv_bias") if config.qkv_bias else ("qkv",):
            pieces = zip(*(getattr(part, name).split(half) for part in halves), strict=True)
            joined = torch.cat([torch.cat(piece) for piece in pieces])
            torch.testing.assert_close(joined, getattr(layer, name))
        for name in ("out", "down"):
            joined = torch.cat([getattr(part, name) for part in halves], dim=1)
            torch.testing.assert_close(joined, getattr(layer, name))
        pieces = zip(*(part.gate_up.chunk(2) for part in halves), strict=True)
        joined = torch.cat([torch.cat(piece) for piece in pieces])
        torch.testing.assert_close(joined, layer.gate_up)
        torch.testing.assert_close(halves[1].input_norm, layer.input_norm)
    torch.testing.assert_close(torch.cat([part.lm_head for part in parts]), whole.lm_head)
    torch.testing.assert_close(parts[1].embedding, whole.embedding)
