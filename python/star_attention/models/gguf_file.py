"""GGUF files: metadata to `ModelConfig`, quantised tensors to float32 under Hugging Face names."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFEndian, GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize

from star_attention.errors import UserError, reason_of, refusing
from star_attention.models.config import ModelConfig, RopeConfig
from star_attention.models.fields import Fields
from star_attention.models.gguf_name import split_files
from star_attention.models.weights import Checkpoint, Weight, check_stored, weight_table

_LONG_ARRAY = 1024
_ARCHITECTURES = ("llama", "qwen2")
_ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp ends an answer at each of them.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# What changes a model in ways that the decoder does not know, and the value without effect.
_UNKNOWN = {
    "expert_count": 0,
    "attention.scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "rope.scale_linear": 1,
}


def read_header(path: Path) -> Fields:
    """A GGUF file's metadata, without arrays longer than 1,024 values.

    Raises:
        UserError: the file is truncated or not GGUF.
        OSError: it cannot be read.
    """
    return _header(path, _read(path))


def open_gguf(path: Path) -> Checkpoint:
    """Reads the headers of a file and of those that it is split into; tensors are dequantised when
    asked for.

    Raises:
        UserError: a file is missing, truncated or not GGUF, its architecture is not supported, or
            there are other weights than it asks for.
        OSError: a file cannot be read.
    """
    readers = _read_parts(path)
    header = _header(path, readers[0])
    tensors: dict[str, ReaderTensor] = {}
    for reader in readers:
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise UserError(f"{path}: {tensor.name!r} is in two of the files it is split into")
            tensors[tensor.name] = tensor
    config = _config(path, header, tensors)
    table = {weight.name: weight for weight in weight_table(config)}
    stored_as = {weight.gguf: weight.name for weight in table.values()}
    shapes = {
        stored_as.get(name, name): tuple(map(int, reversed(tensor.shape)))
        for name, tensor in tensors.items()
        if name != _ROPE_FACTORS
    }
    check_stored(path, shapes, config)
    interleaved = header.get("general.architecture") == "llama"

    def tensor(name: str) -> torch.Tensor:
        return _tensor(path, table[name], tensors[table[name].gguf], interleaved)

    return Checkpoint(path, config, tensor)


def _tensor(path: Path, weight: Weight, stored: ReaderTensor, interleaved: bool) -> torch.Tensor:
    try:
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type))
    except (NotImplementedError, ValueError, TypeError):
        raise UserError(
            f"{path}: {weight.gguf} is stored as {stored.tensor_type.name}, which is not read"
        ) from None
    if interleaved and weight.rotary_heads:
        # llama.cpp stores rotary pairs side by side; Hugging Face keeps them half a head apart.
        pairs = values.view(weight.rotary_heads, -1, 2, *values.shape[1:])
        values = pairs.transpose(1, 2).reshape(values.shape)
    return values


def _read(path: Path) -> GGUFReader:
    path.open("rb").close()  # or why not
    # The library trusts the file.
    with refusing(f"{path} is truncated or not GGUF"), np.errstate(all="raise"):
        reader = _HeaderReader(path, "c")  # copies of what is written, so that torch takes it
    if reader.endianess is not GGUFEndian.LITTLE:
        raise UserError(f"{path} is big-endian, which is not read")
    return reader


def _read_parts(path: Path) -> list[GGUFReader]:
    """Of all files that the model is split into."""
    files = split_files(path)
    readers = [_read(file) for file in files]
    for index, (file, reader) in enumerate(zip(files, readers, strict=True)):
        header = _header(file, reader)
        count, number = header.whole("split.count", 1, 0), header.whole("split.no", 0, 0)
        if max(count, 1) != len(files) or number != index:
            raise UserError(
                f"{file} says that it is part {number + 1} of {count}, which is not its name: "
                "use the names that it was split into, NAME-00001-of-0000N.gguf"
            )
    found = sum(len(reader.tensors) for reader in readers)
    wanted = _header(path, readers[0]).whole("split.tensors.count", found, 0)
    if len(files) > 1 and wanted != found:
        raise UserError(f"{path}: the files have {found} tensors in all, not {wanted}")
    return readers


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


def _header(path: Path, reader: GGUFReader) -> Fields:
    try:
        values = {name: field.contents() for name, field in reader.fields.items() if field.data}
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: the header is damaged: {reason_of(error)}") from None
    return Fields(values, f"{path}: the header")


def _config(path: Path, header: Fields, tensors: dict[str, ReaderTensor]) -> ModelConfig:
    architecture = header.word("general.architecture", "(none)")
    if architecture not in _ARCHITECTURES:
        shown = architecture if architecture.isidentifier() else repr(architecture)
        raise UserError(
            f"GGUF architecture {shown} is not supported: use {' or '.join(_ARCHITECTURES)}"
        )

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    for name, neutral in _UNKNOWN.items():
        if header.get(key(name)) not in (None, 0, neutral):
            raise UserError(f"{path}: {key(name)} is {header.get(key(name))!r}: not supported")
    max_position = header.whole(key("context_length"))
    window = header.whole(key("attention.sliding_window"), 0, 0)
    if 0 < window < max_position:
        raise UserError(f"{path}: attention.sliding_window {window} is not supported")
    num_q_heads = header.whole(key("attention.head_count"))
    hidden_size = header.whole(key("embedding_length"))
    head_dim = header.whole(key("attention.key_length"), hidden_size // num_q_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if header.whole(key(name), head_dim) != head_dim:
            raise UserError(f"{path}: {key(name)} is {header.get(key(name))}: use {head_dim}")
    ends = (header.tokens(f"tokenizer.ggml.{name}") for name in _ENDS)
    vocabulary = tensors.get("token_embd.weight")
    if vocabulary is None:
        raise UserError(f"{path}: the weights lack token_embd.weight")
    return ModelConfig(
        num_layers=header.whole(key("block_count")),
        hidden_size=hidden_size,
        intermediate_size=header.whole(key("feed_forward_length")),
        num_q_heads=num_q_heads,
        num_kv_heads=header.whole(key("attention.head_count_kv"), num_q_heads),
        head_dim=head_dim,
        vocab_size=int(vocabulary.shape[-1]),
        max_position=max_position,
        rms_norm_eps=header.number(key("attention.layer_norm_rms_epsilon")),
        rope=_rope(path, header, architecture, tensors.get(_ROPE_FACTORS), head_dim),
        qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        eos_token_ids=tuple(dict.fromkeys(token for tokens in ends for token in tokens)),
    )


def _rope(
    path: Path, header: Fields, architecture: str, factors: ReaderTensor | None, head_dim: int
) -> RopeConfig:
    theta = header.number(f"{architecture}.rope.freq_base", 10000.0)
    scaling = header.word(f"{architecture}.rope.scaling.type", "none")
    if factors is not None:
        weight = Weight("rope", None, _ROPE_FACTORS, _ROPE_FACTORS, (head_dim // 2,))
        values = _tensor(path, weight, factors, False).flatten().tolist()
        if len(values) != head_dim // 2 or not all(0 < value < math.inf for value in values):
            raise UserError(f"{path}: {_ROPE_FACTORS} are not {head_dim // 2} positive numbers")
        return RopeConfig(theta, "factors", factors=tuple(values))
    if scaling == "none":
        return RopeConfig(theta)
    if scaling == "linear":
        factor = header.number(f"{architecture}.rope.scaling.factor")
        return RopeConfig(theta, "linear", factor=factor)
    raise UserError(f"rope scaling {scaling!r} is not supported: use none or linear")
