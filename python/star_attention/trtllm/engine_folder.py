"""The folder of an engine that trtllm-build made with Star Attention's model class, completed by
`finish`. Nothing here needs TensorRT-LLM, unless the engine uses its plugins."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from star_attention.engines.tensorrt.folder import (
    CONFIG,
    ROTARY,
    TOKENIZER,
    EngineConfig,
    read_content,
    write_rotary,
)
from star_attention.errors import UserError
from star_attention.models.fields import end_tokens
from star_attention.trtllm.settings import SETTINGS, check_model, limits_of

_ENDS = "eos_token_ids"  # of STAR, and of `ModelConfig`
# The field of an engine's pretrained_config that the model class adds.
STAR = "star_attention"
# Plugins that are on by default and not in a decoder with StarAttention.
_NOT_USED = tuple(
    f"{name}_plugin" for name in ("bert_attention", "gpt_attention", "mamba_conv1d", "moe", "nccl")
)


def engine_config(folder: Path, content: Mapping[str, Any]) -> EngineConfig:
    """What config.json, which trtllm-build wrote, says of the engine.

    Raises:
        UserError: it is not one of Star Attention, or not complete.
    """
    try:
        pretrained, build = content["pretrained_config"], content["build_config"]
        if STAR not in pretrained:
            raise UserError(
                f"{folder} has TensorRT-LLM's own attention: build it with star-attn trtllm build"
            )
        star = pretrained[STAR]
        model = replace(check_model(pretrained), eos_token_ids=tuple(star.get(_ENDS, ())))
        return EngineConfig(
            model=model,
            limits=limits_of({**build, **build["plugin_config"]}, star),
            dtype=pretrained["dtype"],
            **{name: star[name] for name in ("tensorrt", "gpu", "compute_capability")},
            weights_sha256=star["build_id"],
            built_by=f"TensorRT-LLM {content['version']}",
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({error}): build the engine again") from None


def finish(folder: Path, tokenizer: Path | None, **star: Any) -> None:
    """Adds what trtllm-build does not write: the rotary table, Star Attention's settings (`star_`
    before names of `SETTINGS`) and, from a model's folder, the tokenizer and the end tokens.

    Raises:
        UserError: the folder is not one that it made with Star Attention, or the settings do not
            fit the engine.
    """
    from star_attention.models.tokenizer import save_tokenizer

    content = read_content(folder)
    settings = content.get("pretrained_config", {}).get(STAR, {})
    given = {name: star.get(f"star_{name}") for name in SETTINGS}
    settings.update({name: value for name, value in given.items() if value is not None})
    if tokenizer:
        settings[_ENDS] = end_tokens(tokenizer)
    config = engine_config(folder, content)
    try:
        (folder / CONFIG).write_text(json.dumps(content, indent=4))
        write_rotary(config.model, config.limits.max_seq_len, folder / ROTARY)
        if tokenizer:
            save_tokenizer(tokenizer, folder / TOKENIZER)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def load_plugins(folder: Path) -> None:
    """TensorRT-LLM's plugin library, where the engine of `folder` uses it. TensorRT is loaded.

    Raises:
        UserError: it cannot be loaded.
    """
    plugins = used_plugins(read_content(folder))
    if not plugins:
        return
    needs = f"the engine was built with TensorRT-LLM's {plugins[0]}: "
    package = importlib.util.find_spec("tensorrt_llm")
    if package is None or not package.submodule_search_locations:
        raise UserError(f"{needs}install TensorRT-LLM, or build it with --{plugins[0]} disable")
    path = Path(package.submodule_search_locations[0]) / "libs/libnvinfer_plugin_tensorrt_llm.so"
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"{needs}its library cannot be loaded: {error}") from None
    initialize = library.initTrtLlmPlugins
    initialize.argtypes, initialize.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_bool
    if not initialize(None, b"tensorrt_llm"):
        raise UserError(f"{needs}its library {path} does not register them")


def used_plugins(content: Mapping[str, Any]) -> list[str]:
    """TensorRT-LLM's plugins in an engine; none in those of star-attn build."""
    settings = content.get("build_config", {}).get("plugin_config", {})
    return [
        name
        for name, value in settings.items()
        if name.endswith("_plugin") and value and name not in _NOT_USED
    ]
