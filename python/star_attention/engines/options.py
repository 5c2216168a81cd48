"""How a model is computed on a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from star_attention.config import KV_DTYPES, MERGE_PATHS, KvDtype, MergePath
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.models.quantization import QUANTIZATIONS, Quantization

LoadFormat = Literal["auto", "dummy"]
LOAD_FORMATS: tuple[LoadFormat, ...] = ("auto", "dummy")
# What each device computes in; the first is the default.
DTYPES = {"cpu": ("float32", "bfloat16", "float16"), "cuda": ("bfloat16", "float16")}
# Elements of a head that the GPU kernels have.
_HEAD_DIMS = (64, 128)
# Compute capability from which on GPUs compute in FP8.
FP8_CAPABILITY = (8, 9)
# Share of a GPU's free memory that the KV cache takes; activations of long blocks need the rest.
_KV_CACHE_SHARE = 0.8


@dataclass(frozen=True)
class EngineOptions:
    """How a model is computed on a rank.

    Attributes:
        device: `cpu` or `cuda`; on `cuda`, ranks of a machine take its GPUs in turn.
        dtype: `float32` (the CPU's default), `bfloat16` (CUDA's) or `float16`.
        load_format: `dummy`: random weights for the model's config, to try speed and memory.
        kv_cache_gib: memory of the KV cache; None: 0.8 of what the weights leave free of a GPU, and
            on the CPU as much as is needed.
        merge: how ranks on GPUs merge attention: over `peer` memory, `nccl`, or `auto`.
        tp: processes that share a rank's model (tensor parallelism), neighbours in the job.
        quantization: `fp8`: projections compute in FP8 (on a CPU they are only rounded to it, to
            see what it does); `int8`: in INT8, on a CPU; `none`: in `dtype`; `auto`: in FP8 if the
            checkpoint's are and the GPU can.
        kv_dtype: as in `StarConfig`.
    """

    device: str = "cpu"
    dtype: str | None = None
    load_format: LoadFormat = "auto"
    kv_cache_gib: float | None = None
    merge: MergePath = "auto"
    tp: int = 1
    quantization: Quantization = "auto"
    kv_dtype: KvDtype = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("device", tuple(DTYPES)),
            ("load_format", LOAD_FORMATS),
            ("merge", MERGE_PATHS),
            ("quantization", QUANTIZATIONS),
            ("kv_dtype", KV_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                option = "--" + name.replace("_", "-")
                raise UserError(
                    f"{option} is {getattr(self, name)!r}: use one of {', '.join(allowed)}"
                )
        if self.dtype not in (None, *DTYPES[self.device]):
            raise UserError(
                f"--dtype is {self.dtype!r} with --device {self.device}: "
                f"use {' or '.join(DTYPES[self.device])}"
            )
        if self.quantization == "int8" and self.device != "cpu":
            raise UserError("--quantization int8 is for --device cpu: use fp8 on a GPU")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            raise UserError(f"--kv-cache-gib is {self.kv_cache_gib}: use a number above 0")
        if self.tp < 1:
            raise UserError(f"--tp is {self.tp}: use 1 or more")
        if self.tp > 1 and self.device == "cpu" and self.dtype not in (None, "float32"):
            raise UserError(f"--tp {self.tp} on the CPU computes in float32, not {self.dtype}")

    def kv_cache_bytes(self, free: int) -> int:
        """Memory that the KV cache takes of the `free` bytes that the weights leave of a GPU.

        Raises:
            UserError: it wants more than that.
        """
        if self.kv_cache_gib is None:
            return int(_KV_CACHE_SHARE * free)
        if self.kv_cache_gib * 2**30 > free:
            raise UserError(
                f"--kv-cache-gib is {self.kv_cache_gib:g}, but the weights leave "
                f"{free / 2**30:.1f} GiB for this rank: use at most "
                f"{_KV_CACHE_SHARE * free / 2**30:.1f}"
            )
        return int(self.kv_cache_gib * 2**30)


def free_memory() -> int:
    """Bytes of this machine's memory that programs may still take."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


def check_gpu_model(config: ModelConfig) -> None:
    """Raises UserError for a model that the GPU kernels cannot compute."""
    config.check_no_gemma("on GPUs: use --device cpu")
    if config.head_dim not in _HEAD_DIMS:
        raise UserError(
            f"the model's heads have {config.head_dim} elements, the GPU kernels "
            f"{' or '.join(map(str, _HEAD_DIMS))}: use --device cpu"
        )
