"""Measuring sticks: time, memory, and what the machine does at best."""

import concurrent.futures
import ctypes
import functools
import gc
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

SHORTEST_TURN = 2e-3  # seconds: what is faster is called several times in a turn


@dataclass(frozen=True)
class Ceiling:
    """Work that the machine does as fast as it can: run() does `amount` of it, operations or bytes."""

    name: str
    amount: float
    run: Callable[[], object]


@functools.cache
def matmul_ceiling(dtype: torch.dtype) -> Ceiling:
    """The fastest matrix product that torch reaches: MKL's through mm, or oneDNN's through a 1×1 convolution."""
    name = f"{str(dtype).removeprefix('torch.')} matrix product"
    candidates = []
    for m, k, n in ((2048, 2048, 2048), (8192, 128, 512), (4096, 128, 4096)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        out = torch.empty(m, n, dtype=dtype)
        image, filters = a.view(1, m, 1, k).permute(0, 3, 1, 2), b.view(n, k, 1, 1)
        candidates.append(Ceiling(name, 2 * m * k * n, functools.partial(torch.mm, a, b.t(), out=out)))
        candidates.append(Ceiling(name, 2 * m * k * n, functools.partial(F.conv2d, image, filters)))
    return max(candidates, key=lambda c: c.amount / min(seconds(c.run, 1) for _ in range(8)))


@functools.cache
def copy_ceiling() -> Ceiling:
    """A copy of 256 MiB, which counts twice: read and written."""
    source = torch.zeros(2**26)
    return Ceiling("copy", 2 * source.nbytes, functools.partial(torch.empty_like(source).copy_, source))


def seconds(run: Callable[[], object], calls: int) -> float:
    """The time of one call, averaged over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def turn(run: Callable[[], object]) -> tuple[int, float]:
    """How many calls make a turn of a race, and how long it takes."""
    run()
    once = seconds(run, 1)
    calls = max(1, math.ceil(SHORTEST_TURN / once))
    return calls, calls * once


def peak_memory(make: Callable, *args, warm_up: tuple) -> int:
    """The most memory, in bytes, that a call of make(*args)() holds beyond what was there before it.

    Measured from the process's resident set in a fresh process, after a call of make(*warm_up)(): what libraries set up
    once is not counted. What an op keeps for its next call is, if the warm-up is a smaller problem. `make` must be a
    function at the top of a module.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak_memory, make, args, warm_up).result()


def _peak_memory(make: Callable, args: tuple, warm_up: tuple) -> int:
    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(f"{field}:")[1].split()[0])

    make(*warm_up)()
    run = make(*args)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    result = run()
    peak = resident("VmHWM")
    del result
    return peak - before
