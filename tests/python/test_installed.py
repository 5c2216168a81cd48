"""The installed C++ library, as other projects use it. scripts/test.sh installs it in
build/installed; STAR_ATTENTION_BUILD names a build folder other than build/."""

import importlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from star_attention.engines.tensorrt.library import _import_trt

ROOT = Path(__file__).parents[2]
INSTALLED = Path(os.environ.get("STAR_ATTENTION_BUILD", ROOT / "build")) / "installed"

pytestmark = [
    pytest.mark.skipif(not INSTALLED.exists(), reason=f"{INSTALLED}: nothing is installed"),
    pytest.mark.skipif(not shutil.which("cmake"), reason="CMake is not installed"),
]


@pytest.fixture
def prefix(tmp_path):
    """Elsewhere than where it was installed."""
    return shutil.copytree(INSTALLED, tmp_path / "prefix", symlinks=True)


def find_headers(package, folder):
    """A folder of a pip package; what is in the system's paths needs none."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / folder if spec else None


@pytest.fixture
def libraries(prefix):
    return next(prefix.glob("lib*"))  # lib or lib64


@pytest.fixture
def tensorrt(tmp_path, libraries):
    """TENSORRT_ROOT."""
    headers = find_headers("kernel_lens", "include/tensorrt")
    if not headers or not (libraries / "libstar_attention_plugin.so").exists():
        pytest.skip("needs a library with the TensorRT plugin, and pip's kernel-lens")
    (tmp_path / "tensorrt").mkdir()
    return Path(shutil.copytree(headers, tmp_path / "tensorrt/include")).parent


def configure(source, build, *options):
    return subprocess.run(
        ["cmake", "-S", source, "-B", build, *(f"-D{option}" for option in options)],
        capture_output=True,
        text=True,
    )


def build(source, folder, *options):
    run = configure(source, folder, *options)
    assert run.returncode == 0, run.stderr
    subprocess.run(["cmake", "--build", folder], check=True)


def lines(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_kernels(tmp_path, prefix, libraries):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        "project(user LANGUAGES CXX)\n"
        "find_package(star_attention 0.1 REQUIRED)\n"
        "add_executable(user user.cpp)\n"
        "target_link_libraries(user PRIVATE star_attention::kernels)\n"
    )
    (tmp_path / "user.cpp").write_text(
        "#include <cstdio>\n"
        "#include <stdexcept>\n"
        "#include <star_attention/layers.h>\n"
        "int main() {\n"
        "  try {\n"
        "    star_attention::check(star_attention::RmsNormParams{});\n"
        "  } catch (const std::invalid_argument& error) {\n"
        "    std::puts(error.what());\n"
        "  }\n"
        "}\n"
    )
    build(tmp_path, tmp_path / "build", f"CMAKE_PREFIX_PATH={prefix}")
    assert lines(tmp_path / "build/user") == [
        "hidden_size: got 0, expected a multiple of 8, at most 32768"
    ]
    linked = "\n".join(lines("ldd", tmp_path / "build/user"))
    assert f"libstar_attention.so.0.1 => {libraries}/libstar_attention.so.0.1 " in linked


def test_the_example(tmp_path, prefix, tensorrt):
    json = find_headers("nlohmann_json", "include")
    options = [f"CMAKE_PREFIX_PATH={prefix}", f"TENSORRT_ROOT={tensorrt}"]
    options += [f"CMAKE_INCLUDE_PATH={json}"] if json else []
    build(ROOT / "plugin/examples", tmp_path / "build", *options)
    run = subprocess.run([tmp_path / "build/ask_tokens"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("usage: ask_tokens <engine folder>")


def test_an_engine_of_another_tensorrt_is_refused(tmp_path, prefix, tensorrt):
    version = tensorrt / "include/NvInferVersion.h"
    version.write_text(
        "#define NV_TENSORRT_MAJOR 7\n#define NV_TENSORRT_MINOR 1\n#define NV_TENSORRT_PATCH 0\n"
    )
    options = [f"CMAKE_PREFIX_PATH={prefix}", f"TENSORRT_ROOT={tensorrt}"]
    run = configure(ROOT / "plugin/examples", tmp_path / "build", *options)
    assert run.returncode == 1
    said = " ".join(run.stderr.split())
    assert "it was built with TensorRT" in said
    assert "name one of that major version in TENSORRT_ROOT" in said


def test_no_engine_without_tensorrt(tmp_path, prefix, libraries):
    (libraries / "cmake/star_attention/engine.cmake").unlink(missing_ok=True)
    run = configure(ROOT / "plugin/examples", tmp_path / "build", f"CMAKE_PREFIX_PATH={prefix}")
    assert run.returncode == 1
    assert "it was built without TensorRT's headers" in " ".join(run.stderr.split())


def test_what_the_libraries_show(libraries):
    """Their own names only. Inline code of the C++ library is weak or unique."""
    for library in libraries.glob("*.so"):
        shown = [line.split(" ", 2)[1:] for line in lines("nm", "-DC", "--defined-only", library)]
        names = [name for kind, name in shown if kind not in "VWu"]
        ours = ("star_attention::", "getCreators", "getPluginCreators", "setLoggerFinder")
        assert names
        assert [name for name in names if not name.startswith(ours)] == []
        # Nothing that only the library itself calls.
        assert not [name for name in names if "current_device" in name or "_sm80" in name]


def test_modules_find_what_they_call():
    """A name that is hidden by mistake is missing when a module is loaded."""
    package = ROOT / "python/star_attention"
    if list(package.glob("_C.*.so")):
        importlib.import_module("star_attention._C")
    if list(package.glob("_trt.*.so")):
        assert _import_trt()


def test_libraries_look_beside_themselves(libraries):
    package = ROOT / "python/star_attention"
    for library in [*libraries.glob("*.so"), *package.glob("*.so*")]:
        found = [line for line in lines("readelf", "-d", library) if "RUNPATH" in line]
        folders = found[0].split("[")[1].rstrip("]").split(":") if found else []
        assert all(folder.startswith("$ORIGIN") for folder in folders), library
