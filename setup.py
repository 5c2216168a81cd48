"""The Python package, and by CMake the CUDA kernels (star_attention._C) where nvcc is found and the
TensorRT plugin (star_attention._trt) where TensorRT's headers are found too.

STAR_ATTENTION_CUDA=0 leaves the kernels out, 1 insists on them. STAR_ATTENTION_ARCHS names the GPU
architectures, TENSORRT_ROOT the TensorRT. STAR_ATTENTION_TESTS=1 builds the C++ tests and examples
too, in build/, and installs the C++ library in build/installed.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA = os.environ.get("STAR_ATTENTION_CUDA")
CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
NO_NVCC = (
    f"nvcc is neither on the PATH nor in {CUDA_HOME}/bin: install the CUDA toolkit, 12.4 to 13"
)


def end(reason: str) -> None:
    sys.exit(f"star_attention: {reason}; STAR_ATTENTION_CUDA=0 leaves the kernels out")


def run(*command: str) -> None:
    if subprocess.call(command):
        end("CMake could not build the CUDA kernels: its message is above")


def is_new_enough(version: str, needed: str) -> bool:
    numbers = [tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (version, needed)]
    return numbers[0] >= numbers[1]


def has_program(name: str, needed: str) -> bool:
    if not shutil.which(name):
        return False
    done = subprocess.run([name, "--version"], capture_output=True, text=True)
    return done.returncode == 0 and is_new_enough(done.stdout, needed)


def has_package(name: str, needed: str) -> bool:
    try:
        return is_new_enough(importlib.metadata.version(name), needed)
    except importlib.metadata.PackageNotFoundError:
        return False


def missing_packages() -> list[str]:
    """What pip can install."""
    found = {
        "cmake>=3.24": has_program("cmake", "3.24"),
        "ninja>=1.10": has_program("ninja", "1.10"),
        "pybind11>=2.13": has_package("pybind11", "2.13"),
    }
    return [package for package, is_found in found.items() if not is_found]


def missing_from_system() -> list[str]:
    """What pip cannot install."""
    compilers = os.environ.get("CXX", "c++ g++ clang++").split()
    found = {
        "a C++ compiler (Debian: apt install g++; or name one in CXX)": any(
            map(shutil.which, compilers)
        ),
        "Python.h (Debian: apt install python3-dev)": Path(
            sysconfig.get_path("include"), "Python.h"
        ).exists(),
    }
    return [what for what, is_found in found.items() if not is_found]


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        self.output = output = Path(self.get_ext_fullpath(extension.name)).parent.resolve()
        tests = Path("build").resolve() if os.environ.get("STAR_ATTENTION_TESTS") == "1" else ""
        archs = os.environ.get("STAR_ATTENTION_ARCHS")
        run(
            *("cmake", "-S", ".", "-B", self.build_temp, "-G", "Ninja"),
            f"-DCMAKE_CUDA_COMPILER={NVCC}",
            *([f"-DSTAR_ATTENTION_ARCHS={archs}"] if archs else []),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTENSORRT_ROOT={os.environ.get('TENSORRT_ROOT', '')}",
            f"-DSTAR_ATTENTION_TESTS_DIRECTORY={tests}",
        )
        run("cmake", "--build", self.build_temp)
        install = ("cmake", "--install", self.build_temp, "--prefix")
        run(*install, str(output), "--component", "python")
        if tests:
            run(*install, f"{tests}/installed")

    def copy_extensions_to_source(self) -> None:
        """In an editable installation, the libraries that the module loads lie beside it too."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("star_attention"))
        for library in self.output.glob("*.so*"):
            shutil.copy2(library, package)


if CUDA == "0" or not NVCC:
    reason = "STAR_ATTENTION_CUDA=0" if CUDA == "0" else NO_NVCC
    if CUDA == "1":
        end(reason)
    print(f"star_attention: the CUDA kernels are not built: {reason}")
    setup()
else:
    packages = missing_packages()
    # With egg_info pip asks which packages to install before it builds. It does not ask with
    # --no-build-isolation.
    missing = missing_from_system()
    if packages and sys.argv[1:2] != ["egg_info"]:
        missing += [f"{' '.join(packages)} (pip install them)"]
    if missing:
        end(f"the CUDA kernels need {', '.join(missing)}")
    setup(
        ext_modules=[Extension("star_attention._C", [])],
        cmdclass={"build_ext": CMakeBuild},
        setup_requires=packages,
    )
