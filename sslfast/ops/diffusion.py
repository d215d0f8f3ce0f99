"""Fused steps of diffusion models. The formulas: csrc/ops/diffusion.h, or sslfast/reference/diffusion.py."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sslfast import _C, reference
from sslfast.ops._check import (
    ROW_DTYPES,
    check_choice,
    check_dense,
    check_floating,
    check_integer,
    check_like,
    check_number,
    dtype_of,
    name_of,
)
from sslfast.ops._route import DEVICES, KERNEL, REFERENCE, has_kernel, refuse_other_derivatives, route

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed", "learned", "learned_range")
REDUCTIONS = ("mean", "sum", "none")
FIELDS = reference.diffusion.Coefficients._fields
MAX_NORMALS = 2**26  # of a sample: kMaxNormals


def diffusion_noise(
    seeds: Tensor, shape: Sequence[int], *, step: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers that depend on nothing but the seed of a sample, the step and the place in the sample.

    The same numbers to the bit on every instruction set, number of threads and GPU, in whatever batch; the batch that
    `diffusion_step` and `q_sample` draw inside themselves for the same seeds and step.

    Args:
        seeds: (samples,) int64, one a sample, on the device where the noise shall be.
        shape: of one sample, such as (3, 32, 32); at most 2²⁶ elements.
        step: 0 … 2³² - 1.
        dtype: float32, bfloat16, float16 or float64. The numbers are float32, rounded.

    Returns:
        (samples, *shape).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_dense("seeds", seeds)
    _check_seeds(seeds, seeds.shape[0] if seeds.dim() else 0, None)
    check_integer("step", step, 0, 2**32 - 1)
    if not isinstance(dtype, torch.dtype) or dtype not in ROW_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of sizes, got {type(shape).__name__}")
    shape = list(shape)
    for n in shape:
        check_integer("shape", n, 0, MAX_NORMALS)
    if math.prod(shape) > MAX_NORMALS:
        raise ValueError(f"shape: expected at most {MAX_NORMALS} elements, got {tuple(shape)}")
    if seeds.device.type in DEVICES and route(seeds) == KERNEL:
        return _C.diffusion_noise(seeds, shape, step, dtype)
    return torch.ops.sslfast.diffusion_noise(seeds, shape, step, name_of(dtype))


def diffusion_step(
    model_output: Tensor,
    sample: Tensor,
    coefficients: Tensor,
    *,
    clip: float | None = None,
    threshold: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    variance: str = "fixed",
) -> tuple[Tensor, Tensor]:
    """One step of a diffusion sampler in one pass: x0 from the model's output, clipping, mean and noise.

    What makes it a step of DDPM, DDIM or DPM-Solver++ are its coefficients, which `sslfast.schedulers` computes:

        x0 = predict_scale · (predict_sample · sample + predict_model · model_output), clipped
        previous = x0' · x0 + sample' · sample + model' · model_output + Σ history' · history + noise' · noise

    Args:
        model_output: the shape of `sample`; twice its channels where the variance is learned.
        sample: (samples, channels, …), float32, bfloat16, float16 or float64. Arithmetic is float32 (float64).
        coefficients: (12,), or (samples, 12) for a step of its own for each sample, float32: `FIELDS`.
        clip: x0 is clamped to [-clip, clip]; None does not clip.
        threshold: (samples,) of the dtype of sample or float32: x0 is clamped to [-threshold, threshold] and divided
            by it, as dynamic thresholding does.
        history: x0 of the last step, or of the last two, newest first.
        noise: the shape of `sample`: normal numbers to use.
        seeds: (samples,) int64: the noise of `diffusion_noise` with step = noise_step of the coefficients.
        variance: "fixed", or "learned" or "learned_range" if the model's output holds it in its second half.

    Returns:
        The sample of the previous step, and x0; both contiguous. Where a gradient is wanted, or a derivative of another
        kind, plain PyTorch runs: it has all of them.

    Raises:
        TypeError, ValueError: naming the argument.

    Sources: Ho et al., arXiv 2006.11239; Song et al., arXiv 2010.02502; Lu et al., arXiv 2211.01095; Nichol and
    Dhariwal, arXiv 2102.09672 (learned variances); Saharia et al., arXiv 2205.11487 (dynamic thresholding).
    """
    history = list(history)
    _check_diffusion_step(model_output, sample, coefficients, clip, threshold, history, noise, seeds, variance)
    args = (model_output, sample, coefficients, clip, threshold, history, noise, seeds, variance)
    return _run_diffusion_step(*args)


def q_sample(
    x0: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    *,
    prediction_type: str = "epsilon",
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noise, the noised sample and what the model shall predict, in one pass.

    Args:
        x0: (samples, …), float32, bfloat16, float16 or float64.
        timesteps: (samples,) int64, each an index of `alphas_cumprod` (not checked on a GPU, where it gives NaN).
        alphas_cumprod: (steps,) float32, on the device of x0.
        prediction_type: the target is the noise for "epsilon", x0 for "sample", the velocity for "v_prediction".
        noise: the shape of x0: normal numbers to use.
        seeds: (samples,) int64: the noise of `diffusion_noise(seeds, shape, step=step)`. Without noise and seeds, seeds
            are drawn from torch's generator.
        step: 0 … 2³² - 1, such as the step of the training.

    Returns:
        √ᾱ·x0 + √(1 - ᾱ)·noise and the target, both of x0's shape and dtype and contiguous.

    Raises:
        TypeError, ValueError: naming the argument.

    Sources: Ho et al., arXiv 2006.11239; Salimans and Ho, arXiv 2202.00512 (velocity).
    """
    _check_q_sample(x0, timesteps, alphas_cumprod, prediction_type, noise, seeds, step)
    if noise is None and seeds is None:
        seeds = torch.randint(-(2**63), 2**63 - 1, (x0.shape[0],), device=x0.device)
    noisy, target = _run_q_sample(x0, timesteps, alphas_cumprod, prediction_type, noise, seeds, step)
    return noisy, (x0 if prediction_type == "sample" else target)


def diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    *,
    prediction_type: str = "epsilon",
    snr_gamma: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The mean squared error of each sample, weighted by min-SNR-γ.

    With snr = ᾱ / (1 - ᾱ) the weight is min(snr, γ) / snr for "epsilon", min(snr, γ) / (snr + 1) for "v_prediction"
    and min(snr, γ) for "sample"; 1 without `snr_gamma`.

    Args:
        prediction, target: (samples, …), float32, bfloat16, float16 or float64.
        timesteps: (samples,) int64, each an index of `alphas_cumprod`.
        alphas_cumprod: (steps,) float32.
        snr_gamma: γ, a positive number; 5 in the paper.
        reduction: "mean" over the samples, "sum", or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or (samples,) for "none".

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556.
    """
    _check_diffusion_loss(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma, reduction)
    losses = _run_diffusion_loss(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


# ------------------------------------------------------------------------------------------------------ registration


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _run_diffusion_step(model, sample, coefficients, clip, threshold, history, noise, seeds, variance):
    if threshold is not None:
        threshold = threshold.float()
    tensors = model, sample, coefficients, threshold, *history, noise, seeds
    way = route(*tensors)
    # Gradients are rare in sampling, and take less time than those of the network.
    if way == REFERENCE or not has_kernel(sample) or _needs_grad(*tensors):
        return _reference_step(model, sample, coefficients, clip, threshold, history, noise, seeds, variance)
    if way == KERNEL:  # without the dispatcher, which would take longer than the step of a small batch
        return _C.diffusion_step(model, sample, coefficients, clip, threshold, history, noise, seeds, variance)
    return torch.ops.sslfast.diffusion_step(
        model, sample, coefficients, clip, threshold, history, noise, seeds, variance
    )


def _reference_step(model, sample, coefficients, clip, threshold, history, noise, seeds, variance):
    if seeds is not None:
        noise = _step_noise(sample.detach(), coefficients, seeds)
    return reference.diffusion.diffusion_step(model, sample, coefficients, clip, threshold, history, noise, variance)


def _noise_like(sample: Tensor, seeds: Tensor, step: int) -> Tensor:
    """The noise of a kernel, where the reference runs; drawn on the CPU if the device has no kernel."""
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    if seeds.device.type == "meta":
        return sample.new_empty(sample.shape, dtype=dtype)
    return diffusion_noise(seeds, sample.shape[1:], step=step, dtype=dtype)


def _run_q_sample(x0, timesteps, alphas_cumprod, prediction_type, noise, seeds, step):
    tensors = x0, timesteps, alphas_cumprod, noise, seeds
    way = route(*tensors)
    if way == REFERENCE or not has_kernel(x0) or _needs_grad(*tensors):  # as in diffusion_step
        noise = _noise_like(x0.detach(), seeds, step) if noise is None else noise
        return reference.diffusion.q_sample(x0, timesteps, alphas_cumprod, noise, prediction_type)
    if way == KERNEL:
        return _C.diffusion_q_sample(x0, timesteps, alphas_cumprod, prediction_type, noise, seeds, step)
    return torch.ops.sslfast.diffusion_q_sample(x0, timesteps, alphas_cumprod, prediction_type, noise, seeds, step)


def _run_diffusion_loss(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma):
    args = (prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma)
    way = route(*args)
    if way == REFERENCE or not has_kernel(prediction):
        return reference.diffusion.diffusion_loss(*args, "none")
    if way == KERNEL:
        return _Loss.apply(*args)
    return torch.ops.sslfast.diffusion_loss_forward(*args)


@torch.library.custom_op("sslfast::diffusion_noise", mutates_args=())
def _noise(seeds: Tensor, shape: list[int], step: int, dtype: str) -> Tensor:
    where = seeds if seeds.device.type in DEVICES else seeds.cpu()
    return _C.diffusion_noise(where, shape, step, dtype_of(dtype)).to(seeds.device)


@_noise.register_fake
def _(seeds, shape, step, dtype):
    return seeds.new_empty((seeds.shape[0], *shape), dtype=dtype_of(dtype))


# An op of its own, because tracing can not read the steps of the rows.
@torch.library.custom_op("sslfast::diffusion_step_noise", mutates_args=())
def _step_noise(sample: Tensor, coefficients: Tensor, seeds: Tensor) -> Tensor:
    """The noise that the kernel adds to each row of the sample."""
    steps = coefficients.reshape(-1, len(FIELDS))[:, FIELDS.index("noise_step")].long().expand(len(seeds))
    rows = [_noise_like(sample[:1], seed[None], step) for seed, step in zip(seeds, steps.tolist(), strict=True)]
    return torch.cat(rows) if rows else _noise_like(sample, seeds, 0)


@_step_noise.register_fake
def _(sample, coefficients, seeds):
    return sample.new_empty(sample.shape, dtype=torch.promote_types(sample.dtype, torch.float32))


@torch.library.custom_op("sslfast::diffusion_step", mutates_args=(), device_types=DEVICES)
def _step(
    model_output: Tensor,
    sample: Tensor,
    coefficients: Tensor,
    clip: float | None,
    threshold: Tensor | None,
    history: list[Tensor],
    noise: Tensor | None,
    seeds: Tensor | None,
    variance: str,
) -> tuple[Tensor, Tensor]:
    return _C.diffusion_step(model_output, sample, coefficients, clip, threshold, history, noise, seeds, variance)


def _empty_contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@_step.register_fake
def _(model_output, sample, coefficients, clip, threshold, history, noise, seeds, variance):
    return _empty_contiguous(sample), _empty_contiguous(sample)


@torch.library.custom_op("sslfast::diffusion_q_sample", mutates_args=(), device_types=DEVICES)
def _q_sample(
    x0: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    return _C.diffusion_q_sample(x0, timesteps, alphas_cumprod, prediction_type, noise, seeds, step)


@_q_sample.register_fake
def _(x0, timesteps, alphas_cumprod, prediction_type, noise, seeds, step):
    return _empty_contiguous(x0), x0.new_empty(0) if prediction_type == "sample" else _empty_contiguous(x0)


@torch.library.custom_op("sslfast::diffusion_loss_forward", mutates_args=(), device_types=DEVICES)
def _loss_forward(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    snr_gamma: float | None,
) -> Tensor:
    return _C.diffusion_loss_forward(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma)


@_loss_forward.register_fake
def _(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma):
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    return prediction.new_empty(prediction.shape[:1], dtype=dtype)


@torch.library.custom_op("sslfast::diffusion_loss_backward", mutates_args=(), device_types=DEVICES)
def _loss_backward(
    grad_loss: Tensor,
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    snr_gamma: float | None,
) -> tuple[Tensor, Tensor]:
    return _C.diffusion_loss_backward(
        grad_loss, prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma
    )


@_loss_backward.register_fake
def _(grad_loss, prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma):
    return _empty_contiguous(prediction), _empty_contiguous(target)


def _loss_context(ctx, inputs, output) -> None:
    *tensors, ctx.prediction_type, ctx.snr_gamma = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_loss(ctx, grad_loss: Tensor):
    grads = torch.ops.sslfast.diffusion_loss_backward(grad_loss, *ctx.saved_tensors, ctx.prediction_type, ctx.snr_gamma)
    needed = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[:2], strict=True))
    return *needed, None, None, None, None


_loss_forward.register_autograd(_backward_of_loss, setup_context=_loss_context)
refuse_other_derivatives(_noise, _step_noise, _step, _q_sample, _loss_forward, _loss_backward)


class _Loss(torch.autograd.Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.prediction_type, ctx.snr_gamma = args
        ctx.save_for_backward(*tensors)
        return _C.diffusion_loss_forward(*args)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("diffusion_loss has no second derivative: call backward without create_graph=True")
        plain = route(grad_loss) == KERNEL
        run = _C.diffusion_loss_backward if plain else torch.ops.sslfast.diffusion_loss_backward
        grads = run(grad_loss, *ctx.saved_tensors, ctx.prediction_type, ctx.snr_gamma)
        needed = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[:2], strict=True))
        return *needed, None, None, None, None


# ------------------------------------------------------------------------------------------------------ arguments


def _check_seeds(seeds: Tensor, samples: int, device: torch.device | None) -> None:
    check_dense("seeds", seeds)
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds: expected int64, got {seeds.dtype}")
    if seeds.shape != (samples,):
        raise ValueError(f"seeds: expected one seed for each sample, ({samples},), got {tuple(seeds.shape)}")
    if device is not None and seeds.device != device:
        raise ValueError(f"seeds: expected device {device}, got {seeds.device}")


def _check_samples(name: str, t: Tensor) -> None:
    check_floating(**{name: t})
    if t.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, the samples, got a scalar")


def _check_noise(name: str, like: Tensor, noise: Tensor | None, seeds: Tensor | None) -> None:
    if noise is not None and seeds is not None:
        raise ValueError("seeds: expected noise or seeds, got both")
    if noise is not None:
        check_like("noise", noise, name, like)
    if seeds is not None:
        _check_seeds(seeds, like.shape[0], like.device)
        if math.prod(like.shape[1:]) > MAX_NORMALS:
            raise ValueError(f"seeds: expected samples of at most {MAX_NORMALS} elements, got {tuple(like.shape)}")


def _check_side(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    check_dense(name, t)
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device}, got {t.device}")


def _check_timesteps(timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor, prediction_type: str) -> None:
    _check_side("timesteps", timesteps, torch.int64, (like.shape[0],), like.device)
    steps = alphas_cumprod.shape if isinstance(alphas_cumprod, Tensor) and alphas_cumprod.dim() == 1 else (0,)
    _check_side("alphas_cumprod", alphas_cumprod, torch.float32, tuple(steps), like.device)
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)


def _check_diffusion_step(model, sample, coefficients, clip, threshold, history, noise, seeds, variance) -> None:
    _check_samples("sample", sample)
    check_choice("variance", variance, VARIANCES)
    shape = tuple(sample.shape)
    if variance != "fixed":
        if sample.dim() < 2:
            raise ValueError(f"sample: expected (samples, channels, …) for a learned variance, got {shape}")
        shape = (shape[0], 2 * shape[1], *shape[2:])
    check_like("model_output", model, "sample", sample, shape)
    rows = (sample.shape[0],) if isinstance(coefficients, Tensor) and coefficients.dim() == 2 else ()
    _check_side("coefficients", coefficients, torch.float32, (*rows, len(FIELDS)), sample.device)
    if clip is not None:
        check_number("clip", clip, positive=True)
    if clip is not None and threshold is not None:
        raise ValueError("threshold: expected clip or threshold, got both")
    if threshold is not None:
        check_floating(threshold=threshold)
        _check_side("threshold", threshold, threshold.dtype, (sample.shape[0],), sample.device)
    if len(history) > 2:
        raise ValueError(f"history: expected at most two tensors, got {len(history)}")
    for old in history:
        check_like("history", old, "sample", sample)
    _check_noise("sample", sample, noise, seeds)


def _check_q_sample(x0, timesteps, alphas_cumprod, prediction_type, noise, seeds, step) -> None:
    _check_samples("x0", x0)
    _check_timesteps(timesteps, alphas_cumprod, x0, prediction_type)
    _check_noise("x0", x0, noise, seeds)
    check_integer("step", step, 0, 2**32 - 1)


def _check_diffusion_loss(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma, reduction) -> None:
    _check_samples("prediction", prediction)
    check_like("target", target, "prediction", prediction)
    _check_timesteps(timesteps, alphas_cumprod, prediction, prediction_type)
    if snr_gamma is not None:
        check_number("snr_gamma", snr_gamma, positive=True)
    check_choice("reduction", reduction, REDUCTIONS)
