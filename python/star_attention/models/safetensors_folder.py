"""Hugging Face folders: config.json and (sharded) safetensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from star_attention.errors import UserError, reason_of, refusing
from star_attention.models.config import ModelConfig
from star_attention.models.fields import Fields, end_tokens, read_json
from star_attention.models.quantization import (
    UNUSED_SCALES,
    Fp8Format,
    fp8_format,
    modelopt_format,
)
from star_attention.models.weights import Checkpoint, Stored, Weight, check_stored, weight_table
from star_attention.ops.quantized import QuantizedRows, quantize_rows

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of old checkpoints: what the config says too.
_REDUNDANT = "rotary_emb.inv_freq"
_DTYPES = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_SCALES = ("scale", "scale_inv")  # endings of the names of their scales


def open_folder(folder: Path, with_weights: bool = True) -> Checkpoint:
    """Opens the weights that Hugging Face would: `model.safetensors`, or else the index's shards.

    Weights in FP8 are `QuantizedRows`: those with a scale for a tensor or each row as they are
    stored, those with one for a block quantised anew by rows. Scales of activations are not read.

    End tokens are those of config.json and generation_config.json together. A tied lm_head that
    is stored nevertheless counts, as in transformers 5.

    Args:
        with_weights: or the config only.

    Raises:
        UserError: the model or the way its weights are stored is not supported, a file is missing
            or damaged, or there are other weights than the config asks for.
        OSError: one cannot be read.
    """
    config, fp8 = _read_config(folder)
    shards = _open_shards(folder) if with_weights else {}
    if config.tie_embeddings and "lm_head.weight" in shards:
        config = replace(config, tie_embeddings=False)
    if with_weights:
        shapes = {
            name: tuple(file.get_slice(name).get_shape())
            for name, file in shards.items()
            if not name.endswith(_REDUNDANT)
        }
        table = [weight.hf for weight in weight_table(config)]
        if fp8:
            _check_scales(folder, shards, shapes, table, fp8)
        check_stored(folder, shapes, table)

    def is_fp8(weight: Weight) -> bool:
        name = weight.hf.name
        return fp8 is not None and shards[name].get_slice(name).get_dtype() == _FP8

    def tensor(weight: Weight) -> torch.Tensor | QuantizedRows:
        name, file = weight.hf.name, shards[weight.hf.name]
        try:
            if is_fp8(weight):
                return _read_fp8(shards, weight, fp8)
            rows = file.get_slice(name)
            dtype = rows.get_dtype()
            if dtype not in _DTYPES:
                raise UserError(
                    f"{folder}: {name} is stored as {dtype}, which is not read: use float32, "
                    "bfloat16 or float16, or a GGUF file"
                )
            if weight.hf.begin is None:
                values = file.get_tensor(name)
                return weight.arranged(values.float() + 1 if weight.hf.less_one else values)
            return weight.arranged(rows[weight.hf.begin : weight.hf.end].view(weight.shape))
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: {name} cannot be read: {reason_of(error)}") from None

    return Checkpoint(folder, config, tensor, is_fp8)


def _read_config(folder: Path) -> tuple[ModelConfig, Fp8Format | None]:
    """And how weights in FP8 are stored, if there are some."""
    values = read_json(folder / "config.json")
    config = replace(ModelConfig.from_hf(values), eos_token_ids=end_tokens(folder))
    fields = Fields(values, "the model's config.json")
    fp8 = None
    if fields.get("quantization_config") is not None:
        fp8 = fp8_format(fields.fields("quantization_config"))
    if (folder / "hf_quant_config.json").exists():
        described = Fields(read_json(folder / "hf_quant_config.json"), "hf_quant_config.json")
        fp8 = modelopt_format(described) or fp8
    return config, fp8


def _scales_of(weight: str, names: Mapping[str, Any]) -> str | None:
    """The tensor that a weight's values are to be multiplied by; `inv` in its name says so too."""
    return next((f"{weight}_{end}" for end in _SCALES if f"{weight}_{end}" in names), None)


def _check_scales(
    folder: Path,
    shards: Mapping[str, safe_open],
    shapes: dict[str, tuple[int, ...]],
    table: Iterable[Stored],
    fp8: Fp8Format,
) -> None:
    """Takes the scales of weights in FP8, and those that are not read, out of `shapes`.

    Raises:
        UserError: a weight has none, or not as many as it should have.
    """
    for stored in table:
        name = stored.name
        if name not in shards or shards[name].get_slice(name).get_dtype() != _FP8:
            continue
        scales = _scales_of(name, shards)
        if scales is None:
            raise UserError(f"{folder}: {name} is in FP8, but the weights lack {name}_scale")
        if len(stored.shape) != 2:
            raise UserError(f"{folder}: {name} is in FP8, which is read of projections only")
        shape = tuple(shards[scales].get_slice(scales).get_shape())
        wanted = fp8.scale_shapes(*stored.shape)
        if shape not in wanted:
            raise UserError(
                f"{folder}: {scales} has shape {list(shape)}, "
                f"the config asks for {' or '.join(map(str, map(list, wanted)))}"
            )
        shapes.pop(scales, None)
    for name in list(shapes):
        if name.endswith(UNUSED_SCALES):
            del shapes[name]


def _read_fp8(shards: Mapping[str, safe_open], weight: Weight, fp8: Fp8Format) -> QuantizedRows:
    """Stands for bfloat16, for which it was made."""
    name = weight.hf.name
    scales_name = _scales_of(name, shards)
    values, scales = (shards[each].get_tensor(each) for each in (name, scales_name))
    rows, columns = values.shape
    scales = scales.float()
    own = slice(weight.hf.begin, weight.hf.end)
    if fp8.block:
        for dim, (size, count) in enumerate(zip(fp8.block, (rows, columns), strict=True)):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, count)
        read = quantize_rows(values[own].float() * scales[own], "fp8")
    else:
        read = QuantizedRows(values[own], scales.flatten().expand(rows)[own], torch.bfloat16)
    values = weight.arranged(read.values.view(torch.uint8)).view(read.values.dtype)
    return QuantizedRows(values, weight.arranged(read.scales), torch.bfloat16)


def weight_files(folder: Path) -> list[Path]:
    """Those that Hugging Face reads.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise UserError(
            f"{folder} has neither {SINGLE} nor {INDEX}" + (f", but {others}" if others else "")
        )
    shard_of = Fields(read_json(folder / INDEX), INDEX).get("weight_map")
    names = shard_of.values() if isinstance(shard_of, dict) else [None]
    if not all(isinstance(name, str) and name and name == Path(name).name for name in names):
        raise UserError(f"{folder / INDEX} has no weight_map of file names")
    return [folder / name for name in sorted(set(names))]


def _open_shards(folder: Path) -> dict[str, safe_open]:
    """The file of each tensor."""
    shards: dict[str, safe_open] = {}
    for path in weight_files(folder):
        file = _open(path)
        for tensor in file.keys():  # noqa: SIM118
            if tensor in shards:
                raise UserError(f"{folder}: {tensor!r} is in two files, one of them {path.name}")
            shards[tensor] = file
    return shards


def _open(path: Path) -> safe_open:
    if not path.exists():
        raise UserError(f"{path.parent}: the shard {path.name} is missing")
    path.open("rb").close()  # or why not
    with refusing(f"{path} is truncated or not safetensors"):
        return safe_open(path, framework="pt", device="cpu")
