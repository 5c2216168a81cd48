"""What installation and CMake say about toolkits, GPUs and missing tools."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPPORTED = "80, 86, 89, 90a, 100a, 120"
INSTALL = "install a CUDA toolkit of 12.4 to 13 from developer.nvidia.com/cuda-downloads"
LEFT_OUT = "; STAR_ATTENTION_CUDA=0 leaves the kernels out"

cmake = shutil.which("cmake")
needs_cmake = pytest.mark.skipif(cmake is None, reason="CMake is not installed")


def script(folder, name, *lines):
    """A program in `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def nvcc(folder, version="13.0"):
    line = f'echo "Cuda compilation tools, release {version}, V{version}.48"'
    return script(folder, "nvcc", line)


def architectures(tmp_path, spelt, **environment):
    program = tmp_path / "architectures.cmake"
    program.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f"include({ROOT}/cmake/architectures.cmake)\n"
        'star_attention_architectures(archs "${SPELT}")\n'
        'message(NOTICE "=${archs}")\n'
    )
    return subprocess.run(
        [cmake, f"-DSPELT={spelt}", "-P", str(program)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@needs_cmake
@pytest.mark.parametrize(
    ("spelt", "archs"),
    [
        *((arch, "90a") for arch in ("90", "9.0", "90a", "9.0a", "sm_90", "SM_90a", "compute_90a")),
        *((arch, "100a") for arch in ("100", "10.0", "sm_100a")),
        *((arch, "120") for arch in ("120", "12.0", "sm_120")),
        ("80;90a", "80;90a"),
        ("8.0, 8.6,sm_89", "80;86;89"),
        ("80 90 9.0 sm_90a", "80;90a"),
        ("80-real;90-virtual", "80-real;90a-virtual"),
    ],
)
def test_spellings_of_architectures(tmp_path, spelt, archs):
    assert architectures(tmp_path, spelt).stderr == f"={archs}\n"


@needs_cmake
def test_what_90_means_is_said(tmp_path):
    said = "-- sm_90 means 90a, which has all of the GPU's instructions\n"
    assert architectures(tmp_path, "80 sm_90").stdout == said
    assert architectures(tmp_path, "80 sm_90a").stdout == ""


@needs_cmake
@pytest.mark.parametrize("spelt", ["75", "9", "90b", "80a", "sm_87", "1000", "hopper", "all"])
def test_other_architectures_are_refused(tmp_path, spelt):
    run = architectures(tmp_path, f"80 {spelt}")
    assert run.returncode == 1
    assert f"\n   STAR_ATTENTION_ARCHS: {spelt} is not one of {SUPPORTED} or native\n" in run.stderr


@needs_cmake
def test_no_architecture_is_refused(tmp_path):
    run = architectures(tmp_path, " ")
    assert f"   STAR_ATTENTION_ARCHS is empty: name some of {SUPPORTED}, or native\n" in run.stderr


@needs_cmake
def test_native(tmp_path):
    script(tmp_path / "bin", "nvidia-smi", "echo 9.0", "echo 8.9", "echo 9.0")
    assert architectures(tmp_path, "80 native", PATH=f"{tmp_path}/bin").stderr == "=80;90a;89\n"
    script(tmp_path / "bin", "nvidia-smi", "echo No devices were found", "exit 6")
    run = architectures(tmp_path, "native", PATH=f"{tmp_path}/bin")
    assert (
        f"   STAR_ATTENTION_ARCHS=native: nvidia-smi finds no GPU: name some of {SUPPORTED}\n"
        in run.stderr
    )


@needs_cmake
@pytest.mark.skipif(not shutil.which("c++"), reason="a C++ compiler is not installed")
@pytest.mark.parametrize(
    ("version", "options", "said"),
    [
        ("12.3", [], f"{{nvcc}} is CUDA 12.3.48: {INSTALL}"),
        ("12.6", ["-DSTAR_ATTENTION_ARCHS=80,120"], "120 needs CUDA 12.8, {nvcc} is 12.6.48"),
        ("12.6", ["-DCMAKE_CUDA_ARCHITECTURES=10.0"], "100a needs CUDA 12.8, {nvcc} is 12.6.48"),
        (None, [], f"nvcc was not found: {INSTALL}, or name its nvcc in CMAKE_CUDA_COMPILER"),
    ],
)
def test_toolkits_are_refused(tmp_path, version, options, said):
    compiler = nvcc(tmp_path / "bin", version) if version else tmp_path / "none"
    run = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, f"-DCMAKE_CUDA_COMPILER={compiler}", *options],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert said.format(nvcc=compiler) + "\n" in run.stderr


@needs_cmake
@pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("make")), reason="nvcc and make are not installed"
)
def test_all_architectures_compile(tmp_path):
    """The smallest kernel that all of them have."""
    options = ["-DSTAR_ATTENTION_PYTHON=OFF", f"-DSTAR_ATTENTION_ARCHS={SUPPORTED}"]
    make = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Unix Makefiles", *options]
    subprocess.run(make, check=True)
    kernel = "csrc/layers/gather_rows.cu"
    subprocess.run(["make", "-C", tmp_path, f"{kernel}.o"], check=True)
    compiled = tmp_path / f"CMakeFiles/star_attention_common.dir/{kernel}.o"
    found = re.findall(rb"sm_(\d+a?)", compiled.read_bytes())
    assert sorted(set(found)) == sorted(SUPPORTED.encode().split(b", "))


CUDA_HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")


@pytest.mark.skipif(not (CUDA_HEADERS / "cuda.h").exists(), reason="CUDA is not installed")
@pytest.mark.skipif(not shutil.which("c++"), reason="a C++ compiler is not installed")
def test_tensor_maps_with_cuda_12_4(tmp_path):
    """Its headers lack cudaGetDriverEntryPointByVersion, CUDA 13's the unversioned one."""
    (tmp_path / "cuda_runtime_api.h").write_text(
        "#pragma once\n"
        "#include_next <cuda_runtime_api.h>\n"
        "#undef CUDART_VERSION\n"
        "#define CUDART_VERSION 12040\n"
        "#define cudaGetDriverEntryPointByVersion is_not_in_12_4\n"
        "#undef cudaGetDriverEntryPoint\n"
        "cudaError_t cudaGetDriverEntryPoint(const char*, void**, unsigned long long,\n"
        "                                    cudaDriverEntryPointQueryResult*);\n"
    )
    (tmp_path / "map.cpp").write_text('#include "common/tensor_map.h"\n')
    folders = [tmp_path, ROOT / "csrc", ROOT / "csrc/include", CUDA_HEADERS]
    run = subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", *(f"-I{folder}" for folder in folders), "map.cpp"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture
def source(tmp_path):
    """As much of the repository as pip reads before it compiles; programs are in bin/ alone."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    package = tmp_path / "source/python/star_attention"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    (tmp_path / "bin").mkdir()
    return tmp_path / "source"


def environment(source, **variables):
    ours = ("CXX", "PYTHONPATH", "STAR_ATTENTION_", "TENSORRT_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        "PATH": str(source.parent / "bin"),
        "CUDA_HOME": str(source.parent / "no_cuda"),
        **variables,
    }


def wheel(source, **variables):
    """pip's lines."""
    options = ("--verbose", "--no-deps", "--no-index", "--no-build-isolation")
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", source.parent, source],
        capture_output=True,
        text=True,
        env=environment(source, **variables),
    )
    return run.returncode, [line.strip() for line in (run.stdout + run.stderr).splitlines()]


def tools(source, cmake_version="3.25.1", cmake_status=0):
    """All programs that the kernels need."""
    programs = source.parent / "bin"
    nvcc(programs)
    script(programs, "c++")
    version = f'[ "$1" = --version ] && echo "cmake version {cmake_version}" && exit'
    script(programs, "cmake", version, 'echo "CMake $1"', f"exit {cmake_status}")
    script(programs, "ninja", "echo 1.11.1")


def pybind11(source, version="2.13.6"):
    """Its installation, as a folder for PYTHONPATH."""
    folder = source.parent / "packages"
    information = folder / f"pybind11-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Name: pybind11\nVersion: {version}\n")
    return str(folder)


def test_wheel_without_nvcc(source):
    status, lines = wheel(source)
    reason = f"nvcc is neither on the PATH nor in {source.parent}/no_cuda/bin: install the CUDA "
    reason += "toolkit, 12.4 to 13"
    assert status == 0
    assert f"star_attention: the CUDA kernels are not built: {reason}" in lines
    assert list(source.parent.glob("star_attention_trt-*-py3-none-any.whl"))

    status, lines = wheel(source, STAR_ATTENTION_CUDA="1")
    assert status == 1
    assert f"star_attention: {reason}{LEFT_OUT}" in lines


def test_wheel_without_anything_else(source):
    nvcc(source.parent / "bin")
    status, lines = wheel(source, PYTHONPATH=pybind11(source, "2.12.0"))
    assert status == 1
    assert (
        "star_attention: the CUDA kernels need a C++ compiler (Debian: apt install g++; or name "
        "one in CXX), cmake>=3.24 ninja>=1.10 pybind11>=2.13 (pip install them)" + LEFT_OUT
    ) in lines


def test_wheel_with_an_old_cmake(source):
    tools(source, cmake_version="3.22.1")
    status, lines = wheel(source, PYTHONPATH=pybind11(source))
    assert status == 1
    said = "star_attention: the CUDA kernels need cmake>=3.24 (pip install them)"
    assert said + LEFT_OUT in lines


def test_wheel_when_cmake_fails(source):
    tools(source, cmake_status=1)
    status, lines = wheel(source, PYTHONPATH=pybind11(source))
    assert status == 1
    end = lines.index(
        "star_attention: CMake could not build the CUDA kernels: its message is above" + LEFT_OUT
    )
    assert lines[end - 1] == "CMake -S"
    assert not any("Traceback" in line for line in lines)


def test_what_pip_installs_before_it_builds(source):
    """With build isolation pip asks for it."""

    def required():
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                "from setuptools import build_meta; "
                "print('=', *build_meta.get_requires_for_build_wheel())",
            ],
            cwd=source,
            capture_output=True,
            text=True,
            env=environment(source),
        )
        return run.stdout.splitlines()[-1]

    assert required() == "="
    tools(source, cmake_version="3.22.1")
    assert required() == "= cmake>=3.24 pybind11>=2.13"


def test_a_source_distribution_has_the_kernels(source):
    """What CMake reads, and nothing that was built."""
    shutil.copy(ROOT / "MANIFEST.in", source)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    for folder in ("cmake", "csrc", "plugin"):
        shutil.copytree(ROOT / folder, source / folder)
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", source.parent],
        cwd=source,
        capture_output=True,
        text=True,
        env=environment(source, STAR_ATTENTION_CUDA="0"),
    )
    assert run.returncode == 0, run.stderr
    (archive,) = source.parent.glob("*.tar.gz")
    with tarfile.open(archive) as stored:
        names = {name.split("/", 1)[-1] for name in stored.getnames()}
    files = subprocess.run(
        ["git", "ls-files", "CMakeLists.txt", "cmake", "csrc", "plugin"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(files.stdout.split()) <= names
