"""Hugging Face folders: config.json and (sharded) safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.models.weights import Checkpoint


def open_folder(folder: Path) -> Checkpoint:
    """Opens every shard of the folder; raises UserError for a missing or truncated one."""
    config = ModelConfig.from_hf(_read_json(folder / "config.json"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shard_of = _read_json(index).get("weight_map", {})
        files = {name: _open(folder / name) for name in sorted(set(shard_of.values()))}
        shards = {tensor: files[name] for tensor, name in shard_of.items()}
    else:
        files = [_open(path) for path in sorted(folder.glob("*.safetensors"))]
        shards = {tensor: file for file in files for tensor in file.keys()}  # noqa: SIM118

    def tensor(name: str) -> torch.Tensor:
        if name not in shards:
            raise UserError(f"{folder}: the weights lack {name}")
        try:
            return shards[name].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{folder}: {name} cannot be read: {error}") from None

    return Checkpoint(folder, config, tensor)


def _open(path: Path) -> safe_open:
    if not path.exists():
        raise UserError(f"{path.parent}: the shard {path.name} is missing")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not safetensors: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: the folder has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
