"""The TensorRT part compiles with every version's headers, and its plugins do what the interfaces
of that version ask. Needs no GPU and no TensorRT library. Headers are those of pip's kernel-lens,
and each folder in TENSORRT_HEADERS (scripts/tensorrt_headers.sh makes one)."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ("attention_plugin", "attention_step", "layer_plugins", "page_exchange", "plugin_library")
ENGINE = ("builder", "session", "tensorrt")
TESTS = ("plugin_loading_test", "plugin_test")
FLAGS = "-std=c++17 -fvisibility=hidden -Wall -Wextra -Werror"
ALLOWED = ("unused-parameter", "deprecated-declarations")


def package(name, folder):
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return [found for place in places or () for found in sorted(Path(place).glob(folder))]


def header_sets():
    """Folders with NvInfer.h, as pytest's parameters."""
    pip = [pytest.param(folder, id="pip") for folder in package("kernel_lens", "include/tensorrt")]
    named = os.environ.get("TENSORRT_HEADERS")
    if not named:
        reason = "TENSORRT_HEADERS names no folder with other versions' headers"
        return [*pip, pytest.param(None, id="others", marks=pytest.mark.skip(reason))]
    return [*pip, *(pytest.param(each, id=each.name) for each in sorted(Path(named).iterdir()))]


def with_header(name):
    """The first folder that has it of those of the CUDA toolkit and of pip's packages."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    folders = (toolkit, *package("nvidia", "*/include"))
    return next((folder for folder in folders if (folder / name).exists()), None)


def compiler(headers):
    """Runs the compiler with these headers."""
    ours = ("plugin", "plugin/include", "csrc", "csrc/include")
    foreign = [headers, with_header("cuda_runtime_api.h")]
    cublas = with_header("cublasLt.h")
    parser = (headers / "NvOnnxParser.h").exists()
    command = [
        *("c++", *FLAGS.split(), *(f"-Wno-{name}" for name in ALLOWED)),
        *(f"-I{folder}" for folder in ours),
        *(part for folder in foreign for part in ("-isystem", folder)),
        *(("-idirafter", cublas, "-DSTAR_ATTENTION_CUBLAS") if cublas else ()),
        *(("-DSTAR_ATTENTION_ONNX_PARSER",) if parser else ()),
    ]

    def run(*arguments):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run.sources = [*PLUGIN, *(["linear_plugin"] if cublas else [])]
    run.others = [*ENGINE, *(["onnx_parser"] if parser else [])]
    return run


@pytest.fixture(params=header_sets())
def compile_with(request):
    if not shutil.which("c++"):
        pytest.skip("a C++ compiler is not installed")
    if not with_header("cuda_runtime_api.h"):
        pytest.skip("cuda_runtime_api.h is neither in CUDA_HOME nor in a pip package")
    return compiler(request.param)


def test_plugins(compile_with, tmp_path):
    """The kernels are not linked: nothing here calls them."""
    sources = [f"plugin/{name}.cpp" for name in compile_with.sources]
    library, program = tmp_path / "plugin.so", tmp_path / "interface_test"
    compile_with("-shared", "-fPIC", "-o", library, *sources)
    compile_with("-o", program, "tests/cpp/plugin_interface_test.cpp", "-ldl")
    done = subprocess.run([program, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_engine(compile_with):
    sources = [f"plugin/{name}.cpp" for name in compile_with.others]
    tests = [f"tests/cpp/{name}.cpp" for name in TESTS]
    compile_with("-fsyntax-only", *sources, *tests)


@pytest.mark.parametrize("compile_with", header_sets()[:1], indirect=True)
def test_bindings(compile_with):
    folders = [*package("pybind11", "include"), *package("torch", "include")]
    pybind11 = next((each for each in folders if (each / "pybind11/pybind11.h").exists()), None)
    python = Path(sysconfig.get_path("include"))
    if not pybind11 or not (python / "Python.h").exists():
        pytest.skip("pybind11's headers or Python's are not installed")
    folders = ("-isystem", pybind11, "-isystem", python)
    compile_with("-fsyntax-only", *folders, "plugin/bindings.cpp")
