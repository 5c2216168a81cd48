"""The C++ tests of the TensorRT plugin, as pytest runs them. STAR_ATTENTION_BUILD names a build
folder other than build/, TENSORRT_LIB_DIR the folder of TensorRT's libraries where the loader
does not find them."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_TENSORRT = 77  # exit status


def built(name: str) -> str:
    folders = (Path(os.environ.get("STAR_ATTENTION_BUILD", ROOT / "build")), ROOT / "python")
    found = [file for folder in folders for file in folder.rglob(name)]
    if not found:
        pytest.skip(f"{name} is not built in {folders[0]}: it needs nvcc and TensorRT's headers")
    return str(max(found, key=lambda file: file.stat().st_mtime))


def environment(*folders: str) -> dict[str, str]:
    """With these folders and those of pip's cuBLAS for the loader."""
    nvidia = importlib.util.find_spec("nvidia")
    cublas = [
        Path(folder).glob("cu*/lib")
        for folder in (nvidia.submodule_search_locations if nvidia else [])
    ]
    before = os.environ.get("LD_LIBRARY_PATH", "")
    path = [*folders, before, *(str(found) for each in cublas for found in each)]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, path))}


def run(*command: str, folders: tuple[str, ...] = ()) -> None:
    folder = os.environ.get("TENSORRT_LIB_DIR")
    command += (folder,) if folder else ()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment(*folders)
    )
    print(done.stdout, done.stderr, sep="")
    if done.returncode == NO_TENSORRT:
        pytest.skip(" ".join(done.stdout.split()))
    assert done.returncode == 0


@pytest.mark.no_gpu
def test_interfaces():
    program, library = built("plugin_interface_test"), built("libstar_attention_plugin.so")
    subprocess.run([program, library], check=True, env=environment())


@pytest.mark.no_gpu
def test_every_way_of_loading():
    run(built("plugin_loading_test"), built("libstar_attention_plugin.so"))


def test_plugin_in_a_network():
    program = built("plugin_test")
    gpu = pytest.importorskip("star_attention.distributed.gpu", exc_type=ImportError)
    run(program, folders=(str(Path(gpu._nccl_path()).parent),))
