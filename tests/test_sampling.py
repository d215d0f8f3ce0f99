"""Samplers against distributions whose best denoiser is known, and the promise that a seed is an image."""

import math

import pytest
import torch

from sslfast.evaluation import sampling
from sslfast.unet import UNet

CONFIG = {
    "timesteps": 1000,
    "schedule": "squaredcos_cap_v2",
    "prediction": "v_prediction",
    "channels": 1,
    "size": 4,
    "patch": 1,
}
MEAN, DEVIATION = 0.1, 0.25


def gaussian_denoiser(config: dict, mean: torch.Tensor, covariance: torch.Tensor) -> sampling.Model:
    """What a perfectly trained network answers if images are normal with this mean (D,) and covariance (D, D).

    E[x0 | x_t] = mean + √ᾱ·C (ᾱ·C + (1 - ᾱ)·I)⁻¹ (x_t - √ᾱ·mean)
    """
    alphas = sampling.make_scheduler(config, "ddpm", 10).alphas_cumprod.double()

    def model(x: torch.Tensor, t: int) -> torch.Tensor:
        a, flat = alphas[t], x.flatten(1).double()
        inner = a * covariance + (1 - a) * torch.eye(len(mean), dtype=torch.float64)
        x0 = mean + (flat - a.sqrt() * mean) @ torch.linalg.inv(inner) @ covariance * a.sqrt()
        noise = (flat - a.sqrt() * x0) / (1 - a).sqrt()
        answers = {"epsilon": noise, "sample": x0, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0}
        return answers[config["prediction"]].reshape(x.shape).float()

    return model


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "steps", "eta"),
    [("ddim", 200, 0.0), ("ddim", 300, 1.0), ("ddpm", 300, 0.0), ("dpm-solver++", 100, 0.0)],
)
def test_samplers_draw_from_the_distribution_that_the_network_knows(sampler, steps, eta, prediction):
    config = CONFIG | {"prediction": prediction, "schedule": "linear"}
    pixels = 16
    mean = torch.full((pixels,), MEAN, dtype=torch.float64)
    model = gaussian_denoiser(config, mean, DEVIATION**2 * torch.eye(pixels, dtype=torch.float64))
    scheduler = sampling.make_scheduler(config, sampler, steps)
    seeds = torch.arange(2000)
    x = sampling.generate(model, scheduler, scheduler.initial_noise(seeds, (1, 4, 4)), seeds, eta)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(DEVIATION, rel=0.06)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("dpm-solver++", 0.0)])
def test_an_image_depends_on_its_seed_only(sampler, eta):
    torch.manual_seed(0)
    unet = UNet(1, widths=(32, 32), blocks=1).eval()
    for parameter in unet.parameters():  # many begin as 0
        torch.nn.init.normal_(parameter, std=0.05)
    model = sampling.predictor(unet, "float32")
    scheduler = sampling.make_scheduler(CONFIG | {"size": 8}, sampler, 6)

    def draw(seeds: torch.Tensor) -> torch.Tensor:
        return sampling.generate(model, scheduler, scheduler.initial_noise(seeds, (1, 8, 8)), seeds, eta)

    seeds = torch.tensor([5, 3, 11, 2**40, 8])
    together = draw(seeds)
    for order in ([2], [3, 0], [4, 3, 2, 1, 0]):
        torch.testing.assert_close(draw(seeds[order]), together[order], rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1, "other seeds must give other images"


def correlated(rho: float) -> torch.Tensor:
    """Covariance of images of two pixels side by side."""
    return DEVIATION**2 * torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_inpainting_keeps_what_is_known_and_follows_it(sampler):
    """Of two correlated pixels the first is known; the second must be distributed as it is, given the first."""
    rho = 0.9
    model = gaussian_denoiser(CONFIG, torch.zeros(2, dtype=torch.float64), correlated(rho))
    scheduler = sampling.make_scheduler(CONFIG, sampler, 50)
    known = DEVIATION * torch.randn(1500, 1, 1, 2, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[[True, False]]])
    x = sampling.inpaint(model, scheduler, known, mask, torch.arange(1500), visits=10)
    first, second = x.flatten(1).T
    assert torch.equal(first, known[:, 0, 0, 0])
    slope = (first * second).mean() / first.square().mean()
    assert slope.item() == pytest.approx(rho, abs=0.12)
    rest = (second - rho * first).std().item()
    assert rest == pytest.approx(DEVIATION * math.sqrt(1 - rho**2), rel=0.35)

    once = sampling.inpaint(model, scheduler, known, mask, torch.arange(1500), visits=1)
    assert ((once - x)[:, 0, 0, 1]).abs().mean() > 0.01


def test_inpainting_depends_on_the_seed_only():
    model = gaussian_denoiser(CONFIG, torch.zeros(2, dtype=torch.float64), correlated(0.5))
    scheduler = sampling.make_scheduler(CONFIG, "ddpm", 10)
    known, mask = torch.zeros(3, 1, 1, 2), torch.tensor([[[True, False]]])
    together = sampling.inpaint(model, scheduler, known, mask, torch.tensor([4, 9, 2]), visits=2)
    alone = sampling.inpaint(model, scheduler, known[:1], mask, torch.tensor([9]), visits=2)
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-6)


def test_guidance_is_its_formula():
    torch.manual_seed(0)
    unet = UNet(1, widths=(32,), blocks=1, classes=4).eval()
    for parameter in unet.parameters():  # many begin as 0
        torch.nn.init.normal_(parameter, std=0.1)
    x, classes, nothing = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3])
    with torch.no_grad():
        wanted, free = unet(x, 7, classes), unet(x, 7, nothing)
        assert (wanted - free).abs().max() > 1e-3
        for scale in (0.0, 1.0, 3.5):
            found = sampling.predictor(unet, "float32", classes, scale)(x, 7)
            torch.testing.assert_close(found, free + scale * (wanted - free), rtol=1e-4, atol=1e-5)


def test_the_way_between_two_noises_keeps_their_length():
    first, second = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    way = sampling.between(first, second, 9)
    torch.testing.assert_close(way[0], first, rtol=0, atol=1e-5)
    torch.testing.assert_close(way[-1], second, rtol=0, atol=1e-5)
    lengths = way.flatten(1).norm(dim=1)
    assert lengths.min() > 0.99 * min(lengths[0], lengths[-1])
    gaps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
    assert gaps.max() < 1.1 * gaps.min()
    assert torch.equal(sampling.between(first, first, 3), first.expand(3, -1, -1, -1))


def test_the_callback_sees_every_step():
    model = gaussian_denoiser(CONFIG, torch.zeros(2, dtype=torch.float64), correlated(0.5))
    seen = []
    seeds = torch.arange(2)
    for sampler in ("ddim", "dpm-solver++"):
        scheduler = sampling.make_scheduler(CONFIG, sampler, 7)
        noise = scheduler.initial_noise(seeds, (1, 1, 2))
        end = sampling.generate(model, scheduler, noise, callback=lambda done, x: seen.append((done, x)))
        assert [done for done, _ in seen] == list(range(1, 8))
        assert torch.equal(seen[-1][1], end)
        seen.clear()
