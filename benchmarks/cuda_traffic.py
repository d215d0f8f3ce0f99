"""Bytes and operations of the CUDA kernels as the emulator counts them, beside the least and beside eager PyTorch.

    python benchmarks/cuda_traffic.py info_nce [batch] [dim]
    python benchmarks/cuda_traffic.py augment [images] [size of the view]
    python benchmarks/cuda_traffic.py others

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


def count_case(name: str, least: int, ours: Callable[[], object], eager: Callable[[], object]) -> None:
    """A line of `others`; least: bytes if each input is read and each result written once."""
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


def others() -> None:
    """The ops beside info_nce and augment, at sizes that the emulator takes seconds for."""
    e = cuda_emulation.load()
    print("\n| case | kernels | read, MiB | written, MiB | least, MiB | ratio | GFLOP | eager, MiB | operations |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    scale, bias = torch.tensor([10.0]), torch.tensor([-10.0])
    for rows, keys, dim in ((256, 4096, 128), (512, 512, 512)):
        q, k = (F.normalize(torch.randn(n, dim)).bfloat16() for n in (rows, keys))
        size = 2 * dim
        lse, columns, _ = e.similarity_lse_forward(q, k, scale, None, None, True, False)
        grad, grad_columns = torch.ones_like(lse), torch.ones_like(columns)
        backward = (q, k, scale, lse, grad, None, None, columns, grad_columns)
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]

        def logits(leaves=leaves):
            return leaves[0] @ leaves[1].T * 10.0

        def clip(leaves=leaves, logits=logits):
            x = logits()
            (x.logsumexp(1).sum() + x.logsumexp(0).sum()).backward()

        def moco(q=q, k=k, leaves=leaves):
            (leaves[0] @ k.T * 10.0).logsumexp(1).sum().backward()

        def siglip(logits=logits):
            F.softplus(logits() - 10.0).sum().backward()

        shape = f"{rows} × {keys} × {dim}"
        count_case(
            f"similarity_lse, fixed keys, {shape}",
            (rows + keys) * size + rows * (8 + 4 * dim),
            partial(e.similarity_lse_forward, q, k, scale, None, None, False, True),
            moco,
        )
        both = lambda q=q, k=k, b=backward: (  # noqa: E731
            e.similarity_lse_forward(q, k, scale, None, None, True, False),
            e.similarity_lse_backward(*b),
        )
        count_case(f"similarity_lse, both ways, {shape}", (rows + keys) * (3 * size + 24), both, clip)
        count_case(
            f"sigmoid_loss, {shape}",
            (rows + keys) * (size + 4 * dim),
            partial(e.sigmoid_loss_forward, q, k, scale, bias, 0, True),
            siglip,
        )

    x, out, noise = torch.randn(3, 16, 3, 32, 32)
    seeds, t, alphas = torch.arange(16), torch.arange(16), torch.linspace(0.999, 0.01, 50)
    coefficients = torch.tensor([1.0, -0.6, 1.3, 0.4, 0.5, 0.0, 0.0, 0.0, 0.7, 0.0, 0.0, 17.0])
    n = x.nbytes

    def eager_step():
        x0 = ((x - 0.6 * out) * 1.3).clamp(-1, 1)
        return 0.4 * x0 + 0.5 * x + 0.7 * torch.randn_like(x)

    def eager_noising():
        a = alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        return a.sqrt() * x + (1 - a).sqrt() * noise, noise

    leaf = out.clone().requires_grad_()

    def eager_loss(prediction=leaf):
        F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3)).mean().backward()

    step = partial(e.diffusion_step, out, x, coefficients, 1.0, None, [], None, seeds, "fixed")
    count_case("diffusion_step, 16×3×32×32", 4 * n, step, eager_step)
    count_case(
        "diffusion_q_sample",
        3 * n,
        partial(e.diffusion_q_sample, x, t, alphas, "epsilon", None, seeds, 0),
        eager_noising,
    )
    losses = lambda: (  # noqa: E731
        e.diffusion_loss_forward(out, noise, t, alphas, "epsilon", None),
        e.diffusion_loss_backward(torch.ones(16), out, noise, t, alphas, "epsilon", None),
    )
    count_case("diffusion_loss and its gradient", 5 * n, losses, eager_loss)

    for layout in (torch.contiguous_format, torch.channels_last):
        x, grad = (v.contiguous(memory_format=layout) for v in torch.randn(2, 4, 64, 16, 16))
        weight, bias = torch.randn(2, 64)
        leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
        out, mean, rstd = e.group_norm_silu_forward(x, 32, weight, bias, 1e-5)
        both = lambda x=x, grad=grad, w=weight, b=bias, mean=mean, rstd=rstd: (  # noqa: E731
            e.group_norm_silu_forward(x, 32, w, b, 1e-5),
            e.group_norm_silu_backward(grad, x, 32, w, b, mean, rstd),
        )
        eager = lambda leaves=leaves, grad=grad: F.silu(F.group_norm(leaves[0], 32, *leaves[1:])).backward(grad)  # noqa: E731
        count_case(f"group_norm_silu and its gradients, 4×64×16×16, {layout}", 5 * x.nbytes, both, eager)

    images = torch.rand(16, 3, 32, 32)
    turned, _ = e.rotate4_forward(images)
    leaf = images.clone().requires_grad_()
    both = lambda: (e.rotate4_forward(images), e.rotate4_backward(turned))  # noqa: E731
    eager = lambda: torch.cat([leaf.rot90(k, (2, 3)) for k in range(4)]).backward(turned)  # noqa: E731
    count_case("rotate4 and its gradient, 16×3×32×32", 10 * images.nbytes, both, eager)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["info_nce"], ["augment"], ["others"]):
        sys.exit(__doc__)
    {"info_nce": info_nce, "augment": augment, "others": others}[sys.argv[1]](*map(int, sys.argv[2:]))
