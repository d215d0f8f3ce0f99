"""Random calls with right and wrong arguments: no crash, no wrong value, and errors that are sentences.

Each test makes calls for a few seconds. More of them, as many as you like, also under AddressSanitizer:

    SSLFAST_FUZZ=20000 make test ARGS=tests/test_fuzz.py
    SSLFAST_FUZZ=20000 make test-sanitize        (or make test-sanitize ARGS="-k fuzz")
"""

import contextlib
import math
import os
import random
import time
import warnings

import pytest
import torch
from torch import Tensor

from sslfast import _C, ops, reference
from sslfast.ops.augment import AugmentDistribution, augment, draw_params

CALLS = int(os.environ.get("SSLFAST_FUZZ", "0"))
SECONDS = 4.0  # for each test, where no number of calls is asked for
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Rng(random.Random):
    """Random arguments."""

    def size(self) -> int:
        return self.choice([1, 1, 2, 3, 5, 8, 17, 33, 70])

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        t = torch.randn(shape, generator=torch.Generator().manual_seed(self.getrandbits(31)))
        if self.random() < 0.2 and len(shape) > 1:  # not contiguous
            t = t.transpose(0, -1).contiguous().transpose(0, -1)
        return t.to(dtype)

    def ints(self, count: int, high: int) -> Tensor:
        return torch.tensor([self.randrange(high) for _ in range(count)], dtype=torch.int64)

    def odd(self, value):
        """Something else in the place of an argument."""
        if isinstance(value, Tensor) and self.random() < 0.7:
            with contextlib.suppress(Exception):  # what is odd already may not become odd in another way
                return self.choice(ODD_TENSORS)(value)
        if isinstance(value, (list, tuple)) and value and self.random() < 0.6:
            items = list(value)
            place = self.randrange(len(items))
            return self.choice(
                [items[:place], items + items[:1], [*items[:place], self.odd(items[place]), *items[place + 1 :]]]
            )
        return self.choice(ODD_VALUES)


def _filled(value: float):
    return lambda t: torch.full(t.shape, value, dtype=torch.float64).to(t.dtype)


ODD_TENSORS = [
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.long(),
    lambda t: t.to(torch.uint8),
    lambda t: t.bool(),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t[None],
    lambda t: t[:0] if t.dim() else t[None][:0],
    lambda t: t[..., :-1] if t.dim() else t,
    lambda t: t.flatten(),
    lambda t: torch._neg_view(t) if not t.dtype.is_complex and t.dtype != torch.bool else t,
    lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda t: torch.nested.nested_tensor([t, t]),
    lambda t: t.expand(2, *t.shape),
    lambda t: t.as_strided(t.shape, [0] * t.dim()),
    _filled(math.nan),
    _filled(math.inf),
    _filled(-1e30),
    _filled(0.0),
    _filled(2**62),
]
ODD_VALUES = [
    *(None, True, 0, -1, 1, 2, 3, 7, 255, 1001, 2**31, 2**32 + 2, 2**63 - 1, -(2**63), 2**63, 2**64, 2**70, 10**30),
    *(
        0.0,
        -1.0,
        1e-42,
        1e-310,
        1e30,
        1e39,
        math.inf,
        -math.inf,
        math.nan,
        "",
        "mean",
        "sum",
        "none",
        "bicubic",
        "fixed",
    ),
    *("learned", "epsilon", "v_prediction", "nonsense", [], [1.0], (), (1, 2), {}, object(), torch.float32, torch.int8),
    *(torch.zeros(()), torch.ones(1), torch.zeros(0), torch.tensor(3), torch.arange(5), torch.randn(3, 4)),
]


def rows(r: Rng, dtype):
    return r.tensor(r.size(), r.choice([1, 3, 8, 40]), dtype=dtype)


def of_nt_xent(r: Rng):
    z = rows(r, r.choice(FLOATS))
    temperature = r.choice([0.1, 0.5, 2, torch.tensor(0.5)])
    return (
        ops.nt_xent,
        reference.info_nce.nt_xent,
        [z, r.tensor(*z.shape, dtype=z.dtype), temperature, r.choice(["mean", "sum", "none"])],
    )


def _similarity_lse(queries, keys, scale, exclude, key_bias, columns):
    return ops.similarity_lse(queries, keys, scale, exclude=exclude, key_bias=key_bias, columns=columns)


def of_similarity_lse(r: Rng):
    q = rows(r, r.choice(FLOATS))
    keys = r.choice([None, r.tensor(r.size(), q.shape[1], dtype=q.dtype)])
    count = len(q if keys is None else keys)
    exclude = r.choice([None, r.ints(len(q), count)])
    bias = r.choice([None, r.tensor(count)])
    return (
        _similarity_lse,
        reference.similarity_lse.similarity_lse,
        [q, keys, r.choice([0.3, torch.tensor(0.7)]), exclude, bias, keys is not None and r.random() < 0.3],
    )


def _sigmoid_loss(queries, keys, scale, bias, first_key):
    return ops.sigmoid_loss(queries, keys, scale, bias, first_key=first_key)


def of_sigmoid_loss(r: Rng):
    q = rows(r, r.choice(FLOATS))
    return (
        _sigmoid_loss,
        reference.sigmoid_loss.sigmoid_loss,
        [
            q,
            r.tensor(r.size(), q.shape[1], dtype=q.dtype),
            0.4,
            r.choice([0.0, torch.tensor(-0.3)]),
            r.randrange(-3, 9),
        ],
    )


def of_group_norm_silu(r: Rng):
    groups, of_each, dtype = r.choice([1, 2, 3]), r.choice([1, 2, 5]), r.choice(FLOATS)
    c = groups * of_each
    x = r.tensor(r.choice([1, 2, 3]), c, *[r.size() for _ in range(r.randrange(3))], dtype=dtype)
    weight, bias = (r.choice([None, r.tensor(c)]) for _ in range(2))
    eps = 1e-2  # so that one element in a group, of variance 0, is compared as others are
    return ops.group_norm_silu, reference.group_norm_silu.group_norm_silu, [x, groups, weight, bias, eps]


def of_rotate4(r: Rng):
    size, dtype = r.size(), r.choice([*FLOATS, torch.uint8])
    x = r.tensor(r.choice([0, 1, 3]), r.choice([1, 3, 4]), size, size).mul(40).to(dtype)
    return ops.rotate4, reference.rotate4.rotate4, [x]


def images(r: Rng, dtype):
    return r.tensor(r.choice([1, 2, 4]), r.choice([1, 3]), r.choice([2, 5, 8]), r.choice([2, 5, 8]), dtype=dtype)


def _step(model, sample, coefficients, clip, history, noise, variance):
    return ops.diffusion_step(model, sample, coefficients, clip=clip, history=history, noise=noise, variance=variance)


def _reference_step(model, sample, coefficients, clip, history, noise, variance):
    return reference.diffusion.diffusion_step(model, sample, coefficients, clip, None, history, noise, variance)


def of_diffusion_step(r: Rng):
    x = images(r, r.choice(FLOATS))
    like = [r.tensor(*x.shape, dtype=x.dtype) for _ in range(3)]
    coefficients = r.choice([torch.linspace(0.1, 1.2, 12), torch.rand(len(x), 12)])
    return (
        _step,
        _reference_step,
        [
            like[0],
            x,
            coefficients,
            r.choice([None, 1.0]),
            like[1 : 1 + r.randrange(2)],
            r.choice([None, like[2]]),
            "fixed",
        ],
    )


def _q_sample(x0, timesteps, alphas, noise, prediction_type):
    return ops.q_sample(x0, timesteps, alphas, noise=noise, prediction_type=prediction_type)


def of_q_sample(r: Rng):
    x = images(r, r.choice(FLOATS))
    prediction = r.choice(["epsilon", "sample", "v_prediction"])
    return (
        _q_sample,
        reference.diffusion.q_sample,
        [x, r.ints(len(x), 9), torch.linspace(0.99, 0.01, 9), r.tensor(*x.shape, dtype=x.dtype), prediction],
    )


def _loss(*arguments):
    *arguments, prediction_type, snr_gamma, reduction = arguments
    return ops.diffusion_loss(*arguments, prediction_type=prediction_type, snr_gamma=snr_gamma, reduction=reduction)


def of_diffusion_loss(r: Rng):
    x = images(r, r.choice(FLOATS))
    arguments = [x, r.tensor(*x.shape, dtype=x.dtype), r.ints(len(x), 9), torch.linspace(0.99, 0.01, 9)]
    return (
        _loss,
        reference.diffusion.diffusion_loss,
        [*arguments, r.choice(["epsilon", "sample"]), r.choice([None, 5.0]), "mean"],
    )


def _noise(seeds, shape, step, dtype):
    return ops.diffusion_noise(seeds, shape, step=step, dtype=dtype)


def _reference_noise(seeds, shape, step, dtype):
    return reference.diffusion.diffusion_noise(seeds, math.prod(shape), step).reshape(len(seeds), *shape)


def of_diffusion_noise(r: Rng):
    return (
        _noise,
        _reference_noise,
        [
            r.ints(r.choice([0, 1, 3]), 2**40),
            [r.choice([1, 3, 8, 33]) for _ in range(r.randrange(3))],
            r.choice([0, 7, 255]),
            r.choice(FLOATS),
        ],
    )


def _draw_and_augment(pictures, distribution, seed, epoch, ids, size, kernel_size, dtype):
    params = draw_params(
        AugmentDistribution(**distribution), ops.augment.image_sizes(pictures), seed=seed, epoch=epoch, sample_ids=ids
    )
    return augment(pictures, params, size, kernel_size=kernel_size, dtype=dtype, layout="CHW")


def of_augment(r: Rng):
    pictures = [(r.tensor(3, r.size(), r.size()).sigmoid() * 255).to(torch.uint8) for _ in range(r.choice([1, 3]))]
    distribution = {
        "scale": (0.08, 1.0),
        "ratio": (0.75, 1.33),
        "hue": r.choice([0.0, 0.5]),
        "contrast": r.choice([0.0, 0.9, (0.2, 3.0)]),
        "blur_p": r.choice([0.0, 1.0]),
        "solarize_p": 0.5,
    }
    return (
        _draw_and_augment,
        None,
        [
            pictures,
            distribution,
            r.getrandbits(64),
            r.getrandbits(32),
            None,
            r.choice([4, (9, 3)]),
            r.choice([1, 3]),
            torch.float32,
        ],
    )


PUBLIC = [value for name, value in globals().items() if name.startswith("of_")]


def calls(seed: int):
    """Random number generators, one per call, until the time or the number of calls is over."""
    end = time.monotonic() + SECONDS
    number = 0
    while number < CALLS if CALLS else time.monotonic() < end:
        yield number, Rng(seed * 10**9 + number)
        number += 1


def moderate(value) -> bool:
    """Whether an argument's numbers are such that rounding alone tells results apart."""
    if isinstance(value, Tensor):
        if value.is_meta or value.is_nested or value.layout is not torch.strided or value.dtype.is_complex:
            return False
        if value._is_zerotensor():  # with which plain PyTorch crashes as an index
            return False
        return not value.is_floating_point() or bool((value.double().abs() < 50).all())
    if isinstance(value, (list, tuple)):
        return all(map(moderate, value))
    if isinstance(value, float):
        return value == 0 or 1e-3 <= abs(value) < 50
    return not isinstance(value, int) or abs(value) < 300


def shown(number: int, arguments: list) -> str:
    try:
        return f"call {number}: {arguments}"[:2000]
    except Exception:  # torch cannot print all kinds of tensors
        return f"call {number}: {[type(argument) for argument in arguments]}"


def outputs(out) -> list[Tensor]:
    return [t for t in ([out] if isinstance(out, Tensor) else out) if t is not None]


def agree(found, expected, dtype: torch.dtype) -> bool:
    for a, b in zip(outputs(found), outputs(expected), strict=False):
        a, b = a.double(), b.double()
        close = torch.isclose(a, b, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype], equal_nan=True)
        if a.shape != b.shape or not close.all():
            return False
    return True


@pytest.mark.parametrize("make", PUBLIC, ids=lambda make: make.__name__[3:])
def test_public_functions(make):
    """Arguments of which none, one or two are odd. An error is a TypeError or ValueError with a sentence."""
    compared = refused = 0
    for number, r in calls(PUBLIC.index(make)):
        function, truth, arguments = make(r)
        for _ in range(r.choice([0, 1, 1, 2])):
            place = r.randrange(len(arguments))
            arguments[place] = r.odd(arguments[place])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = function(*arguments)
            except (TypeError, ValueError):
                refused += 1
                continue
            except Exception as error:
                raise AssertionError(f"no TypeError or ValueError in {shown(number, arguments)}") from error
            if truth is None or not all(map(moderate, arguments)):
                continue
            try:
                expected = truth(*arguments)
            except Exception:  # the reference takes less: nothing to compare with
                continue
        tensors = [t for t in arguments if isinstance(t, Tensor)] + outputs(found)
        floats = [t.dtype for t in tensors if t.dtype in TOLERANCE]
        coarsest = max(floats, key=TOLERANCE.__getitem__, default=torch.float32)
        assert agree(found, expected, coarsest), shown(number, arguments)
        compared += 1
    assert refused > 0
    assert compared > 0 or make is of_augment


def arguments_of(name: str, r: Rng) -> list:
    """Right arguments of a function of the extension, which the op of that name has, too."""
    dtype = r.choice(FLOATS)
    z, x = rows(r, dtype), images(r, dtype)
    one = r.tensor(*z.shape, dtype=dtype)
    keys = r.tensor(r.size(), z.shape[1], dtype=dtype)
    number, wide = torch.tensor(0.5), torch.float64 if dtype == torch.float64 else torch.float32
    t, alphas, c = r.ints(len(x), 9), torch.linspace(0.99, 0.01, 9), x.shape[1]
    vector = [torch.rand(len(z)).double() for _ in range(2)]
    square = x[..., : min(x.shape[2:]), : min(x.shape[2:])]
    pictures = [(r.tensor(3, 6, 7).sigmoid() * 255).to(torch.uint8) for _ in range(2)]
    params = list(draw_params(AugmentDistribution(hue=0.2, blur_p=1.0), [(6, 7)] * 2, seed=r.getrandbits(30)))
    sizes = torch.tensor([(6, 7)] * 2)
    view = AugmentDistribution(hue=0.2, blur_p=1.0)._packed()
    return {
        "nt_xent": lambda: [z, one, number, "mean"],
        "info_nce_forward": lambda: [z, one, number, "none"],
        "info_nce_backward": lambda: [number.to(wide), z, one, number, torch.rand(2 * len(z)).double(), "mean"],
        "similarity_lse_forward": lambda: [
            z,
            keys,
            number,
            r.ints(len(z), len(keys))[:, None],
            torch.rand(len(keys)),
            True,
            True,
        ],
        "similarity_lse_backward": lambda: [z, None, number, *vector, None, None, None, None],
        "sigmoid_loss_forward": lambda: [z, keys, number, number, 0, True],
        "group_norm_silu_forward": lambda: [x, c, torch.ones(c), None, 1e-5],
        "group_norm_silu_backward": lambda: [x, x, c, None, torch.ones(c), *torch.rand(2, len(x), c).to(wide)],
        "rotate4_forward": lambda: [square],
        "rotate4_backward": lambda: [square.repeat(4, 1, 1, 1)],
        "diffusion_step": lambda: [x, x, torch.rand(12), 1.0, None, [x], None, t, "fixed"],
        "diffusion_q_sample": lambda: [x, t, alphas, "epsilon", None, t, 3],
        "diffusion_loss_forward": lambda: [x, x, t, alphas, "sample", 5.0],
        "diffusion_loss_backward": lambda: [torch.rand(len(x)).to(wide), x, x, t, alphas, "epsilon", None],
        "diffusion_noise": lambda: [t, [3, 5], 7, dtype],
        "augment_forward": lambda: [
            pictures,
            params,
            True,
            5,
            4,
            "bilinear",
            True,
            3,
            [0.5] * 3,
            [0.5] * 3,
            torch.float32,
            False,
        ],
        "augment_draw": lambda: [sizes, torch.arange(2), [view], 5, 0],
        "ddpm_coefficients": lambda: [torch.rand(3, 2), torch.arange(3), "epsilon", "fixed_small"],
        "ddim_coefficients": lambda: [torch.rand(3, 2), torch.arange(3), "epsilon", 0.5, False],
        "dpm_coefficients": lambda: [
            torch.rand(3, 4).double(),
            torch.arange(3),
            "epsilon",
            2,
            "midpoint",
            "dpmsolver++",
        ],
        "philox4x32": lambda: [[1, 2, 3, 4], [5, 6]],
    }[name]()


def extension_functions() -> list[str]:
    known = [name for name in dir(_C) if not name.startswith("_")]
    others = {"route", "build_info", "cpu_capability", "set_cpu_capability", "available_cpu_capabilities"}
    return [name for name in known if name not in others]


@pytest.mark.parametrize("way", ["_C", "torch.ops"])
def test_extension_functions(way):
    """One or two odd arguments of every function: it returns or raises."""
    names = [name for name in extension_functions() if way == "_C" or hasattr(torch.ops.sslfast, name)]
    assert len(names) > 10
    raised = dict.fromkeys(names, 0)
    for number, r in calls(100 + len(way)):
        name = names[number % len(names)]
        arguments = arguments_of(name, r)
        if way == "torch.ops":  # which take the name of a dtype
            arguments = [str(a).removeprefix("torch.") if isinstance(a, torch.dtype) else a for a in arguments]
        for _ in range(r.choice([0, 1, 1, 2])):
            place = r.randrange(len(arguments))
            arguments[place] = r.odd(arguments[place])
        function = getattr(_C if way == "_C" else torch.ops.sslfast, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function(*arguments)
            except SystemError:
                raise
            except Exception:
                raised[name] += 1
    assert all(raised.values()), raised
