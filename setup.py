"""Builds rlhf_kernels._native, and ._cuda where there is nvcc, with CMake + Ninja; or a pure-Python wheel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")


def why_not_native() -> str | None:
    """The reason to build without the native module, None to build it."""
    if os.environ.get("RLHF_KERNELS_NO_NATIVE", "0") not in ("", "0"):
        return "RLHF_KERNELS_NO_NATIVE is set"
    if os.environ.get("CXX") is None and not any(map(shutil.which, COMPILERS)):
        return f"no C++ compiler found (looked for {', '.join(COMPILERS)}; CXX is not set)"
    return None


def find_nvcc() -> str | None:
    """nvcc from CUDACXX, the PATH or CUDA's usual folder; None without one or with RLHF_KERNELS_NO_CUDA=1."""
    if os.environ.get("RLHF_KERNELS_NO_CUDA", "0") not in ("", "0"):
        return None
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")


class CMakeBuild(build_ext):
    """Runs CMake on csrc/. A compiler that is there but fails is an error, not a silent pure-Python install."""

    def build_extensions(self) -> None:
        names = {ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        target = names["rlhf_kernels._native"]
        cuda = names.get("rlhf_kernels._cuda")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "--fresh",  # an isolated build leaves paths of its own tools in the cache, gone by the next one
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRLHF_NATIVE_DIR={target.parent}",
            f"-DRLHF_NATIVE_NAME={target.name}",
            *([f"-DRLHF_CUDA_NAME={cuda.name}", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"] if cuda else []),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"rlhf-kernels: {' '.join(error.cmd[:2])} failed (output above). To install without the CUDA C++ "
                "kernels: RLHF_KERNELS_NO_CUDA=1 pip install ...; without any native code, on the PyTorch reference "
                "and Triton alone: RLHF_KERNELS_NO_NATIVE=1 pip install ..."
            ) from None


reason = why_not_native()
if reason:
    print(f"rlhf-kernels: pure-Python build, no native CPU kernels: {reason}.", file=sys.stderr)

modules = [] if reason else ["_native", *(["_cuda"] if find_nvcc() else [])]
setup(
    packages=find_packages(include=["rlhf_kernels", "rlhf_kernels.*"])
    + find_packages("python", include=["rlhf_trainer", "rlhf_trainer.*"]),
    ext_modules=[Extension(f"rlhf_kernels.{module}", sources=[]) for module in modules],
    cmdclass={"build_ext": CMakeBuild},
)
