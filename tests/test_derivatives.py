"""A derivative is right or refused, whatever way it is taken; none is silently zero."""

import math
import sys

import pytest
import torch
from op_calls import CALLS
from torch import Tensor
from torch.autograd import forward_ad

from sslfast import losses, ops
from sslfast.ops._route import DISPATCHER
from sslfast.ops.augment import AugmentDistribution, draw_params

N, D = 6, 8
LABELS = torch.arange(2 * N) % 3
QUEUE = torch.randn(11, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LOSSES = {
    "NTXentLoss": losses.NTXentLoss(0.5),
    "DCLLoss": losses.DCLLoss(0.3),
    "InfoNCE": losses.InfoNCE(0.2),
    "InfoNCE none": losses.InfoNCE(0.2, reduction="none"),
    "InfoNCE with a queue": lambda a, b: losses.InfoNCE(0.2)(a, b, QUEUE),
    "ClipLoss": lambda a, b: losses.ClipLoss()(a, b, 3.0),
    "SigLipLoss": lambda a, b: losses.SigLipLoss()(a, b, 3.0, -2.0),
    "SupConLoss": lambda a, b: losses.SupConLoss(0.5)(torch.cat([a, b]), LABELS),
}


def scalar(function):
    """function with one number as its result: all its outputs, weighted."""

    def run(*inputs):
        out = function(*inputs)
        outputs = [t for t in ([out] if isinstance(out, Tensor) else out) if t.is_floating_point()]
        weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).reshape(t.shape) for t in outputs]
        return sum((t.double() * w).sum() for t, w in zip(outputs, weights, strict=True))

    return run


def wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


# name: (function, inputs in float64): float64 where the op takes it, so that finite differences are exact enough.
CASES = {name: (op, [wide(t) for t in inputs]) for name, (op, inputs) in CALLS.items() if inputs and "bf" not in name}
CASES |= {name: (loss, list(torch.randn(2, N, D, dtype=torch.float64))) for name, loss in LOSSES.items()}
ROADS = ("backward", "jvp", "dual", "jacfwd", "linearize", "func.grad", "jacrev", "vjp", "vmap of grad")


def along(road: str, f, inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    """The derivative of f along the directions, by one of the roads of torch."""
    inputs, directions, places = tuple(inputs), tuple(directions), tuple(range(len(inputs)))

    def dot(gradients) -> Tensor:
        return sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    if road == "backward":
        leaves = [x.clone().requires_grad_() for x in inputs]
        return dot(torch.autograd.grad(f(*leaves), leaves))
    if road == "jvp":
        return torch.func.jvp(f, inputs, directions)[1]
    if road == "dual":
        with forward_ad.dual_level():
            out = f(*(forward_ad.make_dual(x, d) for x, d in zip(inputs, directions, strict=True)))
            return forward_ad.unpack_dual(out).tangent
    if road == "jacfwd":
        return dot(torch.func.jacfwd(f, places)(*inputs))
    if road == "linearize":
        return torch.func.linearize(f, *inputs)[1](*directions)
    if road == "func.grad":
        return dot(torch.func.grad(f, places)(*inputs))
    if road == "jacrev":
        return dot(torch.func.jacrev(f, places)(*inputs))
    if road == "vjp":
        return dot(torch.func.vjp(f, *inputs)[1](torch.ones((), dtype=torch.float64)))
    batched = [x.expand(2, *x.shape) for x in inputs]
    return dot([g[1] for g in torch.func.vmap(torch.func.grad(f, places))(*batched)])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", CASES)
def test_every_road_gives_the_derivative(name, road):
    function, inputs = CASES[name]
    f = scalar(function)
    torch.manual_seed(0)
    directions = [torch.randn_like(x) for x in inputs]
    step = 1e-6
    ahead, behind = (
        f(*(x + sign * step * d for x, d in zip(inputs, directions, strict=True))).item() for sign in (1, -1)
    )
    found = along(road, f, inputs, directions).item()
    # Some results are float32 whatever the input.
    assert math.isclose(found, (ahead - behind) / (2 * step), rel_tol=2e-5, abs_tol=2e-5), name


@pytest.mark.parametrize("name", [name for name, (_, inputs) in CALLS.items() if inputs])
def test_dispatcher_refuses(name, monkeypatch):
    """What sslfast.ops does in plain PyTorch torch.ops.sslfast refuses."""
    for module in [module for name, module in sys.modules.items() if name.startswith("sslfast.ops.")]:
        monkeypatch.setattr(module, "route", lambda *_: DISPATCHER, raising=False)
    function, (x, *rest) = CALLS[name]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: function(x, *rest), (x,), (torch.ones_like(x),))
    if name in ("q_sample", "diffusion_step"):  # plain PyTorch wherever a gradient is wanted
        return
    with pytest.raises(NotImplementedError, match="no derivative for the transforms"):
        torch.func.grad(lambda x: scalar(function)(x, *rest))(x)


def test_augment_refuses():
    images = torch.rand(2, 3, 8, 8)
    params = draw_params(AugmentDistribution(), [(8, 8)] * 2, seed=0)

    def total(images: Tensor) -> Tensor:
        return ops.augment.augment(images, params, 8).sum()

    with pytest.raises(NotImplementedError, match="augment_forward has no"):
        torch.func.jvp(total, (images,), (images,))
    with pytest.raises(NotImplementedError, match="augment_forward has no"):
        torch.func.grad(total)(images)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        total(images.requires_grad_()).backward()


HAVE_SECOND = {"rotate4", "q_sample", "diffusion_step"}  # linear, or plain PyTorch where a gradient is wanted


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_right_or_refused(name):
    function, inputs = CASES[name]
    f, places = scalar(function), tuple(range(len(inputs)))
    leaves = [x.clone().requires_grad_() for x in inputs]
    if name not in HAVE_SECOND:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        return

    def penalty(*x):
        return sum(g.square().sum() for g in torch.func.grad(lambda *x: f(*x).square(), places)(*x))

    gradients = torch.autograd.grad(f(*leaves).square(), leaves, create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
    torch.testing.assert_close(found, torch.func.grad(penalty, places)(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_batches(name):
    """torch.autograd.grad(is_grads_batched=True), which torch.autograd.functional.jacobian(vectorize=True) uses."""
    function, inputs = CASES[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, Tensor) else out[0]
    batch = torch.linspace(-1, 2, 3 * out.numel(), dtype=out.dtype).reshape(3, *out.shape)
    found = torch.autograd.grad(out, leaves, batch, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        for a, b in zip(found, torch.autograd.grad(out, leaves, batch[k], retain_graph=True), strict=True):
            torch.testing.assert_close(a[k], b)


def test_compiled_forward_mode_is_right_or_refused():
    def f(x, y):
        return torch.func.jvp(lambda x: ops.nt_xent(x, y), (x,), (y,))[1]

    inputs = torch.randn(2, N, D)
    with pytest.raises(Exception, match="no forward-mode derivative"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(*inputs)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, backend="aot_eager")(*inputs), f(*inputs))
