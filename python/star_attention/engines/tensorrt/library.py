"""TensorRT's libraries: where they are, and where what they say goes."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from star_attention.errors import UserError

# A folder that has libnvinfer.so; otherwise pip's package or the loader's search path.
FOLDER = "TENSORRT_LIB_DIR"


@functools.cache
def load_tensorrt() -> Any:
    """The module `star_attention._trt`, with TensorRT's libraries loaded.

    Raises:
        UserError: one of them is missing.
    """
    try:
        _trt = _import_trt()
    except ImportError as error:
        raise UserError(
            "TensorRT engines need star_attention._trt: set TENSORRT_ROOT to TensorRT's folder and "
            f"reinstall star-attention-trt where nvcc is found ({error})"
        ) from None
    try:
        _trt.load(os.environ.get(FOLDER, "") or _pip_folder())
    except RuntimeError as error:
        raise UserError(
            f"{error}: name the folder of its libraries in {FOLDER}, or add it to LD_LIBRARY_PATH"
        ) from None
    return _trt


def require_cupy() -> None:
    """Raises UserError where CuPy is not installed."""
    if importlib.util.find_spec("cupy") is None:
        raise UserError("TensorRT engines need CuPy: pip install 'star-attention-trt[trt]'")


def gpu_of(device: int | None = None) -> tuple[str, str]:
    """Name and compute capability of a GPU, by default CuPy's current one.

    Raises:
        UserError: there is no CuPy, or no GPU.
    """
    require_cupy()
    from cupy.cuda import runtime

    try:
        properties = runtime.getDeviceProperties(runtime.getDevice() if device is None else device)
    except runtime.CUDARuntimeError as error:
        raise UserError(f"an engine is built on the GPU that will run it: {error}") from None
    return properties["name"].decode(), f"{properties['major']}.{properties['minor']}"


class LogFile:
    """What TensorRT says, in a file; made when it first says something."""

    def __init__(
        self,
        path: Path,
        levels: Sequence[str] = ("verbose", "info", "warning", "error"),
        on_progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.path = path
        self._levels = levels
        self._on_progress = on_progress
        self._file: Any = None

    def __call__(self, level: str, message: str) -> None:
        if level == "progress":
            self._on_progress(message)
        if level not in self._levels:
            return
        if self._file is None:
            self._file = self.path.open("w", buffering=1)
        print(time.strftime("%H:%M:%S"), level, message, file=self._file)

    def explain(self, error: Exception) -> UserError:
        """The error with the log's place, if it has more to tell."""
        seen = f" (log: {self.path})" if self._file else ""
        return UserError(f"{error}{seen}")


def session_log() -> LogFile:
    """For running an engine: warnings and errors."""
    path = Path(tempfile.gettempdir()) / f"star-attn-tensorrt-{os.getpid()}.log"
    return LogFile(path, levels=("warning", "error"))


def _import_trt() -> Any:
    try:
        return importlib.import_module("star_attention._trt")
    except ImportError as error:
        cublas = _pip_cublas(str(error))
        if not cublas:
            raise
        ctypes.CDLL(cublas)
        return importlib.import_module("star_attention._trt")


def _pip_cublas(error: str) -> str:
    """The library of the package nvidia-cublas if `error` says that it is missing, or nothing."""
    missing = re.match(r"(libcublasLt\.so\.(\d+)):", error)
    spec = importlib.util.find_spec("nvidia") if missing else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, f"cu{missing[2]}", "lib", missing[1])
        if path.exists():
            return str(path)
    return ""


def _pip_folder() -> str:
    """The libraries of the packages tensorrt-cu* or tensorrt, or nothing."""
    for package in ("tensorrt_libs", "tensorrt"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if any(Path(folder).glob("libnvinfer.so*")):
                return folder
    return ""
