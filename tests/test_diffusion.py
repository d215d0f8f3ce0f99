"""Steps, noising, loss and noise of diffusion models against float64, diffusers and numpy, on every instruction set."""

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sslfast import _C, reference
from sslfast.ops import diffusion_loss, diffusion_noise, diffusion_step, q_sample
from sslfast.ops.diffusion import FIELDS

CAPABILITIES = ["default", "avx2", "avx512"]  # the others run the kernels of avx512
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (1, 3, 32, 32), (2, 64), (3, 1, 7, 9), (5, 1000), (2, 1025), (2, 2, 100, 101), (0, 3, 4), (3, 2, 0)]
# Relative to the norm, where nothing but the result is rounded.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}
ALPHAS = diffusers.DDPMScheduler().alphas_cumprod


def tensors(shape, dtype, count, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def coefficients(**fields) -> torch.Tensor:
    """Coefficients of no sampler in particular, each of which counts."""
    values = dict(zip(FIELDS, (0.9, -0.6, 1.3, 0.4, 0.5, -0.3, 0.2, -0.1, 0.7, -6.0, -3.0, 17.0), strict=True))
    return torch.tensor([{**values, **fields}[name] for name in FIELDS])


def assert_near(actual, expected, tolerance, terms=()):
    """terms: what the result is a sum of. Where few elements cancel, roundings are as large as theirs."""
    assert actual.shape == expected.shape
    if terms and actual.numel() < 16:  # one rounding to the dtype is not averaged with others
        tolerance = max(tolerance, torch.finfo(actual.dtype).eps)
    error = (actual.double() - expected.double()).norm()
    size = max(x.double().norm().item() for x in (expected, *terms))
    assert error <= tolerance * max(size, 1e-3), (error, size)


# ------------------------------------------------------------------------------------------------------ normal numbers


def normals_of(seed: int, step: int, count: int) -> np.ndarray:
    """What csrc/common/normal.h says, in float64, from words that test_philox.py has checked."""
    out = np.empty(64 * -(-count // 64))
    for index in range(len(out) // 4):
        counter = [0, 0, step, (2 << 24) | index]
        w = np.array(_C.philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32]), dtype=np.uint64)
        u = ((w[::2] // 2).astype(np.float32) + np.float32(0.5)).astype(np.float64) / 2**31
        radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * w[1::2].astype(np.float64) / 2**32
        group, lane = divmod(index, 16)
        for pair in range(2):
            out[64 * group + 32 * pair + lane] = radius[pair] * np.cos(angle[pair])
            out[64 * group + 32 * pair + 16 + lane] = radius[pair] * np.sin(angle[pair])
    return out[:count]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 2500])
def test_noise_is_what_the_header_says(backend, count):
    seeds = torch.tensor([0, 123456789123456789, -5])
    noise = diffusion_noise(seeds, (count,), step=7)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        expected = normals_of(seed % 2**64, 7, count)
        np.testing.assert_allclose(row.numpy(), expected, atol=2e-6, rtol=0)


SIX = torch.arange(-3, 3) * 987654321987
NOISE_OF_SIX = diffusion_noise(SIX, (3, 33, 17), step=2**32 - 1)  # by the best instruction set


def test_noise_has_the_same_bits_everywhere(backend):
    assert torch.equal(diffusion_noise(SIX, (3, 33, 17), step=2**32 - 1), NOISE_OF_SIX)


def test_noise_is_standard_normal():
    noise = diffusion_noise(torch.arange(64), (3, 64, 64)).double()
    count = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((noise**power).mean() - moment) < 4 * math.sqrt(variance / count)
    share = torch.tensor([(noise.abs() > z).double().mean() for z in (1, 2, 3, 4)])
    expected = torch.tensor([math.erfc(z / math.sqrt(2)) for z in (1, 2, 3, 4)])
    assert ((share - expected).abs() < 5 * (expected / count).sqrt()).all()
    # Neighbours, samples and steps have nothing to do with each other.
    others = [noise.roll(1, -1), noise.roll(16, -1), noise.roll(1, 0)]
    others.append(diffusion_noise(torch.arange(64), (3, 64, 64), step=1).double())
    for other in others:
        assert abs((noise * other).mean()) < 5 / math.sqrt(count)


def test_noise_of_a_sample_depends_on_its_seed_alone(backend):
    seeds = torch.tensor([5, 6, 7, 5])
    together = diffusion_noise(seeds, (3, 19, 23), step=3)
    assert torch.equal(together[0], together[3])
    for seed, row in zip(seeds, together, strict=True):
        assert torch.equal(diffusion_noise(seed[None], (3, 19, 23), step=3)[0], row)
    assert torch.equal(diffusion_noise(seeds, (3 * 19 * 23 + 5,), step=3)[:, :-5], together.flatten(1))
    assert not torch.equal(diffusion_noise(seeds, (3, 19, 23), step=4), together)


@pytest.mark.parametrize("count", [99, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_in_other_types_is_rounded(backend, dtype, count):
    seeds = torch.arange(3)
    expected = diffusion_noise(seeds, (count,)).to(dtype)
    assert torch.equal(diffusion_noise(seeds, (count,), dtype=dtype), expected)


# ------------------------------------------------------------------------------------------------------ step


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_step_equals_the_reference(backend, dtype, shape):
    model, sample, noise, old, older = tensors(shape, dtype, 5)
    threshold = torch.linspace(0.5, 2.0, shape[0])
    rows = coefficients().repeat(shape[0], 1) * torch.linspace(0.5, 1.5, shape[0])[:, None]
    for args in (
        {"clip": 0.7},
        {"noise": noise},
        {"threshold": threshold, "history": [old]},
        {"coefficients": rows, "noise": noise, "history": [old, older]},
        {"seeds": torch.arange(shape[0])},
    ):
        options = {"coefficients": coefficients(), "clip": None, "threshold": None, "history": []} | args
        seeds = options.pop("seeds", None)
        actual = diffusion_step(model, sample, **options, seeds=seeds)
        if seeds is not None:
            options["noise"] = diffusion_noise(seeds, shape[1:], step=17)
        wide = {name: _wide(value) for name, value in ({"noise": None} | options).items()}
        expected = reference.diffusion.diffusion_step(model.double(), sample.double(), **wide, variance="fixed")
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert_near(a, e, TOLERANCE[dtype])


def _wide(value):
    if isinstance(value, list):
        return [v.double() for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_learned_variance(backend, dtype, variance):
    sample, noise = tensors((3, 4, 13, 11), dtype, 2)
    model = tensors((3, 8, 13, 11), dtype, 1)[0]
    if variance == "learned":
        model[:, 4:] = model[:, 4:].abs()
    for normal, seeds in ((noise, None), (diffusion_noise(torch.arange(3), (4, 13, 11), step=17), torch.arange(3))):
        noise = normal if seeds is None else None
        actual = diffusion_step(model, sample, coefficients(), noise=noise, seeds=seeds, variance=variance)
        expected = reference.diffusion.diffusion_step(
            model.double(), sample.double(), coefficients(), None, None, [], normal.double(), variance
        )
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, 3 * TOLERANCE[dtype])


def test_step_without_noise_draws_none(backend):
    model, sample = tensors((2, 3, 8, 8), torch.float32, 2)
    still = coefficients(noise=0.0)
    expected = diffusion_step(model, sample, still)
    assert same_bits(diffusion_step(model, sample, still, seeds=torch.arange(2)), expected)
    assert diffusion_step(model, sample, still, noise=torch.full_like(sample, math.nan))[0].isfinite().all()


@pytest.mark.parametrize("shape", [(64, 1, 28, 28), (5, 3, 100, 90)])
def test_an_image_does_not_depend_on_its_batch(backend, shape):
    model, sample = tensors(shape, torch.float32, 2)
    seeds = torch.arange(shape[0]) * 11
    together = diffusion_step(model, sample, coefficients(), clip=1.0, seeds=seeds)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))
    shuffled = diffusion_step(model[order], sample[order], coefficients(), clip=1.0, seeds=seeds[order])
    assert same_bits(shuffled, [t[order] for t in together])
    for i in range(0, shape[0], 3):
        alone = diffusion_step(model[i : i + 1], sample[i : i + 1], coefficients(), clip=1.0, seeds=seeds[i : i + 1])
        assert same_bits(alone, [t[i : i + 1] for t in together])


def test_memory_format_makes_no_difference():
    model, sample = tensors((4, 3, 16, 16), torch.float32, 2)
    seeds = torch.arange(4)
    expected = diffusion_step(model, sample, coefficients(), seeds=seeds)
    last = [t.to(memory_format=torch.channels_last) for t in (model, sample)]
    assert same_bits(diffusion_step(*last, coefficients(), seeds=seeds), expected)


def same_bits(actual, expected) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def run_everything():
    model, sample = tensors((5, 3, 64, 65), torch.float32, 2)
    seeds, t = torch.arange(5), torch.tensor([0, 1, 500, 998, 999])
    model.requires_grad_()
    loss = diffusion_loss(model, sample, t, ALPHAS, snr_gamma=5.0)
    return [
        *diffusion_step(model.detach(), sample, coefficients(), clip=1.0, seeds=seeds),
        *q_sample(sample, t, ALPHAS, seeds=seeds, prediction_type="v_prediction"),
        loss.detach(),
        *torch.autograd.grad(loss, model),
        diffusion_noise(seeds, (3, 64, 65)),
    ]


def test_same_bits_on_any_number_of_threads(cpu_capability):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run_everything())
    torch.set_num_threads(before)
    for result in results[1:]:
        assert same_bits(result, results[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_where_they_are(backend, dtype, bad):
    model, sample = tensors((2, 3, 40), dtype, 2)
    sample[0, 1, 7] = bad
    previous, x0 = diffusion_step(model, sample, coefficients(), clip=1.0, seeds=torch.arange(2))
    assert not previous[0, 1, 7].isfinite()
    assert x0[0, 1, 7].isnan() == math.isnan(bad)
    previous[0, 1, 7] = 0
    assert previous.isfinite().all()
    noisy, target = q_sample(sample, torch.tensor([10, 20]), ALPHAS, prediction_type="v_prediction")
    assert not noisy[0, 1, 7].isfinite()
    assert not target[0, 1, 7].isfinite()
    assert diffusion_loss(model, sample, torch.tensor([10, 20]), ALPHAS, reduction="none")[1].isfinite()
    assert not diffusion_loss(model, sample, torch.tensor([10, 20]), ALPHAS).isfinite()


# ------------------------------------------------------------------------------------------------------ q_sample, loss


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_q_sample_equals_the_reference(backend, dtype, shape, prediction_type):
    x0, noise = tensors(shape, dtype, 2)
    t = torch.linspace(0, 999, shape[0]).long()
    seeds = torch.arange(shape[0])
    drawn = diffusion_noise(seeds, shape[1:], step=3).double()
    for options, normal in (({"noise": noise}, noise.double()), ({"seeds": seeds, "step": 3}, drawn)):
        actual = q_sample(x0, t, ALPHAS, prediction_type=prediction_type, **options)
        expected = reference.diffusion.q_sample(x0.double(), t, ALPHAS, normal, prediction_type)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert_near(a, e, TOLERANCE[dtype])


def test_q_sample_equals_diffusers():
    scheduler = diffusers.DDPMScheduler()
    x0, noise = tensors((16, 3, 8, 8), torch.float32, 2)
    t = torch.linspace(0, 999, 16).long()
    noisy, velocity = q_sample(x0, t, ALPHAS, noise=noise, prediction_type="v_prediction")
    torch.testing.assert_close(noisy, scheduler.add_noise(x0, noise, t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(velocity, scheduler.get_velocity(x0, noise, t), rtol=1e-6, atol=1e-6)


def test_q_sample_draws_seeds_from_torch():
    x0 = torch.zeros(4, 3, 8, 8)
    t = torch.full((4,), 999)
    torch.manual_seed(1)
    first, second = q_sample(x0, t, ALPHAS)[1], q_sample(x0, t, ALPHAS)[1]
    torch.manual_seed(1)
    assert torch.equal(q_sample(x0, t, ALPHAS)[1], first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 17, 19), (2, 2500)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_loss_equals_the_reference(backend, dtype, shape, snr_gamma, prediction_type):
    t = torch.linspace(0, 999, shape[0]).long()
    options = {"prediction_type": prediction_type, "snr_gamma": snr_gamma}
    for reduction in ("mean", "sum", "none"):
        ours = [x.requires_grad_() for x in tensors(shape, dtype, 2)]
        wide = [x.detach().double().requires_grad_() for x in ours]
        actual = diffusion_loss(*ours, t, ALPHAS, **options, reduction=reduction)
        expected = reference.diffusion.diffusion_loss(*wide, t, ALPHAS, *options.values(), reduction)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(actual, expected, 1e-6)
        grad = 1000 * torch.linspace(-1, 2, actual.numel()).reshape(actual.shape)  # so that float16 has digits
        actual.backward(grad.to(actual.dtype))
        expected.backward(grad.double())
        for a, e in zip(ours, wide, strict=True):
            assert_near(a.grad, e.grad, max(TOLERANCE[dtype], 1e-6))


def test_min_snr_weights_are_those_of_the_paper():
    snr = (ALPHAS / (1 - ALPHAS)).double()
    t = torch.tensor([0, 200, 500, 999])
    prediction, target = torch.ones(4, 8), torch.zeros(4, 8)
    for prediction_type, expected in {
        "epsilon": snr.clamp(max=5) / snr,
        "v_prediction": snr.clamp(max=5) / (snr + 1),
        "sample": snr.clamp(max=5),
    }.items():
        options = {"snr_gamma": 5.0, "reduction": "none", "prediction_type": prediction_type}
        torch.testing.assert_close(diffusion_loss(prediction, target, t, ALPHAS, **options), expected[t].float())


def test_zero_terminal_snr_has_a_weight():
    alphas = torch.tensor([0.9, 0.0])
    loss = diffusion_loss(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([1]), alphas, snr_gamma=5.0)
    assert loss.item() == 1.0


# ------------------------------------------------------------------------------------------------------ torch itself


def test_gradcheck(cpu_capability):
    x, model, noise, old = (t.requires_grad_() for t in tensors((3, 2, 5), torch.float64, 4))
    c, t = coefficients(), torch.tensor([3, 500, 900])
    assert torch.autograd.gradcheck(
        lambda *a: diffusion_step(a[0], a[1], c, noise=a[2], history=[a[3]]), (model, x, noise, old)
    )
    assert torch.autograd.gradcheck(lambda *a: diffusion_step(*a, c, clip=0.8, seeds=torch.arange(3)), (model, x))
    wide = tensors((3, 4, 5), torch.float64, 1)[0].abs().requires_grad_()
    for variance in ("learned", "learned_range"):
        assert torch.autograd.gradcheck(
            lambda *a, v=variance: diffusion_step(*a, c, seeds=torch.arange(3), variance=v), (wide, x)
        )
    for prediction_type in ("epsilon", "v_prediction"):
        assert torch.autograd.gradcheck(
            lambda a, b, p=prediction_type: q_sample(a, t, ALPHAS, noise=b, prediction_type=p), (x, noise)
        )
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda a, b, r=reduction: diffusion_loss(a, b, t, ALPHAS, snr_gamma=5.0, reduction=r), (x, model)
        )


def test_second_derivative_of_the_loss_is_refused():
    x, y = (t.requires_grad_() for t in tensors((2, 3), torch.float32, 2))
    with pytest.raises(RuntimeError, match="diffusion_loss has no second derivative"):
        torch.autograd.grad(diffusion_loss(x, y, torch.tensor([1, 2]), ALPHAS), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    model, x, noise, old = tensors((2, 3, 5), dtype, 4)
    t, seeds, c = torch.tensor([3, 900]), torch.arange(2), coefficients()
    check, ops = torch.library.opcheck, torch.ops.sslfast
    check(ops.diffusion_step, (model, x, c, 1.0, None, [old], noise, None, "fixed"))
    check(ops.diffusion_step, (model, x, c, None, torch.ones(2), [], None, seeds, "fixed"))
    check(ops.diffusion_q_sample, (x, t, ALPHAS, "v_prediction", noise, None, 0))
    check(ops.diffusion_q_sample, (x, t, ALPHAS, "sample", None, seeds, 3))
    check(ops.diffusion_loss_backward, (torch.ones(2), x, model, t, ALPHAS, "epsilon", 5.0))
    check(ops.diffusion_loss_forward, (x.requires_grad_(), model.requires_grad_(), t, ALPHAS, "epsilon", 5.0))
    check(ops.diffusion_noise, (seeds, [3, 5], 1, str(dtype).removeprefix("torch.")))


def test_more_elements_than_fit_an_int(emulator):
    """Of the blocks at the ends of the grids: the last 1,536 elements of the last sample; of the loss all of it."""
    samples, elements, part = 2200, 1_000_000, 1536
    model, x = (emulator.device_tensor([samples, elements], torch.bfloat16) for _ in range(2))  # zeros: they are large
    assert x.numel() > 2**31
    last = [t[-1:] for t in (model, x)]
    for t, values in zip(last, tensors((1, elements), torch.bfloat16, 2), strict=True):
        t.copy_(values)
    seeds, t = torch.arange(samples), torch.arange(samples) % 1000
    small_noise = emulator.diffusion_noise(seeds[-1:], [elements], 0, torch.float32).double()
    emulator.run_corners(set())

    def check(actual, expected):
        assert_near(actual[-1, -part:], expected[-1, -part:], TOLERANCE[torch.bfloat16])

    check(emulator.diffusion_noise(seeds, [elements], 0, torch.bfloat16), small_noise)
    c = coefficients(noise_step=0)
    step = emulator.diffusion_step(model, x, c, 1.0, None, [], None, seeds, "fixed")
    wide = [a.double() for a in last]
    for actual, right in zip(
        step, reference.diffusion.diffusion_step(*wide, c, 1.0, None, [], small_noise, "fixed"), strict=True
    ):
        check(actual, right)
    noisy = emulator.diffusion_q_sample(x, t, ALPHAS, "epsilon", None, seeds, 0)
    check(noisy[0], reference.diffusion.q_sample(wide[1], t[-1:], ALPHAS, small_noise, "epsilon")[0])
    loss = emulator.diffusion_loss_forward(model, x, t, ALPHAS, "epsilon", None)
    assert_near(loss[-1], (wide[0] - wide[1]).square().mean(), 1e-5)
    grad, _ = emulator.diffusion_loss_backward(torch.ones(samples), model, x, t, ALPHAS, "epsilon", None)
    check(grad, 2 * (wide[0] - wide[1]) / elements)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def step(model, x, t, seeds):
        noisy, target = q_sample(x * 2, t, ALPHAS, seeds=seeds)
        loss = diffusion_loss(model, target, t, ALPHAS, snr_gamma=5.0)
        return diffusion_step(model, noisy, coefficients(), clip=1.0, seeds=seeds)[0] + 1, loss

    def outputs(function, samples):
        model, x = (t.requires_grad_() for t in tensors((samples, 3, 8), torch.float32, 2))
        out, loss = function(model, x, torch.arange(samples), torch.arange(samples))
        return out, loss, *torch.autograd.grad(out.sum() + loss, (model, x))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for samples in (4, 6):
        for a, e in zip(outputs(compiled, samples), outputs(step, samples), strict=True):
            torch.testing.assert_close(a, e)


def test_the_short_way_gives_the_bits_of_the_custom_op():
    model, x = tensors((3, 2, 70), torch.float32, 2)
    seeds = torch.arange(3)
    op = torch.ops.sslfast.diffusion_step(model, x, coefficients(), 1.0, None, [], None, seeds, "fixed")
    assert same_bits(diffusion_step(model, x, coefficients(), clip=1.0, seeds=seeds), op)


def test_fake_tensors_have_the_real_metadata():
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    real = diffusion_step(x, x, coefficients())
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        outputs = diffusion_step(fake, fake, mode.from_tensor(coefficients()))
    for f, r in zip(outputs, real, strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


def test_other_devices_run_the_reference():
    x = torch.empty(4, 3, 8, 8, device="meta")
    t, alphas = torch.zeros(4, dtype=torch.int64, device="meta"), ALPHAS.to("meta")
    assert diffusion_step(x, x, coefficients().to("meta"), clip=1.0)[0].shape == x.shape
    assert q_sample(x, t, alphas, noise=x)[0].device.type == "meta"
    assert q_sample(x, t, alphas)[1].shape == x.shape
    assert diffusion_loss(x, x, t, alphas).shape == ()


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 6),
    elements=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    t=st.integers(0, 999),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_size(samples, elements, dtype, t, seed):
    x, model = tensors((samples, elements), dtype, 2, seed % 1000)
    seeds = torch.tensor([seed] * samples)
    drawn = diffusion_noise(seeds, (elements,), step=17, dtype=torch.float64)
    expected = reference.diffusion.diffusion_step(
        model.double(), x.double(), coefficients(), 1.0, None, [], drawn, "fixed"
    )
    for a, e in zip(diffusion_step(model, x, coefficients(), clip=1.0, seeds=seeds), expected, strict=True):
        assert_near(a, e, TOLERANCE[dtype], (x, model, drawn))
    steps = torch.full((samples,), t)
    noisy, target = q_sample(x, steps, ALPHAS, seeds=seeds, step=17)
    expected = reference.diffusion.q_sample(x.double(), steps, ALPHAS, drawn, "epsilon")[0]
    assert_near(noisy, expected, TOLERANCE[dtype], (x, drawn))
    assert torch.equal(target[0], target[-1])


# ------------------------------------------------------------------------------------------------------ bad arguments

X, C, T, SEEDS = torch.randn(2, 3, 4), coefficients(), torch.tensor([1, 2]), torch.arange(2)
BAD_STEPS = {
    "list": (([[1.0]], X, C), {}, TypeError, "model_output: expected a tensor"),
    "scalar": ((X, X[0, 0, 0], C), {}, ValueError, "sample: expected at least one dimension"),
    "model shape": ((X[:, :2], X, C), {}, ValueError, r"model_output: expected shape \(2, 3, 4\), got \(2, 2, 4\)"),
    "learned shape": ((X, X, C), {"variance": "learned"}, ValueError, r"model_output: expected shape \(2, 6, 4\)"),
    "dtype": ((X.double(), X, C), {}, TypeError, "model_output: expected the dtype of sample, torch.float32"),
    "integers": ((X, X.long(), C), {}, TypeError, "sample: expected float32"),
    "float8": ((X, X.to(torch.float8_e5m2), C), {}, TypeError, "sample: expected float32"),
    "device": ((X.to("meta"), X, C), {}, ValueError, "model_output: expected the device of sample, cpu, got meta"),
    "coefficients": ((X, X, C[:5]), {}, ValueError, r"coefficients: expected shape \(12,\), got \(5,\)"),
    "coefficients rows": ((X, X, C.expand(3, 12)), {}, ValueError, r"coefficients: expected shape \(2, 12\)"),
    "coefficients dtype": ((X, X, C.double()), {}, TypeError, "coefficients: expected torch.float32"),
    "clip": ((X, X, C), {"clip": 0.0}, ValueError, "clip: expected a positive number, got 0.0"),
    "nan clip": ((X, X, C), {"clip": math.nan}, ValueError, "clip: expected a positive number, got nan"),
    "both limits": ((X, X, C), {"clip": 1.0, "threshold": torch.ones(2)}, ValueError, "threshold: .* got both"),
    "threshold": ((X, X, C), {"threshold": torch.ones(3)}, ValueError, r"threshold: expected shape \(2,\)"),
    "history": ((X, X, C), {"history": [X, X, X]}, ValueError, "history: expected at most two"),
    "history shape": ((X, X, C), {"history": [X[:1]]}, ValueError, "history: expected the shape of sample"),
    "noise": ((X, X, C), {"noise": X[:1]}, ValueError, "noise: expected the shape of sample"),
    "both noises": ((X, X, C), {"noise": X, "seeds": SEEDS}, ValueError, "seeds: expected noise or seeds, got both"),
    "seeds": ((X, X, C), {"seeds": SEEDS[:1]}, ValueError, r"seeds: expected one seed for each sample, \(2,\)"),
    "seed list": ((X, X, C), {"seeds": [1, 2]}, TypeError, "seeds: expected a tensor, got list"),
    "seed dtype": ((X, X, C), {"seeds": SEEDS.int()}, TypeError, "seeds: expected int64, got torch.int32"),
    "variance": ((X, X, C), {"variance": "big"}, ValueError, "variance: expected one of .*'big'"),
}
BAD_Q_SAMPLES = {
    "timesteps": ((X, T[:1], ALPHAS), {}, ValueError, r"timesteps: expected shape \(2,\), got \(1,\)"),
    "timestep dtype": ((X, T.float(), ALPHAS), {}, TypeError, "timesteps: expected torch.int64"),
    "range": ((X, T + 999, ALPHAS), {}, ValueError, "timesteps: expected 0 to 999, got 1000"),
    "negative": ((X, -T, ALPHAS), {}, ValueError, "timesteps: expected 0 to 999, got -1"),
    "alphas": ((X, T, ALPHAS.double()), {}, TypeError, "alphas_cumprod: expected torch.float32"),
    "alphas shape": ((X, T, ALPHAS[None]), {}, ValueError, "alphas_cumprod: expected shape"),
    "prediction": ((X, T, ALPHAS), {"prediction_type": "v"}, ValueError, "prediction_type: expected one of .*'v'"),
    "step": ((X, T, ALPHAS), {"step": -1}, ValueError, "step: expected 0 to"),
    "step type": ((X, T, ALPHAS), {"step": 1.0}, TypeError, "step: expected an int"),
}
BAD_LOSSES = {
    "target": ((X, X[:1], T, ALPHAS), {}, ValueError, "target: expected the shape of prediction"),
    "target dtype": ((X, X.double(), T, ALPHAS), {}, TypeError, "target: expected the dtype of prediction"),
    "gamma": ((X, X, T, ALPHAS), {"snr_gamma": 0.0}, ValueError, "snr_gamma: expected a positive number, got 0.0"),
    "reduction": ((X, X, T, ALPHAS), {"reduction": "max"}, ValueError, "reduction: expected one of .*'max'"),
}
BAD_NOISES = {
    "seeds": (([1, 2], (3,)), {}, TypeError, "seeds: expected a tensor"),
    "2-D seeds": ((SEEDS[None], (3,)), {}, ValueError, "seeds: expected one seed for each sample"),
    "size": ((SEEDS, (2**13, 2**14)), {}, ValueError, "shape: expected at most 67108864 elements"),
    "step": ((SEEDS, (3,)), {"step": 2**32}, ValueError, "step: expected 0 to"),
    "dtype": ((SEEDS, (3,)), {"dtype": torch.int32}, TypeError, "dtype: expected float32"),
}
BAD_CALLS = [
    pytest.param(function, *call, id=f"{function.__name__} {name}")
    for function, calls in (
        (diffusion_step, BAD_STEPS),
        (q_sample, BAD_Q_SAMPLES),
        (diffusion_loss, BAD_LOSSES),
        (diffusion_noise, BAD_NOISES),
    )
    for name, call in calls.items()
]


@pytest.mark.parametrize(("function", "args", "kwargs", "error", "message"), BAD_CALLS)
def test_bad_arguments(function, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        function(*args, **kwargs)
