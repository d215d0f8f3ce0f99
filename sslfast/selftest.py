"""The command `sslfast selftest`: every kernel that this machine can run, against the reference, in under a minute."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sslfast import _C, reference
from sslfast.info import info
from sslfast.ops import augment, diffusion, group_norm_silu, info_nce, rotate4, sigmoid_loss, similarity_lse

REPORT = """
{wrong} computed something wrong on this machine. Please report it to the project, with the table above and this:

{info}

Until it is mended, SSLFAST_CPU_CAPABILITY=NAME chooses an instruction set whose column is right."""


class Comparison(NamedTuple):
    """What a kernel made, what is right, and the relative error (norm of the difference over norm) that is allowed."""

    name: str
    actual: Tensor
    expected: Tensor
    allowed: float


class Result(NamedTuple):
    """The worst relative error of an op's comparisons of one name; infinite where they have NaN or another shape."""

    op: str
    name: str
    backend: str
    error: float
    allowed: float


# One function for each op: it runs the op's kernels on tensors of a device and yields comparisons. A new op adds one,
# and its entry in CHECKS.


def check_info_nce(device: str) -> Iterator[Comparison]:
    for dtype, allowed in ((torch.float32, 3e-5), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)):
        for batch, dim, temperature in ((3, 5, 0.5), (70, 40, 0.07), (200, 128, 0.2), (20, 300, 0.5)):
            z1, z2 = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(batch)).to(dtype)
            z2 = z1 + z2
            ours = [z.to(device).requires_grad_() for z in (z1, z2)]
            true = [z.double().requires_grad_() for z in (z1, z2)]
            loss = info_nce.nt_xent(ours[0], ours[1], temperature)
            expected = reference.info_nce.nt_xent(true[0], true[1], temperature)
            yield Comparison(f"loss, {_name(dtype)}", loss, expected, 2e-6)
            grads = torch.autograd.grad(loss * batch, ours), torch.autograd.grad(expected * batch, true)
            for grad, expected_grad in zip(*grads, strict=True):
                yield Comparison(f"gradient, {_name(dtype)}", grad, expected_grad, allowed)


def check_augment(device: str) -> Iterator[Comparison]:
    everything = augment.AugmentDistribution(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_p=0.7)
    for channels, source, size in ((3, (40, 50), 32), (1, (28, 28), 28), (3, (150, 170), 130)):
        generator = torch.Generator().manual_seed(size)
        images = torch.randint(0, 256, (3, channels, *source), dtype=torch.uint8, generator=generator)
        params = augment.draw_params([everything] * 2, augment.image_sizes(images), seed=0)
        for interpolation in ("bilinear", "bicubic"):
            expected = reference.augment.augment(
                images, params, (size, size), interpolation, kernel_size=9, dtype=torch.float64
            )
            for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)):
                views = augment.augment(
                    images.to(device), params, size, interpolation=interpolation, kernel_size=9, dtype=dtype
                )
                yield Comparison(_name(dtype), views, expected, allowed)


def check_similarity_lse(device: str) -> Iterator[Comparison]:
    for dtype, allowed in ((torch.float32, 3e-5), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)):
        for rows, keys, dim, columns in (
            (5, 3, 7, False),
            (70, 150, 40, True),
            (130, 64, 128, False),
            (90, 0, 300, False),
        ):
            generator = torch.Generator().manual_seed(rows)
            q, k = (torch.randn(n, dim, generator=generator).to(dtype) for n in (rows, keys))
            exclude = torch.randint(-1, keys or rows, (rows, 2), generator=generator)
            bias = torch.randn(keys or rows, generator=generator)
            vectors = [q, k] if keys else [q]
            ours = [x.to(device).requires_grad_() for x in vectors]
            true = [x.double().requires_grad_() for x in vectors]
            left_out, weights = exclude.to(device), bias.to(device)
            both: tuple[Tensor, ...]
            if columns:
                both = similarity_lse(ours[0], ours[1], 0.3, exclude=left_out, key_bias=weights, columns=True)
            else:
                others = ours[1] if keys else None
                both = (similarity_lse(ours[0], others, 0.3, exclude=left_out, key_bias=weights),)
            true_inputs = true[0], true[1] if keys else None, 0.3, exclude, bias.double(), columns
            right = [t for t in reference.similarity_lse.similarity_lse(*true_inputs) if t is not None]
            pairs = list(zip(both, right, strict=True))
            for actual, expected in pairs:
                yield Comparison(f"value, {_name(dtype)}", actual, expected, 2e-6)
            sums = [sum(t.sum() for t in side) for side in zip(*pairs, strict=True)]
            grads = torch.autograd.grad(sums[0], ours), torch.autograd.grad(sums[1], true)
            for grad, expected_grad in zip(*grads, strict=True):
                yield Comparison(f"gradient, {_name(dtype)}", grad, expected_grad, allowed)


def check_sigmoid_loss(device: str) -> Iterator[Comparison]:
    for dtype, allowed in ((torch.float32, 3e-5), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)):
        for rows, keys, dim in ((5, 3, 7), (70, 150, 40), (130, 64, 128)):
            generator = torch.Generator().manual_seed(rows)
            q, k = (torch.randn(n, dim, generator=generator).to(dtype) for n in (rows, keys))
            ours = [x.to(device).requires_grad_() for x in (q, k)]
            true = [x.double().requires_grad_() for x in (q, k)]
            loss = sigmoid_loss(ours[0], ours[1], 0.3, -2.0, first_key=1)
            expected = reference.sigmoid_loss.sigmoid_loss(true[0], true[1], 0.3, -2.0, first_key=1)
            yield Comparison(f"loss, {_name(dtype)}", loss, expected, 2e-6)
            grads = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, true)
            for grad, expected_grad in zip(*grads, strict=True):
                yield Comparison(f"gradient, {_name(dtype)}", grad, expected_grad, allowed)


def check_rotate4(device: str) -> Iterator[Comparison]:
    for dtype in (torch.uint8, torch.float32, torch.bfloat16):
        for shape in ((3, 3, 32, 32), (2, 1, 37, 37)):
            images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(shape[2])).to(dtype)
            for actual, expected in zip(rotate4(images.to(device)), reference.rotate4.rotate4(images), strict=True):
                yield Comparison(_name(dtype), actual, expected, 0.0)
            if dtype.is_floating_point:
                ours, true = images.to(device).requires_grad_(), images.double().requires_grad_()
                weights = (
                    torch.arange(4 * images.numel()).remainder(61).view(-1, *shape[1:]).to(dtype)
                )  # sums are exact
                grad = torch.autograd.grad(rotate4(ours)[0], ours, weights.to(device))[0]
                expected_grad = torch.autograd.grad(reference.rotate4.rotate4(true)[0], true, weights.double())[0]
                yield Comparison(f"gradient, {_name(dtype)}", grad, expected_grad, 0.0)


def check_diffusion(device: str) -> Iterator[Comparison]:
    coefficients = torch.tensor([1.0, -0.6, 1.3, 0.4, 0.5, -0.3, 0.2, 0.0, 0.7, -6.0, -3.0, 17.0])
    alphas = torch.linspace(0.999, 0.01, 50)
    for dtype, allowed in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)):
        for shape in ((3, 3, 32, 32), (5, 1, 27, 29)):
            model, x, old = torch.randn(3, *shape, generator=torch.Generator().manual_seed(shape[2])).to(dtype)
            seeds, t = torch.arange(shape[0]), torch.arange(shape[0]) * 9
            noise = reference.diffusion.diffusion_noise(seeds, model[0].numel(), step=17).view(shape)
            drawn = diffusion.diffusion_noise(seeds.to(device), shape[1:], step=17, dtype=dtype)
            yield Comparison(f"noise, {_name(dtype)}", drawn, noise, allowed)
            ours = [a.to(device) for a in (model, x, coefficients, old, seeds, t, alphas)]
            step = diffusion.diffusion_step(*ours[:3], clip=1.5, history=[ours[3]], seeds=ours[4])
            wide = (model.double(), x.double(), coefficients, 1.5, None, [old.double()], noise, "fixed")
            for actual, expected in zip(step, reference.diffusion.diffusion_step(*wide), strict=True):
                yield Comparison(f"step, {_name(dtype)}", actual, expected, allowed)
            noisy = diffusion.q_sample(ours[1], *ours[5:], seeds=ours[4], step=17, prediction_type="v_prediction")
            right = reference.diffusion.q_sample(x.double(), t, alphas, noise, "v_prediction")
            for actual, expected in zip(noisy, right, strict=True):
                yield Comparison(f"q_sample, {_name(dtype)}", actual, expected, allowed)
            leaves = ours[0].requires_grad_(), model.double().requires_grad_()
            loss = diffusion.diffusion_loss(leaves[0], ours[1], *ours[5:], snr_gamma=5.0)
            expected = reference.diffusion.diffusion_loss(leaves[1], x.double(), t, alphas, "epsilon", 5.0, "mean")
            yield Comparison(f"loss, {_name(dtype)}", loss, expected, 2e-6)
            grad, right = (torch.autograd.grad(1000 * a, b)[0] for a, b in zip((loss, expected), leaves, strict=True))
            yield Comparison(f"gradient, {_name(dtype)}", grad, right, allowed)


def check_group_norm_silu(device: str) -> Iterator[Comparison]:
    for dtype, allowed in ((torch.float32, 5e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)):
        for shape, groups in (((3, 12, 9, 7), 4), ((2, 64, 16, 16), 32)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)
                ours, true = x.to(device, memory_format=memory_format).requires_grad_(), x.double().requires_grad_()
                out = group_norm_silu(ours, groups)
                expected = reference.group_norm_silu.group_norm_silu(true, groups)
                yield Comparison(_name(dtype), out, expected, allowed)
                weights = torch.linspace(-1, 1, x.numel()).reshape(shape).to(dtype)
                grad = torch.autograd.grad(out, ours, weights.to(device))[0]
                expected_grad = torch.autograd.grad(expected, true, weights.double())[0]
                yield Comparison(f"gradient, {_name(dtype)}", grad, expected_grad, allowed)


CHECKS: dict[str, Callable[[str], Iterator[Comparison]]] = {
    "info_nce": check_info_nce,
    "augment": check_augment,
    "diffusion": check_diffusion,
    "group_norm_silu": check_group_norm_silu,
    "rotate4": check_rotate4,
    "sigmoid_loss": check_sigmoid_loss,
    "similarity_lse": check_similarity_lse,
}


def main(args: list[str] | None = None) -> None:
    """The command `sslfast selftest`, which has no options; its exit status is 1 if a kernel is wrong."""
    if args:
        raise SystemExit(f"usage: sslfast selftest (it has no options; got {' '.join(args)})")
    start = time.perf_counter()
    results = selftest()
    print(table(results))
    wrong = dict.fromkeys(f"{r.op} on {r.backend}" for r in results if not r.error <= r.allowed)
    if wrong:
        print(REPORT.format(wrong=", ".join(wrong), info=info()))
        raise SystemExit(1)
    print(f"\nAll kernels of this machine are right ({time.perf_counter() - start:.0f} s).")


def selftest() -> list[Result]:
    """Run every check with each instruction set of this machine, and on CUDA if there is a device."""
    before = _C.cpu_capability()
    results = []
    for backend in _backends():
        try:
            if backend != "cuda":
                _C.set_cpu_capability(backend)
            for op, check in CHECKS.items():
                results += _results(op, check, backend)
        finally:
            _C.set_cpu_capability(before)
    return results


def table(results: list[Result]) -> str:
    """A row for each op and name, a column for each backend."""
    lines = ["Relative error against the reference in float64:", ""]
    lines.append(f"{'':36}{'allowed':>9}" + "".join(f"{backend:>15}" for backend in _backends()))
    cells = {(r.op, r.name, r.backend): r for r in results}
    for op, name, allowed in dict.fromkeys((r.op, r.name, r.allowed) for r in results):
        row = [cells.get((op, name, backend)) for backend in _backends()]
        texts = [f"{r.error:.1e}{'' if r.error <= allowed else ' WRONG'}" if r else "" for r in row]
        lines.append(f"{op + ' ' + name:36}{allowed:>9.0e}" + "".join(f"{text:>15}" for text in texts))
    return "\n".join(lines)


def _backends() -> list[str]:
    cuda = _C.build_info()["cuda"] and torch.cuda.is_available()
    return [*_C.available_cpu_capabilities(), *(["cuda"] if cuda else [])]


def _results(op: str, check: Callable[[str], Iterator[Comparison]], backend: str) -> list[Result]:
    worst: dict[str, Result] = {}
    try:
        for name, actual, expected, allowed in check("cuda" if backend == "cuda" else "cpu"):
            error = _relative_error(actual.detach().cpu().double(), expected.detach().double())
            if name not in worst or error > worst[name].error:
                worst[name] = Result(op, name, backend, error, allowed)
    except Exception as error:  # whatever it is, it belongs into the table, and the other ops get their turn
        worst["raised an error"] = Result(op, "raised an error", backend, float("inf"), 0.0)
        print(f"{op} on {backend}: {type(error).__name__}: {error}\n")
    return list(worst.values())


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    return ((actual - expected).norm() / expected.norm()).item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
