"""In plain eager mode the ops go past torch's dispatcher, with the results and gradients of their custom ops."""

import itertools
import sys

import pytest
import torch
from op_calls import CALLS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sslfast.ops._route import DISPATCHER


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
                patch.setattr(module, "route", lambda *_: DISPATCHER, raising=False)
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
