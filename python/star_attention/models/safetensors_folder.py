"""Hugging Face folders: config.json and (sharded) safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from star_attention.errors import UserError, reason_of, refusing
from star_attention.models.config import ModelConfig
from star_attention.models.fields import Fields, end_tokens, read_json
from star_attention.models.weights import Checkpoint, Weight, check_stored, weight_table

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of old checkpoints: what the config says too.
_REDUNDANT = "rotary_emb.inv_freq"
_DTYPES = ("F64", "F32", "F16", "BF16")


def open_folder(folder: Path, with_weights: bool = True) -> Checkpoint:
    """Opens the weights that Hugging Face would: `model.safetensors`, or else the index's shards.

    End tokens are those of config.json and generation_config.json together. A tied lm_head that
    is stored nevertheless counts, as in transformers 5.

    Args:
        with_weights: or the config only.

    Raises:
        UserError: the model or the way its weights are stored is not supported, a file is missing
            or damaged, or there are other weights than the config asks for.
        OSError: one cannot be read.
    """
    config = _read_config(folder)
    shards = _open_shards(folder) if with_weights else {}
    if config.tie_embeddings and "lm_head.weight" in shards:
        config = replace(config, tie_embeddings=False)
    if with_weights:
        shapes = {
            name: tuple(file.get_slice(name).get_shape())
            for name, file in shards.items()
            if not name.endswith(_REDUNDANT)
        }
        check_stored(folder, shapes, (weight.hf for weight in weight_table(config)))

    def tensor(weight: Weight) -> torch.Tensor:
        name, file = weight.hf.name, shards[weight.hf.name]
        try:
            rows = file.get_slice(name)
            dtype = rows.get_dtype()
            if dtype not in _DTYPES:
                raise UserError(
                    f"{folder}: {name} is stored as {dtype}, which is not read: use float32, "
                    "bfloat16 or float16, or a GGUF file"
                )
            if weight.hf.begin is None:
                return weight.arranged(file.get_tensor(name))
            return weight.arranged(rows[weight.hf.begin : weight.hf.end].view(weight.shape))
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: {name} cannot be read: {reason_of(error)}") from None

    return Checkpoint(folder, config, tensor)


def _read_config(folder: Path) -> ModelConfig:
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    config = replace(config, eos_token_ids=end_tokens(folder))
    if (folder / "hf_quant_config.json").exists():
        described = Fields(read_json(folder / "hf_quant_config.json"), "hf_quant_config.json")
        method = described.fields("quantization").get("quant_algo")
        if method is not None:
            raise UserError(
                f"{folder}: the weights are quantised ({method!r} in hf_quant_config.json): use "
                "float32, bfloat16 or float16, or a GGUF file"
            )
    return config


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
