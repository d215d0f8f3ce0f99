"""Times of the ops on a CUDA device beside their peers there; the last part of `make test-cuda`.

    python benchmarks/cuda_times.py [--device cuda] [--quick]

Medians of at least a second of calls, after a warm-up, with the device waited for (torch.utils.benchmark).
"""

import argparse
from collections.abc import Callable
from functools import partial

import peers
import torch
from torch.utils.benchmark import Timer

from sslfast.losses import NTXentLoss
from sslfast.transforms import SimCLRTransform


def median(function: Callable[[], object], quick: bool) -> float:
    """Seconds of a call."""
    function()
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.01 if quick else 1.0).median


def print_table(title: str, case_names: list[str], rows: list[tuple[list, dict[str, float]]]) -> None:
    """rows: the case, and the seconds of each peer, ours first."""
    names = list(rows[0][1])
    print(f"\n{title}\n\n| {' | '.join([*case_names, *names])} |\n|{' --- |' * (len(case_names) + len(names))}")
    for case, seconds in rows:
        ours = seconds[names[0]]
        cells = [
            f"{s * 1e3:.3g} ms" + (f", {s / ours:.1f}×" if name != names[0] else "") for name, s in seconds.items()
        ]
        print(f"| {' | '.join([*map(str, case), *cells])} |")


def loss_and_gradients(loss: Callable, z1: torch.Tensor, z2: torch.Tensor) -> tuple:
    return torch.autograd.grad(loss(z1, z2), (z1, z2))


def nt_xent(device: str, quick: bool) -> None:
    losses = {
        "sslfast": NTXentLoss(peers.TEMPERATURE),
        "lightly": peers.nt_xent_lightly(),
        "F.cross_entropy": peers.nt_xent_cross_entropy,
    }
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (64,) if quick else (512, 2048, 4096, 8192):
            views = torch.randn(2, batch, 128, device=device).to(dtype)
            z1, z2 = (view.clone().requires_grad_() for view in views)
            seconds = {name: median(partial(loss_and_gradients, loss, z1, z2), quick) for name, loss in losses.items()}
            rows.append(([batch, 128, str(dtype).removeprefix("torch.")], seconds))
    print_table("NT-Xent, forward and backward", ["batch", "dim", "dtype"], rows)


def simclr_augmentation(device: str, quick: bool) -> None:
    rows = []
    for size, source, count in ((32, 32, 8),) if quick else ((32, 32, 512), (96, 96, 256), (224, 256, 128)):
        images = torch.randint(0, 256, (count, 3, source, source), dtype=torch.uint8, device=device)
        kernel_size = size // 10 // 2 * 2 + 1 if size > 32 else 0
        ours = SimCLRTransform(size, kernel_size=kernel_size or None, blur_p=0.5 if kernel_size else 0.0)
        kornia = peers.augment_kornia(size, 3, 1.0, kernel_size)
        functions = {"sslfast": ours, "kornia": kornia}
        rows.append(([size, count], {name: median(partial(f, images), quick) for name, f in functions.items()}))
    print_table("SimCLR's augmentation, two views", ["size", "images"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, few calls: to see that it runs")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    nt_xent(arguments.device, arguments.quick)
    simclr_augmentation(arguments.device, arguments.quick)
