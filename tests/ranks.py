"""Starts the ranks of a test: processes with gloo, forked from one that has imported what takes long."""

import contextlib
import datetime
import multiprocessing
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

SLOW_TO_IMPORT = ["torch", "lightly.loss", "open_clip.loss", "sslfast.losses", "sslfast.methods.simclr"]


@contextlib.contextmanager
def group(rank: int, world: int, port: int, timeout: float = 30):
    """Within the block this process is one rank of `world`, on one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=timeout), world_size=world, rank=rank
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def start(function: Callable, world: int, *args) -> list:
    """Start processes that call function(rank, world, port, *args); the function is one of a module."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    processes = [context.Process(target=function, args=(rank, world, port, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def join(processes: list, seconds: float = 120) -> list[int | None]:
    """Wait until all have ended and return their exit codes: None where one had to be killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
