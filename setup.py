"""Builds rlhf_kernels._native with CMake + Ninja, or a pure-Python wheel where that is asked for or not possible."""

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


class CMakeBuild(build_ext):
    """Runs CMake on csrc/. A compiler that is there but fails is an error, not a silent pure-Python install."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
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
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"rlhf-kernels: {' '.join(error.cmd[:2])} failed (output above). To install without the native CPU "
                "kernels, on the PyTorch reference alone: RLHF_KERNELS_NO_NATIVE=1 pip install ..."
            ) from None


reason = why_not_native()
if reason:
    print(f"rlhf-kernels: pure-Python build, no native CPU kernels: {reason}.", file=sys.stderr)

setup(
    packages=find_packages(include=["rlhf_kernels", "rlhf_kernels.*"])
    + find_packages("python", include=["rlhf_trainer", "rlhf_trainer.*"]),
    ext_modules=[] if reason else [Extension("rlhf_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
