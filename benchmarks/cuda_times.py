"""Times of the ops on a CUDA device beside their peers there; the last part of `make test-cuda`.

    python benchmarks/cuda_times.py [--device cuda] [--quick]

Medians of at least half a second of calls, after a warm-up, with the device waited for (torch.utils.benchmark).
Behind a peer's time: how many times ours it is. Small problems wait for the CPU, which launches kernels; *kernels* is
what the device itself works in ours.
"""

import argparse
from collections.abc import Callable
from functools import partial

import diffusers
import peers
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from sslfast import ops, schedulers
from sslfast.losses import ClipLoss, NTXentLoss, SigLipLoss
from sslfast.transforms import SimCLRTransform


def median(function: Callable[[], object], quick: bool) -> float:
    """Seconds of a call."""
    function()
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.01 if quick else 0.5).median


def kernel_time(function: Callable[[], object], device: str) -> float:
    """Seconds that the device works in a call."""
    if device != "cuda":
        return float("nan")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            function()
        torch.cuda.synchronize()
    return sum(event.device_time for event in profiler.events() if event.device_type == DeviceType.CUDA) / 10 * 1e-6


def race(functions: dict[str, Callable[[], object]], device: str, quick: bool) -> dict[str, float]:
    """Seconds of a call of each, ours first, and what the device works in ours."""
    seconds = {name: median(function, quick) for name, function in functions.items()}
    ours = next(iter(functions))
    return {ours: seconds.pop(ours), "kernels": kernel_time(functions[ours], device)} | seconds


def print_table(title: str, case_names: list[str], rows: list[tuple[list, dict[str, float]]]) -> None:
    """rows: the case, and the seconds of ours, of its kernels and of each peer."""
    names = max((list(seconds) for _, seconds in rows), key=len)
    print(f"\n{title}\n\n| {' | '.join([*case_names, *names])} |\n|{' --- |' * (len(case_names) + len(names))}")
    for case, seconds in rows:
        ours = seconds[names[0]]
        cells = [
            f"{seconds[name] * 1e3:.3g} ms" + (f", {seconds[name] / ours:.1f}×" if name not in names[:2] else "")
            if name in seconds
            else ""
            for name in names
        ]
        print(f"| {' | '.join([*map(str, case), *cells])} |")


def loss_and_gradients(loss: Callable, z1: torch.Tensor, z2: torch.Tensor) -> tuple:
    return torch.autograd.grad(loss(z1, z2), (z1, z2))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def info_nce(device: str, quick: bool) -> None:
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
            chosen = losses | ({"torch.compile": peers.nt_xent_compiled()} if batch == 4096 else {})
            steps = {name: partial(loss_and_gradients, loss, z1, z2) for name, loss in chosen.items()}
            rows.append(([batch, 128, name_of(dtype)], race(steps, device, quick)))
    print_table("NT-Xent, forward and backward", ["batch", "dim", "dtype"], rows)


def augment(device: str, quick: bool) -> None:
    rows = []
    for size, source, count in ((32, 32, 8),) if quick else ((32, 32, 512), (96, 96, 256), (224, 256, 128)):
        images = torch.randint(0, 256, (count, 3, source, source), dtype=torch.uint8, device=device)
        kernel_size = size // 10 // 2 * 2 + 1 if size > 32 else 0
        ours = SimCLRTransform(size, kernel_size=kernel_size or None, blur_p=0.5 if kernel_size else 0.0)
        kornia = peers.augment_kornia(size, 3, 1.0, kernel_size)
        functions = {"sslfast": ours, "kornia": kornia}
        steps = {name: partial(f, images) for name, f in functions.items()}
        rows.append(([size, count], race(steps, device, quick)))
    print_table("SimCLR's augmentation, two views", ["size", "images"], rows)


def pair_of_vectors(batch: int, dim: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    return [F.normalize(torch.randn(batch, dim, device=device)).to(dtype).requires_grad_() for _ in range(2)]


def similarity_lse(device: str, quick: bool) -> None:
    def moco(query: torch.Tensor, own: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
        return F.softplus(ops.similarity_lse(query, queue, 10.0) - 10.0 * (query * own).sum(1)).mean()

    rows = []
    for queue_size in (64,) if quick else (4096, 65536):
        for dtype in (torch.float32, torch.bfloat16):
            vectors = pair_of_vectors(256, 128, dtype, device)
            queue = F.normalize(torch.randn(queue_size, 128, device=device)).to(dtype)
            losses = {"sslfast": partial(moco, queue=queue), "F.cross_entropy": partial(peers.moco, queue=queue)}
            steps = {name: partial(loss_and_gradients, f, *vectors) for name, f in losses.items()}
            rows.append(([256, queue_size, 128, name_of(dtype)], race(steps, device, quick)))
    print_table("MoCo's loss, forward and backward", ["batch", "queue", "dim", "dtype"], rows)
    scale = torch.tensor(10.0, device=device, requires_grad=True)
    clip = ClipLoss()
    image_text_loss("CLIP's loss", partial(clip, logit_scale=scale), peers.clip(), device, quick)


def sigmoid_loss(device: str, quick: bool) -> None:
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (10.0, -10.0))
    siglip = SigLipLoss()
    ours = partial(siglip, logit_scale=scale, logit_bias=bias)
    image_text_loss("SigLIP's loss", ours, peers.siglip(), device, quick)


def image_text_loss(title: str, ours: Callable, open_clip: Callable, device: str, quick: bool) -> None:
    rows = []
    for batch in (16,) if quick else (1024, 4096, 16384):
        for dtype in (torch.float32, torch.bfloat16):
            vectors = pair_of_vectors(batch, 512, dtype, device)
            losses = {"sslfast": ours, "open_clip": open_clip}
            if batch == 4096:
                torch.compiler.reset()
                losses["torch.compile"] = torch.compile(open_clip, dynamic=False)
            steps = {name: partial(loss_and_gradients, f, *vectors) for name, f in losses.items()}
            rows.append(([batch, 512, name_of(dtype)], race(steps, device, quick)))
    print_table(f"{title}, forward and backward", ["batch", "dim", "dtype"], rows)


def diffusion(device: str, quick: bool) -> None:
    rows = []
    for size in (8,) if quick else (32, 64):
        for case, functions in diffusion_cases(size, device).items():
            rows.append(([case, f"64×3×{size}×{size}"], race(functions, device, quick)))
    print_table("Diffusion; the peer of the loss is F.mse_loss", ["case", "images"], rows)


def diffusion_cases(size: int, device: str) -> dict[str, dict[str, Callable]]:
    x, out, target = torch.randn(3, 64, 3, size, size, device=device)
    prediction = out.clone().requires_grad_()
    alphas = diffusers.DDPMScheduler().alphas_cumprod.to(device)
    seeds, t = torch.arange(64, device=device), torch.arange(64, device=device) * 10
    steps = {}
    for name, library, options in (("sslfast", schedulers, {"seeds": seeds}), ("diffusers", diffusers, {})):
        scheduler = library.DDPMScheduler()
        scheduler.set_timesteps(50, device=device)
        steps[name] = partial(scheduler.step, out, scheduler.timesteps[25], x, **options)
    add_noise = diffusers.DDPMScheduler().add_noise

    def with_gradient(loss: Callable) -> tuple:
        return torch.autograd.grad(loss(prediction, target), prediction)

    return {
        "DDPM step, seeds=": steps,
        "q_sample": {
            "sslfast": partial(ops.q_sample, x, t, alphas),
            "diffusers": lambda: add_noise(x, torch.randn_like(x), t),
        },
        "loss and gradient": {
            "sslfast": partial(with_gradient, lambda a, b: ops.diffusion_loss(a, b, t, alphas)),
            "diffusers": partial(with_gradient, F.mse_loss),
        },
    }


def group_norm_silu(device: str, quick: bool) -> None:
    def step(function: Callable, leaves: list, grad: torch.Tensor) -> tuple:
        return torch.autograd.grad(function(leaves[0], 32, *leaves[1:]), leaves, grad)

    functions = {"sslfast": ops.group_norm_silu, "PyTorch": lambda *args: F.silu(F.group_norm(*args))}
    rows = []
    for samples, channels, size in ((2, 32, 4),) if quick else ((64, 64, 32), (64, 256, 8), (16, 128, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x, grad = torch.randn(2, samples, channels, size, size, device=device).to(dtype)
                weight, bias = torch.randn(2, channels, device=device).to(dtype)
                x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
                leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
                steps = {name: partial(step, f, leaves, grad) for name, f in functions.items()}
                case = [f"{samples}×{channels}×{size}×{size}", name_of(dtype), name_of(layout)]
                rows.append((case, race(steps, device, quick)))
    print_table("Group normalisation + SiLU, forward and backward", ["shape", "dtype", "layout"], rows)


def rotate4(device: str, quick: bool) -> None:
    functions = {"sslfast": ops.rotate4, "torch.rot90": peers.rotate4_rot90}
    rows = []
    for size in (8,) if quick else (32, 64, 128):
        for dtype in (torch.uint8, torch.float32):
            images = torch.randint(0, 256, (64, 3, size, size), device=device).to(dtype)
            steps = {name: partial(f, images) for name, f in functions.items()}
            rows.append(([f"64×3×{size}×{size}", name_of(dtype)], race(steps, device, quick)))
    print_table("Four rotations", ["images", "dtype"], rows)


def ceilings() -> str:
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    c, d = torch.randn(8192, 8192, device="cuda"), torch.empty(2**28, device="cuda")
    e = torch.empty_like(d)
    products, floats, copies = (median(f, False) for f in (lambda: a @ b, lambda: c @ c, lambda: e.copy_(d)))
    work = 2 * 8192**3 * 1e-12
    return (
        f"bfloat16 product {work / products:.0f} TFLOP/s, float32 product {work / floats:.0f} TFLOP/s, "
        f"copy {2 * 4 * 2**28 / copies * 1e-12:.2f} TB/s"
    )


OPS = (info_nce, augment, similarity_lse, sigmoid_loss, diffusion, group_norm_silu, rotate4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, few calls: to see that it runs")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {ceilings()}")
    for op in OPS:
        op(arguments.device, arguments.quick)
