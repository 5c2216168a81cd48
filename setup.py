"""The Python package, and by CMake the CUDA kernels (star_attention._C) where nvcc is found and the
TensorRT plugin (star_attention._trt) where TensorRT's headers are found too.

STAR_ATTENTION_CUDA=0 leaves the kernels out, STAR_ATTENTION_ARCHS chooses the GPU architectures,
TENSORRT_ROOT the TensorRT. STAR_ATTENTION_TESTS=1 builds the C++ tests and examples too, in build/.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")


def why_not() -> str | None:
    if os.environ.get("STAR_ATTENTION_CUDA") == "0":
        return "STAR_ATTENTION_CUDA=0"
    return None if NVCC else f"nvcc is neither on the PATH nor in {CUDA_HOME}/bin"


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        self.output = output = Path(self.get_ext_fullpath(extension.name)).parent.resolve()
        tests = os.environ.get("STAR_ATTENTION_TESTS") == "1"
        archs = os.environ.get("STAR_ATTENTION_ARCHS", "80;90a")
        subprocess.check_call(
            [
                *("cmake", "-S", ".", "-B", self.build_temp, "-G", "Ninja"),
                f"-DCMAKE_CUDA_COMPILER={NVCC}",
                f"-DSTAR_ATTENTION_ARCHS={archs}",
                f"-DSTAR_ATTENTION_OUTPUT_DIRECTORY={output}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DTENSORRT_ROOT={os.environ.get('TENSORRT_ROOT', '')}",
                f"-DSTAR_ATTENTION_TESTS_DIRECTORY={Path('build').resolve() if tests else ''}",
            ]
        )
        subprocess.check_call(["cmake", "--build", self.build_temp])
        print(f"star_attention: built the CUDA kernels for {archs}")

    def copy_extensions_to_source(self) -> None:
        """In an editable installation, the libraries that the module loads lie beside it too."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("star_attention"))
        for library in self.output.glob("*.so"):
            shutil.copy2(library, package)


if reason := why_not():
    print(f"star_attention: the CUDA kernels are not built: {reason}")
    setup()
else:
    setup(
        ext_modules=[Extension("star_attention._C", [])],
        cmdclass={"build_ext": CMakeBuild},
        setup_requires=["cmake>=3.24", "ninja", "pybind11>=2.13"],
    )
