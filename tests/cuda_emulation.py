"""Builds and loads the emulator of tests/cuda_emulator, which runs the CUDA kernels on this machine's CPU."""

import functools
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ORDERS = ("ascending", "descending", "shuffled")  # in which the threads of a block run

# For tests of what only the CUDA kernels have: the fixture `backend` (conftest.py) with these two alone.
on_cuda = pytest.mark.parametrize("backend", ["cuda-emulated", "cuda"], indirect=True)


@functools.cache
def load() -> ModuleType:
    """Return the module sslfast_emulated, built beside the extension; skip the test if it cannot be built."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the emulator switches fibers on x86-64 only")
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    caches = ROOT.glob(f"build/torch{torch.__version__}-{python}-*/CMakeCache.txt")
    caches = [path for path in caches if "\nSSLFAST_SANITIZE:UNINITIALIZED=\n" in path.read_text()]
    if not caches:
        pytest.skip("the emulator is built in the build folder of the extension, which is not there")
    path = max(caches, key=lambda path: path.stat().st_mtime)
    folder, cache = path.parent, path.read_text()
    if "SSLFAST_CUDA_HEADERS:PATH=SSLFAST_CUDA_HEADERS-NOTFOUND" in cache:
        pytest.skip("NVIDIA's headers (cuda_bf16.h) were not found")
    cmake = next(line.split("=", 1)[1] for line in cache.splitlines() if line.startswith("CMAKE_COMMAND:"))
    subprocess.run([cmake, "--build", str(folder), "--target", "sslfast_emulated"], check=True)
    path = next((folder / "tests/cuda_emulator").glob("sslfast_emulated*.so"))
    spec = importlib.util.spec_from_file_location("sslfast_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
