"""Bytes and operations of the CUDA kernels as the emulator counts them, beside the least and beside eager PyTorch.

    python benchmarks/cuda_traffic.py info_nce [batch] [dim]
    python benchmarks/cuda_traffic.py augment [images] [size of the view]
    python benchmarks/cuda_traffic.py similarity_lse|sigmoid_loss [rows] [keys] [dim]
    python benchmarks/cuda_traffic.py diffusion|rotate4 [samples] [size]
    python benchmarks/cuda_traffic.py group_norm_silu [samples] [channels] [size]

A count, not a measurement: it says nothing about time. Bytes are those that the threads ask for, before any cache; of
PyTorch, all inputs and outputs of every operation that is not a view.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import cuda_emulation

from sslfast.ops.augment import STEPS, AugmentDistribution, draw_params, image_sizes

MEBI = 2**20


class EagerTraffic(TorchDispatchMode):
    """Counts the bytes that eager PyTorch moves inside it, and its operations that are no views."""

    bytes = operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        in_place = function._schema.is_mutable
        if in_place or any(x.untyped_storage().data_ptr() not in inputs for x in outputs):
            self.operations += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def info_nce(batch: int = 512, dim: int = 128) -> None:
    emulator = cuda_emulation.load()
    for dtype in (torch.bfloat16, torch.float32):
        z1, z2 = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
        temperature = torch.tensor(0.2)
        emulator.reset_counters()
        loss, lse = emulator.info_nce_forward(z1, z2, temperature, "mean")
        emulator.info_nce_backward(loss, z1, z2, temperature, lse, "mean")

        rows, row = 2 * batch, dim * z1.element_size()
        blocks = -(-rows // 128)
        tiles = blocks * (blocks + 1) // 2
        block_rows = 128 if z1.element_size() == 2 and dim <= 128 else 64
        least = {  # of the loops over tiles: each tile reads its 128 (64) rows of z', and each block its own rows once
            "info_nce_forward": (tiles + blocks) * 128 * row + blocks * blocks * 128 * 4,
            "info_nce_backward": (rows // block_rows + 1) * rows * row + rows * dim * 4,
        }
        print(f"\nNT-Xent, batch {batch} (2·{batch} rows), dim {dim}, {dtype}\n")
        print("| kernel | read, MiB | written, MiB | least of both, MiB | products, GFLOP | exponentials, M |")
        print("|---|--:|--:|--:|--:|--:|")
        for name, c in emulator.counters().items():
            moved = c["read_bytes"] + c["written_bytes"]
            bound = f"{least[name] / MEBI:.2f} (×{moved / least[name]:.2f})" if name in least else ""
            print(
                f"| {name} | {c['read_bytes'] / MEBI:.2f} | {c['written_bytes'] / MEBI:.2f} | {bound} "
                f"| {c['mma_flops'] / 1e9:.2f} | {c['exponentials'] / 1e6:.2f} |"
            )
        with EagerTraffic() as eager:
            leaves = [z.clone().requires_grad_() for z in (z1, z2)]
            z = F.normalize(torch.cat(leaves), dim=1)
            logits = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
            F.cross_entropy(logits, torch.arange(rows).roll(batch)).backward()
        print(f"\nEager PyTorch, F.cross_entropy: {eager.bytes / MEBI:.0f} MiB in {eager.operations} operations")


def replay_with_torchvision(images: torch.Tensor, params, size: int, kernel_size: int) -> None:
    for v in range(len(params.crop)):
        for i, image in enumerate(images):
            x = TF.resized_crop(
                TF.to_dtype(image, torch.float32, scale=True), *params.crop[v, i].tolist(), [size, size]
            )
            x = TF.horizontal_flip(x) if params.flip[v, i] else x
            for step in params.order[v, i].tolist():
                name = STEPS[step]
                if name in STEPS[:4] and (value := getattr(params, name)[v, i].item()) != (0 if name == "hue" else 1):
                    x = getattr(TF, f"adjust_{name}")(x, value)
                elif name == "grayscale" and params.grayscale[v, i]:
                    x = TF.rgb_to_grayscale(x, num_output_channels=3)
                elif name == "blur" and (sigma := params.sigma[v, i].item()) > 0:
                    x = TF.gaussian_blur(x, [kernel_size] * 2, [sigma] * 2)
            TF.normalize(x, [0.5] * 3, [0.25] * 3)


def augment(count: int = 16, size: int = 224) -> None:
    emulator = cuda_emulation.load()
    simclr = AugmentDistribution(
        brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5
    )
    kernel_size = size // 10 // 2 * 2 + 1
    print(f"\nSimCLR's augmentation, {count} images, two views of {size} px; MiB a view\n")
    print("| source | output | read | written | least of both | ratio | torchvision | its operations |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for source in ((32, 32),) if size <= 32 else ((256, 256), (375, 500), (768, 1024)):
        images = torch.randint(0, 256, (count, 3, *source), dtype=torch.uint8)
        params = draw_params([simclr] * 2, image_sizes(images), seed=0)
        with EagerTraffic() as eager:
            replay_with_torchvision(images, params, size, kernel_size)
        for dtype in (torch.float32, torch.bfloat16):
            emulator.reset_counters()
            arguments = (True, size, size, "bilinear", True, kernel_size, [0.5] * 3, [0.25] * 3, dtype, False)
            views = emulator.augment_forward([images], list(params), *arguments)
            read, written = (sum(c[k] for c in emulator.counters().values()) for k in ("read_bytes", "written_bytes"))
            crops = (params.crop[..., 2].double() * params.crop[..., 3]).sum().item()
            least, scale = 3 * crops + views.numel() * views.element_size(), 2 * count * MEBI
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {source[0]} × {source[1]} | {name} | {read / scale:.3f} | {written / scale:.3f} "
                f"| {least / scale:.3f} | {(read + written) / least:.2f} | {eager.bytes / scale:.1f} "
                f"| {eager.operations / (2 * count):.0f} |"
            )


HEADER = "\n| case | kernels | read, MiB | written, MiB | least, MiB | ratio | GFLOP | eager, MiB | operations |"
RULER = "|---|--:|--:|--:|--:|--:|--:|--:|--:|"


def count_case(name: str, least: int, ours: Callable[[], object], eager: Callable[[], object]) -> None:
    """A line of a table; least: bytes if each input of each call is read once and each result written once."""
    emulator = cuda_emulation.load()
    emulator.reset_counters()
    ours()
    counts = emulator.counters().values()
    read, written = (sum(c[k] for c in counts) for k in ("read_bytes", "written_bytes"))
    with EagerTraffic() as traffic:
        eager()
    print(
        f"| {name} | {len(counts)} | {read / MEBI:.2f} | {written / MEBI:.2f} | {least / MEBI:.2f} "
        f"| {(read + written) / least:.2f} | {sum(c['mma_flops'] for c in counts) / 1e9:.2f} "
        f"| {traffic.bytes / MEBI:.2f} | {traffic.operations} |"
    )


def similarity_lse(rows: int = 256, keys: int = 4096, dim: int = 128) -> None:
    emulator = cuda_emulation.load()
    q, k = (F.normalize(torch.randn(n, dim)).bfloat16() for n in (rows, keys))
    leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
    scale = torch.tensor([10.0])

    def by_rows_with_fixed_keys():
        emulator.similarity_lse_forward(q, k, scale, None, None, False, True)

    def both_ways():
        lse, columns, _ = emulator.similarity_lse_forward(q, k, scale, None, None, True, False)
        emulator.similarity_lse_backward(
            q, k, scale, lse, torch.ones_like(lse), None, None, columns, torch.ones_like(columns)
        )

    def eager(fixed_keys):
        logits = 10.0 * (leaves[0] @ (k if fixed_keys else leaves[1]).T)
        lse = logits.logsumexp(1).sum()
        (lse if fixed_keys else lse + logits.logsumexp(0).sum()).backward()

    print(f"{HEADER}\n{RULER}")
    shape, size = f"{rows} × {keys} × {dim}", 2 * dim
    least = (rows + keys) * size + rows * (8 + 4 * dim)
    count_case(f"fixed keys, {shape}", least, by_rows_with_fixed_keys, partial(eager, True))
    count_case(f"rows and columns, {shape}", (rows + keys) * (3 * size + 24), both_ways, partial(eager, False))


def sigmoid_loss(rows: int = 256, keys: int = 4096, dim: int = 128) -> None:
    emulator = cuda_emulation.load()
    q, k = (F.normalize(torch.randn(n, dim)).bfloat16() for n in (rows, keys))
    leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
    ours = partial(emulator.sigmoid_loss_forward, q, k, torch.tensor([10.0]), torch.tensor([-10.0]), 0, True)
    print(f"{HEADER}\n{RULER}")
    least = (rows + keys) * (2 * dim + 4 * dim)
    count_case(
        f"{rows} × {keys} × {dim}", least, ours, lambda: F.softplus(leaves[0] @ leaves[1].T * 10 - 10).sum().backward()
    )


def diffusion(samples: int = 16, size: int = 32) -> None:
    e = cuda_emulation.load()
    x, out, noise = torch.randn(3, samples, 3, size, size)
    leaf = out.clone().requires_grad_()
    seeds, t, alphas = torch.arange(samples), torch.arange(samples), torch.linspace(0.999, 0.01, 50)
    coefficients = torch.tensor([1.0, -0.6, 1.3, 0.4, 0.5, 0.0, 0.0, 0.0, 0.7, 0.0, 0.0, 17.0])

    def eager_step():
        x0 = ((x - 0.6 * out) * 1.3).clamp(-1, 1)
        return 0.4 * x0 + 0.5 * x + 0.7 * torch.randn_like(x)

    def eager_noising():
        a, noise = alphas[t].view(-1, 1, 1, 1), torch.randn_like(x)
        return a.sqrt() * x + (1 - a).sqrt() * noise, noise

    step = partial(e.diffusion_step, out, x, coefficients, 1.0, None, [], None, seeds, "fixed")
    noising = partial(e.diffusion_q_sample, x, t, alphas, "epsilon", None, seeds, 0)
    inputs = (out, noise, t, alphas, "epsilon", None)

    def loss_and_gradient():
        e.diffusion_loss_backward(e.diffusion_loss_forward(*inputs), *inputs)

    def eager_loss():
        F.mse_loss(leaf, noise, reduction="none").mean((1, 2, 3)).sum().backward()

    print(f"{HEADER}\n{RULER}")
    shape = f"{samples}×3×{size}×{size}, float32"
    count_case(f"step with noise by seed, {shape}", 4 * x.nbytes, step, eager_step)
    count_case(f"q_sample, {shape}", 3 * x.nbytes, noising, eager_noising)
    count_case(f"loss and gradient, {shape}", 5 * x.nbytes, loss_and_gradient, eager_loss)


def group_norm_silu(samples: int = 4, channels: int = 64, size: int = 16) -> None:
    emulator = cuda_emulation.load()
    print(f"{HEADER}\n{RULER}")
    for layout in (torch.contiguous_format, torch.channels_last):
        x, grad = (t.contiguous(memory_format=layout) for t in torch.randn(2, samples, channels, size, size))
        weight, bias = torch.randn(2, channels)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]

        def ours(x=x, grad=grad, weight=weight, bias=bias):
            _, mean, rstd = emulator.group_norm_silu_forward(x, 32, weight, bias, 1e-5)
            emulator.group_norm_silu_backward(grad, x, 32, weight, bias, mean, rstd)

        def eager(leaves=leaves, grad=grad):
            F.silu(F.group_norm(leaves[0], 32, *leaves[1:])).backward(grad)

        name = f"forward and backward, {samples}×{channels}×{size}×{size}, {str(layout).removeprefix('torch.')}"
        count_case(name, 5 * x.nbytes, ours, eager)


def rotate4(samples: int = 16, size: int = 32) -> None:
    emulator = cuda_emulation.load()
    images = torch.rand(samples, 3, size, size)
    leaf = images.clone().requires_grad_()
    grad = torch.rand(4 * samples, 3, size, size)

    def ours():
        emulator.rotate4_forward(images)
        emulator.rotate4_backward(grad)

    print(f"{HEADER}\n{RULER}")
    eager = lambda: torch.cat([leaf.rot90(k, (2, 3)) for k in range(4)]).backward(grad)  # noqa: E731
    count_case(f"forward and backward, {samples}×3×{size}×{size}, float32", 10 * images.nbytes, ours, eager)


OPS = (info_nce, augment, similarity_lse, sigmoid_loss, diffusion, group_norm_silu, rotate4)


if __name__ == "__main__":
    functions = {op.__name__: op for op in OPS}
    if sys.argv[1:2] == [] or sys.argv[1] not in functions:
        sys.exit(__doc__)
    functions[sys.argv[1]](*map(int, sys.argv[2:]))
