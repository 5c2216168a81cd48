"""The table of weights against Hugging Face's and GGUF's names, and how it is divided."""

import re

import gguf
import pytest
import torch
from safetensors.torch import load_file

from helpers import MODELS, save_tiny_model
from star_attention.models.checkpoint import open_checkpoint
from star_attention.models.loading import load_weights
from star_attention.models.weights import weight_table
from test_models import GGUF_TYPES

LLAMA = gguf.MODEL_ARCH.LLAMA
CPU = torch.device("cpu")


def whole_tensors(stored):
    """Shapes by name; the parts of a tensor are all of it, in order."""
    ends, shapes = {}, {}
    for each in stored:
        shapes[each.name] = each.shape
        if each.begin is not None:
            assert ends.get(each.name, 0) == each.begin
            ends[each.name] = each.end
        else:
            assert each.name not in ends
    assert all(shapes[name][0] == end for name, end in ends.items())
    return shapes


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_in_the_table_once(tmp_path, name):
    """In the files that Hugging Face writes, and under llama.cpp's names."""
    architecture, overrides = MODELS[name]
    save_tiny_model(tmp_path, architecture, **overrides)
    config = open_checkpoint(tmp_path).config
    table = list(weight_table(config))
    assert len({weight.name for weight in table}) == len(table)
    stored = load_file(tmp_path / "model.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    assert whole_tensors(weight.hf for weight in table) == shapes
    names = gguf.get_tensor_name_map(GGUF_TYPES.get(architecture.replace("_", ""), LLAMA), 3)
    for weight in table:
        if weight.layer not in config.dense_layers:  # which llama.cpp does not have
            all_experts = re.sub(r"experts\.\d+", "experts", weight.hf.name)
            theirs = names.get_name(all_experts, try_suffixes=(".weight", ".bias"))
            assert weight.gguf.name == theirs
    whole_tensors(weight.gguf for weight in table)


@pytest.mark.parametrize("name", ["llama", "biases", "qwen2", "qwen3-biases", "phi3", "phi3-long"])
def test_parts_are_those_of_the_whole(tmp_path, name):
    """Each part has its heads' rows of the fused projections, so that parts of a layer add up."""
    architecture, overrides = MODELS[name]
    save_tiny_model(tmp_path, architecture, vocab_size=98, **overrides)
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
        for name in ("gate_up", "gate_up_bias") if config.mlp_bias else ("gate_up",):
            pieces = zip(*(getattr(part, name).chunk(2) for part in halves), strict=True)
            joined = torch.cat([torch.cat(piece) for piece in pieces])
            torch.testing.assert_close(joined, getattr(layer, name))
        for name in ("input_norm", "out_bias", "down_bias", "q_norm", "k_norm"):
            torch.testing.assert_close(getattr(halves[1], name), getattr(layer, name))
    torch.testing.assert_close(torch.cat([part.lm_head for part in parts]), whole.lm_head)
    torch.testing.assert_close(parts[1].embedding, whole.embedding)


def test_parts_of_experts(tmp_path):
    """Each has a part of every expert, and all of the router."""
    save_tiny_model(tmp_path, "qwen3_moe", vocab_size=98)
    checkpoint = open_checkpoint(tmp_path)
    whole = load_weights(checkpoint, torch.float32, CPU).layers[1]
    halves = [load_weights(checkpoint, torch.float32, CPU, p, 2).layers[1] for p in range(2)]
    gate_up = [half.gate_up.view(6, 2, 20, 64) for half in halves]
    torch.testing.assert_close(torch.cat(gate_up, 2), whole.gate_up.view(6, 2, 40, 64))
    down = [half.down.view(6, 64, 20) for half in halves]
    torch.testing.assert_close(torch.cat(down, 2), whole.down.view(6, 64, 40))
    torch.testing.assert_close(halves[1].router, whole.router)
