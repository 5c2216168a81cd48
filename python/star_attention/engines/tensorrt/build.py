"""From a model's files to the folder of a TensorRT engine."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from star_attention.cache import cache_folder
from star_attention.engines.options import check_gpu_model
from star_attention.engines.tensorrt.folder import (
    PLAN,
    ROTARY,
    TOKENIZER,
    EngineConfig,
    EngineLimits,
    write_rotary,
)
from star_attention.engines.tensorrt.library import LogFile, gpu_of, load_tensorrt
from star_attention.engines.tensorrt.onnx import GRAPH, WEIGHTS, write_graph
from star_attention.errors import UserError
from star_attention.models.checkpoint import is_engine_folder, open_checkpoint
from star_attention.models.config import ModelConfig
from star_attention.models.weights import Checkpoint

BUILD_DTYPES = ("float16", "bfloat16")
GEMM_PLUGIN = ("auto", "disable")
BUILD_QUANTIZATIONS = ("none", "fp8")
_FP8_CAPABILITY = 9.0  # where cuBLAS takes scales of rows


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        dtype: of weights and computation; TensorRT before 9 knows no bfloat16.
        gemm_plugin: "auto": projections by cuBLAS where TensorRT's own kernels add up in float16
            (before 9); "disable": always by TensorRT.
        quantization: "fp8": of projections, as in `EngineOptions`; "none": all in `dtype`.
        optimization_level: TensorRT's, 0 to 5: how long it looks for the fastest kernels.
        timing_cache: file of what it has timed, read and written; None: in the user's cache folder.
        workspace_gib: memory that a kernel may use beside its tensors; None: any.
        workers: threads that build; None: TensorRT decides.
    """

    dtype: str = "float16"
    gemm_plugin: str = "auto"
    quantization: str = "none"
    optimization_level: int = 3
    timing_cache: Path | None = None
    workspace_gib: float | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in BUILD_DTYPES:
            raise UserError(f"--dtype is {self.dtype!r}: use {' or '.join(BUILD_DTYPES)}")
        if self.gemm_plugin not in GEMM_PLUGIN:
            choices = " or ".join(GEMM_PLUGIN)
            raise UserError(f"--gemm_plugin is {self.gemm_plugin!r}: use {choices}")
        if self.quantization not in BUILD_QUANTIZATIONS:
            choices = " or ".join(BUILD_QUANTIZATIONS)
            raise UserError(f"--quantization is {self.quantization!r}: use {choices}")
        if self.is_fp8 and self.gemm_plugin == "disable":
            raise UserError(
                "--gemm_plugin is 'disable': with --quantization fp8, which is cuBLAS's, leave it "
                "away"
            )
        if not 0 <= self.optimization_level <= 5:
            raise UserError(f"--optimization_level is {self.optimization_level}: use 0 to 5")
        if self.workspace_gib is not None and self.workspace_gib <= 0:
            raise UserError(f"--workspace_gib is {self.workspace_gib}: use more than 0")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers is {self.workers}: use 1 or more")

    @property
    def is_fp8(self) -> bool:
        return self.quantization == "fp8"


def limits_for(model: ModelConfig, **given: int | None) -> EngineLimits:
    """Limits from those that are given: by default, texts as long as the model was made for, and
    passes of a quarter of that or a block.

    Raises:
        UserError: they do not fit together.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    longest = chosen.setdefault("max_seq_len", model.max_position)
    chosen.setdefault("max_input_len", max(1, longest - min(1024, longest // 8)))
    page = chosen.get("tokens_per_block", EngineLimits.tokens_per_block)
    quarter = -(-longest // (4 * page)) * page
    at_once = max(8192, chosen.get("block_size", quarter))
    chosen.setdefault("max_num_tokens", min(at_once, longest))
    return EngineLimits(**chosen)


def build_engine(
    model: Path,
    folder: Path,
    limits: EngineLimits,
    options: BuildOptions | None = None,
    on_progress: Callable[[str], None] = lambda what: None,
) -> EngineConfig:
    """Builds the engine of the model at `model`, with its tokenizer, into `folder`.

    The folder is there when all of it is done, and stays as it was if the build fails.

    Raises:
        UserError: the model cannot be read, TensorRT fails, or the folder cannot be written.
    """
    from star_attention.models.tokenizer import save_tokenizer

    def add_tokenizer(unfinished: Path) -> None:
        save_tokenizer(model, unfinished / TOKENIZER)

    checkpoint = open_checkpoint(model)
    return build_folder(checkpoint, folder, limits, options, on_progress, add_tokenizer)


def build_folder(
    checkpoint: Checkpoint,
    folder: Path,
    limits: EngineLimits,
    options: BuildOptions | None = None,
    on_progress: Callable[[str], None] = lambda what: None,
    add: Callable[[Path], None] = lambda unfinished: None,
) -> EngineConfig:
    """As `build_engine`, without a tokenizer; `add` may put more files into the folder."""
    options = options or BuildOptions()
    if folder.exists() and not is_engine_folder(folder) and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} has other files in it: name another folder")
    check_gpu_model(checkpoint.config)
    trt = load_tensorrt()
    gpu, capability = gpu_of()
    if options.is_fp8:
        _check_fp8(trt, capability)
    log = LogFile(folder.with_name(f"{folder.name}.build.log"), on_progress=on_progress)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    graph = unfinished / "graph"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        graph.mkdir(parents=True)
        add(unfinished)
        on_progress("writing the graph")
        gemm_plugin = options.gemm_plugin == "auto" and trt.HAS_CUBLAS
        write_graph(
            checkpoint, graph, graph, options.dtype, gemm_plugin=gemm_plugin, fp8=options.is_fp8
        )
        weights_sha256 = _sha256(graph / WEIGHTS)
        on_progress("building the engine")
        _build_plan(trt, checkpoint.config, limits, options, graph, unfinished, log)
        shutil.rmtree(graph)
        write_rotary(checkpoint.config, limits.max_seq_len, unfinished / ROTARY)
        config = EngineConfig(
            model=checkpoint.config,
            limits=limits,
            dtype=options.dtype,
            tensorrt=trt.version(),
            gpu=gpu,
            compute_capability=capability,
            weights_sha256=weights_sha256,
            built_by=version("star-attention-trt"),
            quantization=options.quantization if options.is_fp8 else None,
        )
        config.write(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return config


def _check_fp8(trt: Any, capability: str) -> None:
    if float(capability) < _FP8_CAPABILITY:
        raise UserError(
            f"--quantization fp8 of an engine needs a GPU of compute capability {_FP8_CAPABILITY} "
            f"or newer, this one has {capability}: leave it away"
        )
    if not trt.HAS_FP8:
        raise UserError(
            "--quantization fp8 of an engine needs cuBLAS 12.9 or newer: reinstall "
            "star-attention-trt with a newer CUDA toolkit, or leave it away"
        )


# The least, the usual and the largest shape of an input.
Range = tuple[list[int], list[int], list[int]]


def profiles(model: ModelConfig, limits: EngineLimits) -> list[dict[str, Range]]:
    """The context profile and the generation profile. TensorRT chooses kernels for the usual
    shapes: a full pass, and a token of one question."""
    most, batch = limits.max_num_tokens, limits.max_batch_size
    context = (1, most, most), (1, 1, limits.max_sequences), (1, 1, limits.max_logit_rows)
    generation = (1, 1, batch), (1, 1, batch), (1, 1, batch)
    return [_profile(model, limits, *sizes) for sizes in (context, generation)]


def _profile(
    model: ModelConfig,
    limits: EngineLimits,
    tokens: Sequence[int],
    sequences: Sequence[int],
    rows: Sequence[int],
) -> dict[str, Range]:
    pages = limits.max_pages_of_sequence
    rotary = limits.max_seq_len * model.rope.rows_per_position

    def ranges(*sizes: Sequence[int]) -> Range:
        least, usual, largest = zip(*sizes, strict=True)
        return list(least), list(usual), list(largest)

    return {
        "input_ids": ranges(tokens),
        "position_ids": ranges(tokens),
        "slot_mapping": ranges(tokens),
        "cu_seqlens_q": ranges([count + 1 for count in sequences]),
        "kv_lens": ranges(sequences),
        "page_table": ranges(sequences, (1, pages, pages)),
        "logit_rows": ranges(rows),
        "rotary": ranges([rotary] * 3, [model.head_dim] * 3),
    }


def _build_plan(
    trt: Any,
    model: ModelConfig,
    limits: EngineLimits,
    options: BuildOptions,
    graph: Path,
    folder: Path,
    log: LogFile,
) -> None:
    cache = options.timing_cache or cache_folder() / "tensorrt.timing"
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        trt.build(
            onnx=str(graph / GRAPH),
            engine=str(folder / PLAN),
            profiles=profiles(model, limits),
            dtype=options.dtype,
            optimization_level=options.optimization_level,
            timing_cache=str(cache),
            workspace_bytes=int((options.workspace_gib or 0) * 2**30),
            workers=options.workers or 0,
            log=log,
        )
    except (RuntimeError, ValueError) as error:
        raise log.explain(error) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
