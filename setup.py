"""Builds sslfast._C: setuptools calls CMake, CMake owns every compiler flag.

SSLFAST_CUDA=auto|on|off   auto (default) compiles the CUDA kernels when torch has CUDA and an nvcc of the same major version is found
SSLFAST_CUDA_ARCHS="…"     CMake's list of CUDA architectures
MAX_JOBS=N                 parallel compile jobs
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def stop(sentence: str):
    sys.exit(f"\nsslfast cannot be built: {sentence}\n")


def import_torch():
    try:
        import torch
    except ImportError:
        stop(
            "torch is not installed where the build runs. sslfast compiles against the torch that it will run with: "
            "install torch first, then run `pip install --no-build-isolation .`"
        )
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
        stop(f"it needs torch 2.11 or newer and found {torch.__version__}. Upgrade torch, then build again.")
    return torch


def decide_cuda(torch) -> tuple[bool, str]:
    """Whether to compile CUDA kernels, and the reason if not (shown by `sslfast info`)."""
    wanted = os.environ.get("SSLFAST_CUDA", "auto").lower()
    if wanted not in ("auto", "on", "off"):
        stop(f"SSLFAST_CUDA must be auto, on or off, and is {wanted!r}.")
    reason = ""
    if wanted == "off":
        reason = "SSLFAST_CUDA=off when it was built"
    elif not any((ROOT / "csrc/ops/cuda").glob("*.cu")):
        reason = "this version has no CUDA kernels yet; CUDA tensors run the plain PyTorch reference"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU-only build"
    elif (nvcc := shutil.which("nvcc")) is None:
        reason = "no nvcc was found on PATH"
    else:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"release (\d+)\.(\d+)", text)
        if found is None or found.group(1) != torch.version.cuda.split(".")[0]:
            version = found.group(0) if found else "an unknown release"
            reason = f"torch has CUDA {torch.version.cuda} but nvcc is {version}"
    if reason and wanted == "on":
        stop(f"SSLFAST_CUDA=on, but {reason}.")
    return not reason, reason


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = import_torch()
        import pybind11

        if shutil.which("cmake") is None:
            stop("cmake was not found. Install it with `pip install cmake ninja`.")
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            stop("no C++ compiler was found. Install g++ 11 or newer (Debian: `apt-get install g++`) or set CXX.")
        cuda, why_not = decide_cuda(torch)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"torch{torch.__version__}-py{sys.version_info.major}.{sys.version_info.minor}"
        torch_dir = Path(torch.__file__).resolve().parent
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSSLFAST_TORCH_DIR={torch_dir}",
            f"-DSSLFAST_TORCH_VERSION={torch.__version__}",
            f"-DSSLFAST_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-DSSLFAST_CUDA={'ON' if cuda else 'OFF'}",
            f"-DSSLFAST_CUDA_WHY_NOT={why_not}",
            f"-DSSLFAST_SANITIZE={os.environ.get('SSLFAST_SANITIZE', '')}",
            f"-DSSLFAST_OUTPUT_DIR={target.parent}",
            f"-DSSLFAST_OUTPUT_NAME={target.name}",
        ]
        if "SSLFAST_CUDA_ARCHS" in os.environ:
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['SSLFAST_CUDA_ARCHS']}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (configure, ["cmake", "--build", str(build), "--parallel", jobs]):
            if subprocess.run(command, check=False).returncode != 0:
                stop("the compiler or CMake reported the error above.")
        # Read before _C is loaded, so that another torch gives a sentence instead of an undefined symbol.
        (target.parent / "_built_for.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')

    def copy_extensions_to_source(self) -> None:  # editable and in-place builds
        super().copy_extensions_to_source()
        built = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()  # in the source tree by now
        built_for = Path(self.build_lib).resolve() / "sslfast" / "_built_for.py"
        shutil.copy(built_for, built.parent / built_for.name)


setup(ext_modules=[Extension("sslfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
