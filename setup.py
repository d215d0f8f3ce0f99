"""Builds sslfast._C: setuptools calls CMake, CMake owns every compiler flag.

SSLFAST_CUDA=auto|on|off   auto (default): CUDA kernels when torch has CUDA and there is an nvcc of its major version
SSLFAST_CUDA_ARCHS="…"     CMake's list of CUDA architectures
SSLFAST_SANITIZE="…"       sanitizers of g++ or clang, e.g. address,undefined
CXX, CUDACXX               the compilers
MAX_JOBS=N                 parallel compile jobs
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# pip puts cmake and ninja beside this Python, which need not be on PATH.
SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


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


def find_program(*names: str) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name, path=SEARCH_PATH))), None)


def find_tools() -> tuple[str, str]:
    """The paths of CMake and of the C++ compiler, after a look at everything else that a build needs."""
    cmake = find_program("cmake")
    missing = [name for name, found in (("cmake", cmake), ("pybind11", find_spec("pybind11"))) if not found]
    if missing:
        stop(f"{' and '.join(missing)} not found. Run `pip install cmake ninja pybind11`, then build again.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop(f"the headers of {sys.executable} are missing. Install them (Debian: `apt-get install python3-dev`).")
    wanted = os.environ.get("CXX")
    compiler = find_program(wanted) if wanted else find_program("c++", "g++", "clang++")
    if compiler is None:
        found = f"CXX is {wanted!r}, which is no program" if wanted else "no C++ compiler was found"
        stop(f"{found}. Install g++ 11 or newer (Debian: `apt-get install g++`), or set CXX to such a compiler.")
    return cmake, compiler


def decide_cuda(torch) -> tuple[str | None, str]:
    """The nvcc to compile CUDA kernels with, or None and the reason why not (shown by `sslfast info`)."""
    wanted = os.environ.get("SSLFAST_CUDA", "auto").lower()
    if wanted not in ("auto", "on", "off"):
        stop(f"SSLFAST_CUDA must be auto, on or off, and is {wanted!r}.")
    cuda_home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = find_program(os.environ.get("CUDACXX", ""), "nvcc", str(cuda_home / "bin" / "nvcc"))
    why_not = ""
    if wanted == "off":
        why_not = "SSLFAST_CUDA=off when it was built"
    elif not any((ROOT / "csrc/ops/cuda").glob("*.cu")):
        why_not = "this version has no CUDA kernels yet; CUDA tensors run the plain PyTorch reference"
    elif torch.version.cuda is None:
        why_not = f"torch {torch.__version__} is a CPU-only build"
    elif nvcc is None:
        why_not = f"no nvcc was found on PATH or in {cuda_home}"
    else:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\d+)\.\d+", text)
        if release is None or release[1] != torch.version.cuda.split(".")[0]:
            why_not = f"torch has CUDA {torch.version.cuda}, but {nvcc} is {release[0] if release else 'unknown'}"
    if why_not and wanted == "on":
        stop(f"SSLFAST_CUDA=on, but {why_not}.")
    return (None if why_not else nvcc), why_not


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = import_torch()
        cmake, compiler = find_tools()
        import pybind11

        nvcc, cuda_why_not = decide_cuda(torch)
        sanitize = os.environ.get("SSLFAST_SANITIZE", "")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # A folder for each configuration: CMake cannot change the compiler of one, and none rebuilds another's objects.
        python = f"py{sys.version_info.major}.{sys.version_info.minor}"
        parts = (f"torch{torch.__version__}", python, Path(compiler).name, sanitize.replace(",", "-"))
        build = ROOT / "build" / "-".join(filter(None, parts))
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSSLFAST_TORCH_DIR={Path(torch.__file__).resolve().parent}",
            f"-DSSLFAST_TORCH_VERSION={torch.__version__}",
            f"-DSSLFAST_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-DSSLFAST_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DSSLFAST_CUDA_WHY_NOT={cuda_why_not}",
            f"-DSSLFAST_SANITIZE={sanitize}",
            f"-DSSLFAST_OUTPUT_DIR={target.parent}",
            f"-DSSLFAST_OUTPUT_NAME={target.name}",
        ]
        if ninja := find_program("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            if archs := os.environ.get("SSLFAST_CUDA_ARCHS"):
                configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
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
