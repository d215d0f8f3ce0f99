"""In plain eager mode the ops go past torch's dispatcher, with the results and gradients of their custom ops."""

import itertools
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sslfast.ops import (
    diffusion_loss,
    diffusion_noise,
    diffusion_step,
    group_norm_silu,
    nt_xent,
    q_sample,
    rotate4,
    sigmoid_loss,
    similarity_lse,
)

Q, K = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(0))
X, Y = torch.randn(2, 3, 6, 5, 5, generator=torch.Generator().manual_seed(1))
SCALE, BIAS, WEIGHT = torch.tensor(3.0), torch.tensor([-2.0]), torch.linspace(-1, 2, 6)
T, ALPHAS, SEEDS = torch.tensor([1, 0, 7]), torch.linspace(0.99, 0.01, 10), torch.arange(3)
EXCLUDE, STEP = torch.arange(9), torch.linspace(0.1, 1.2, 12)

# name: (the op, the inputs that may need a gradient)
CALLS = {
    "nt_xent": (nt_xent, [Q, K, SCALE]),
    "similarity_lse": (similarity_lse, [Q, K, SCALE]),
    "similarity_lse bfloat16": (similarity_lse, [Q.bfloat16(), K.bfloat16(), SCALE]),
    "similarity_lse of number": (lambda q, k: similarity_lse(q, k, 3.0, exclude=EXCLUDE), [Q, K]),
    "similarity_lse self": (lambda q, s: similarity_lse(q, None, s), [Q, SCALE]),
    "similarity_lse columns": (lambda *t: similarity_lse(*t, columns=True), [Q, K, SCALE]),
    "similarity_lse a column": (lambda *t: similarity_lse(*t, columns=True)[1], [Q, K, SCALE]),
    "sigmoid_loss": (sigmoid_loss, [Q, K, SCALE, BIAS]),
    "sigmoid_loss float64": (sigmoid_loss, [Q.double(), K.double(), SCALE, BIAS]),
    "group_norm_silu": (lambda x, w, b: group_norm_silu(x, 3, w, b), [X, WEIGHT, WEIGHT.flip(0)]),
    "group_norm_silu bfloat16": (lambda x, w, b: group_norm_silu(x, 3, w, b), [X.bfloat16(), WEIGHT, WEIGHT]),
    "group_norm_silu bias": (lambda x, b: group_norm_silu(x, 3, None, b), [X, WEIGHT]),
    "diffusion_loss": (lambda a, b: diffusion_loss(a, b, T, ALPHAS, snr_gamma=5.0), [X, Y]),
    "diffusion_loss none": (lambda a, b: diffusion_loss(a, b, T, ALPHAS, reduction="none"), [X, Y]),
    "rotate4": (rotate4, [X]),
    "q_sample": (lambda x, noise: q_sample(x, T, ALPHAS, noise=noise), [X, Y]),
    "diffusion_step": (lambda a, b: diffusion_step(a, b, STEP, seeds=SEEDS), [X, Y]),
    "diffusion_noise": (lambda: diffusion_noise(SEEDS, (6, 5), step=4), []),
}


def results(name: str, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """The outputs of an op and, for those that have one, the gradients of its inputs."""
    op, inputs = CALLS[name]
    leaves = [t.clone().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
    out = op(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    differentiable = [t for t in outputs if t.requires_grad]
    assert bool(differentiable) == any(needs)
    if differentiable:
        weights = [torch.linspace(-1, 2, t.numel()).to(t.dtype).reshape(t.shape) for t in differentiable]
        torch.autograd.backward(differentiable, weights)
    return [*(t.detach() for t in outputs), *(t.grad for t in leaves)]


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_as_the_custom_op(name, monkeypatch):
    for needs in itertools.product([False, True], repeat=len(CALLS[name][1])):
        short = results(name, needs)
        with monkeypatch.context() as patch:
            for module in [m for n, m in sys.modules.items() if n.startswith("sslfast.ops.")]:
                patch.setattr(module, "is_plain_eager", lambda *_: False, raising=False)
            long = results(name, needs)
        for a, b in zip(short, long, strict=True):
            assert (a is None) == (b is None), needs
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), needs


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["similarity_lse", "sigmoid_loss", "group_norm_silu", "rotate4"])
def test_backward_makes_no_zeros(name):
    """As autograd does for the gradients of outputs that nobody used."""
    op, inputs = CALLS[name]
    out = op(*(t.clone().requires_grad_() for t in inputs))
    out = out if isinstance(out, Tensor) else out[0]
    with Record() as record:
        out.backward(torch.ones_like(out))
    assert not [name for name in record.names if name.startswith("zero")]
