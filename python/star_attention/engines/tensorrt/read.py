"""What an engine's folder says of it, whoever built it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from star_attention.engines.tensorrt.folder import (
    CONFIG,
    FORMAT,
    KIND,
    ROTARY,
    EngineConfig,
    EngineLimits,
    read_content,
)
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.trtllm.engine_folder import engine_config


def read_engine_config(folder: Path) -> EngineConfig:
    """Raises UserError if the folder is incomplete or not one of an engine."""
    content = read_content(folder)
    if "pretrained_config" in content:
        if not (folder / ROTARY).exists():
            raise UserError(
                f"{folder} has no {ROTARY}: run star-attn trtllm finish --engine_dir {folder}"
            )
        return engine_config(folder, content)
    if content.get(KIND) != FORMAT:
        raise UserError(
            f"{folder / CONFIG} is not one that star-attn build of this version wrote: "
            "build the engine again"
        )
    try:
        needed = [field.name for field in fields(EngineConfig) if field.default is MISSING]
        parts = {name: content[name] for name in needed}
        return EngineConfig(
            **{
                **parts,
                "model": ModelConfig.from_dict(content["model"]),
                "limits": EngineLimits(**content["limits"]),
                "quantization": content.get("quantization"),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({error}): build the engine again") from None
