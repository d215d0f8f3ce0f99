"""Steps of samplers, noising and the weighted loss: ours and diffusers' (the loss: plain PyTorch)."""

from collections.abc import Callable

import diffusers
import pytest
import torch
import torch.nn.functional as F
from measure import copy_ceiling

from sslfast import ops, schedulers

SAMPLES = 64


def sampler(library, name: str, size: int, **options) -> tuple[Callable[[], object], int]:
    """A step of a scheduler in the middle of sampling, and the bytes that it must move."""
    scheduler = getattr(library, name)()
    scheduler.set_timesteps(50)
    x, out = torch.randn(2, SAMPLES, 3, size, size)
    t = scheduler.timesteps[25]
    return torch.no_grad()(lambda: scheduler.step(out, t, x, **options)), 4 * x.nbytes


def dpm_solver(library, size: int, **options) -> tuple[Callable[[], object], int]:
    """A step of second order: sampling begins anew each time, and its first step has no history."""
    scheduler = library.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(50)
    x, out = torch.randn(2, SAMPLES, 3, size, size)
    scheduler.set_begin_index(0)
    scheduler.step(out, scheduler.timesteps[0], x)

    @torch.no_grad()
    def step():
        scheduler._step_index = 25
        return scheduler.step(out, scheduler.timesteps[25], x, **options)

    return step, 5 * x.nbytes


def noising(library, size: int) -> tuple[Callable[[], object], int]:
    x = torch.randn(SAMPLES, 3, size, size)
    t = torch.randint(0, 1000, (SAMPLES,))
    scheduler = diffusers.DDPMScheduler()
    if library is diffusers:

        def run():
            noise = torch.randn_like(x)
            return scheduler.add_noise(x, noise, t), noise

        return run, 3 * x.nbytes
    return (lambda: ops.q_sample(x, t, scheduler.alphas_cumprod)), 3 * x.nbytes


def loss(library, size: int) -> tuple[Callable[[], object], int]:
    prediction, target = torch.randn(2, SAMPLES, 3, size, size)
    prediction.requires_grad_()
    t = torch.randint(0, 1000, (SAMPLES,))
    alphas = diffusers.DDPMScheduler().alphas_cumprod

    def theirs():  # as in diffusers' training examples
        snr = alphas[t] / (1 - alphas[t])
        weights = torch.stack([snr, 5 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
        losses = F.mse_loss(prediction, target, reduction="none")
        return (losses.mean(dim=list(range(1, losses.dim()))) * weights).mean()

    def ours():
        return ops.diffusion_loss(prediction, target, t, alphas, snr_gamma=5.0)

    function = theirs if library is diffusers else ours
    return (lambda: torch.autograd.grad(function(), prediction)), 5 * prediction.nbytes


SEEDS = torch.arange(SAMPLES)
CASES = {
    "DDPM step, seeds=": lambda lib, size: sampler(lib, "DDPMScheduler", size, **seeds_of(lib)),
    "DDPM step, torch's numbers": lambda lib, size: sampler(lib, "DDPMScheduler", size),
    "DDIM step": lambda lib, size: sampler(lib, "DDIMScheduler", size),
    "DDIM step, η = 1, seeds=": lambda lib, size: sampler(lib, "DDIMScheduler", size, eta=1.0, **seeds_of(lib)),
    "DDIM step, η = 1, torch's numbers": lambda lib, size: sampler(lib, "DDIMScheduler", size, eta=1.0),
    "DPM-Solver++ step": dpm_solver,
    "q_sample": noising,
    "min-SNR loss": loss,
}


def seeds_of(library) -> dict:
    return {"seeds": SEEDS} if library is schedulers else {}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("case", CASES)
def test_diffusion(race, quick, case, size):
    if quick and size != 32:
        pytest.skip("not in the quick selection")
    ours, moved = CASES[case](schedulers, size)
    theirs, _ = CASES[case](diffusers, size)
    race(
        {"case": case, "images": f"{SAMPLES}×3×{size}×{size}"},
        ours,
        {"diffusers": theirs},
        floor=(moved, copy_ceiling()),
        headline=True,
    )
