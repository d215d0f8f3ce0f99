"""Peak memory of a SimCLR run, with and without --micro-batch: `python benchmarks/micro_batch_memory.py`.

Each line is a fresh process that trains on 8,192 images of Fashion-MNIST for one epoch; its largest resident set is
what the kernel reports when it ends. Two threads.
"""

import argparse
import gzip
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from sslfast.training import data
from sslfast.training.datasets import IDX_NAMES

IMAGES = 8192


def write_part_of_fashion_mnist(folder: Path) -> None:
    """Write the first images as files of MNIST's kind, all of them small enough not to matter."""
    for split, count in (("train", IMAGES), ("test", 16)):
        images = data.load("fashion-mnist", split)
        for name, content in zip(IDX_NAMES[split], (images.source[:count, 0], images.labels[:count]), strict=True):
            array = content.numpy().astype(np.uint8)
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))


def peak_mebibytes(*options: str) -> float:
    command = [sys.executable, "-m", "sslfast", "simclr", "--no-evaluate", "--checkpoint-seconds", "1e9", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="small", help="of sslfast simclr (default: small)")
    parser.add_argument("--whole", action="store_true", help="also the batch of 4096 in one piece")
    arguments = parser.parse_args()
    runs = [(512, 0), (4096, 512)] + ([(4096, 0)] if arguments.whole else [])
    with tempfile.TemporaryDirectory() as temporary:
        write_part_of_fashion_mnist(Path(temporary))
        first = None
        for batch, slice_size in runs:
            options = ["--data", temporary, "--epochs", "1", "--encoder", arguments.encoder, "--batch-size", str(batch)]
            options += ["--micro-batch", str(slice_size), "--run", f"{temporary}/{batch}-{slice_size}"]
            peak = peak_mebibytes(*options)
            first = first or peak
            print(
                f"--batch-size {batch} --micro-batch {slice_size}: {peak:,.0f} MiB, {peak / first:.2f} times",
                flush=True,
            )


if __name__ == "__main__":
    main()
