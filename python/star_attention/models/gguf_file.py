"""GGUF files: metadata to `ModelConfig`, quantised tensors to float32 under Hugging Face names."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize

from star_attention.errors import UserError
from star_attention.models.config import ModelConfig, RopeConfig
from star_attention.models.weights import Checkpoint, weight_table

_LONG_ARRAY = 1024
_QKV_BIAS = {"llama": False, "qwen2": True}


def open_gguf(path: Path) -> Checkpoint:
    """Reads the header; tensors are dequantised when asked for.

    Raises:
        UserError: the file is truncated or not GGUF, or its architecture is not supported.
    """
    try:
        reader = _HeaderReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise UserError(f"{path} is truncated or not GGUF: {error}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(reader, tensors)
    table = {weight.name: weight for weight in weight_table(config)}
    interleaved = _field(reader, "general.architecture") == "llama"

    def tensor(name: str) -> torch.Tensor:
        weight = table[name]
        if weight.gguf not in tensors:
            raise UserError(f"{path}: the weights lack {weight.gguf}")
        stored = tensors[weight.gguf]
        values = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type)))
        if interleaved and weight.rotary_heads:
            # llama.cpp stores rotary pairs side by side; Hugging Face keeps them half a head apart.
            pairs = values.view(weight.rotary_heads, -1, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        return values

    return Checkpoint(path, config, tensor)


class _HeaderReader(GGUFReader):
    """Skips long arrays: a vocabulary takes seconds to read, and weights do not need it."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
        if raw_type == GGUFValueType.ARRAY and self.byte_order != "S":
            data = memoryview(self.data)
            kind, count = struct.unpack_from("<IQ", data, orig_offs)
            if count > _LONG_ARRAY:
                end = orig_offs + struct.calcsize("<IQ")
                if kind == GGUFValueType.STRING:
                    for _ in range(count):
                        end += 8 + struct.unpack_from("<Q", data, end)[0]
                else:
                    end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
                return end - orig_offs, [], [], [GGUFValueType.ARRAY]
        return super()._get_field_parts(orig_offs, raw_type)


def _field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _config(reader: GGUFReader, tensors: dict[str, Any]) -> ModelConfig:
    architecture = _field(reader, "general.architecture", "(none)")
    if architecture not in _QKV_BIAS:
        raise UserError(
            f"GGUF architecture {architecture} is not supported: use {' or '.join(_QKV_BIAS)}"
        )

    def need(key: str) -> Any:
        value = _field(reader, f"{architecture}.{key}")
        if value is None:
            raise UserError(f"the GGUF file lacks {architecture}.{key}")
        return value

    def optional(key: str, default: Any) -> Any:
        return _field(reader, f"{architecture}.{key}", default)

    num_q_heads = need("attention.head_count")
    hidden_size = need("embedding_length")
    theta = optional("rope.freq_base", 10000.0)
    scaling = optional("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        stored = tensors["rope_freqs.weight"]
        factors = dequantize(stored.data, stored.tensor_type)
        rope = RopeConfig(theta, "factors", factors=tuple(factors.tolist()))
    elif scaling == "none":
        rope = RopeConfig(theta)
    elif scaling == "linear":
        rope = RopeConfig(theta, "linear", factor=need("rope.scaling.factor"))
    else:
        raise UserError(f"rope scaling {scaling!r} is not supported: use none or linear")
    eos = _field(reader, "tokenizer.ggml.eos_token_id")
    return ModelConfig(
        num_layers=need("block_count"),
        hidden_size=hidden_size,
        intermediate_size=need("feed_forward_length"),
        num_q_heads=num_q_heads,
        num_kv_heads=optional("attention.head_count_kv", num_q_heads),
        head_dim=optional("attention.key_length", hidden_size // num_q_heads),
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        max_position=need("context_length"),
        rms_norm_eps=need("attention.layer_norm_rms_epsilon"),
        rope=rope,
        qkv_bias=_QKV_BIAS[architecture],
        tie_embeddings="output.weight" not in tensors,
        eos_token_ids=() if eos is None else (eos,),
    )
