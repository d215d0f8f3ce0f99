"""Which way a call of an op takes.

KERNEL: straight to the kernel. Nothing but autograd watches the call, and the memory of each tensor holds its values.
DISPATCHER: through torch's dispatcher, which takes tens of microseconds. Something else watches (tracing, a tensor
    subclass, a dispatch mode, vmap), or a tensor is one that torch negates or fills with zeros only when it is read.
REFERENCE: plain PyTorch. Forward mode or a transform of torch.func takes a derivative that kernels do not have.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad

from sslfast import _C

KERNEL, DISPATCHER, REFERENCE, _TRANSFORM = range(4)
DEVICES: tuple[str, ...] = ("cpu", "cuda") if _C.build_info()["cuda"] else ("cpu",)


def route(*arguments: object) -> int:
    """The way for a call with these arguments, of which only the tensors matter."""
    way = DISPATCHER if torch.compiler.is_compiling() else _C.route(*arguments)
    if way != _TRANSFORM:
        return way
    differentiates = any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in get_interpreter_stack())
    return REFERENCE if differentiates else DISPATCHER


def has_kernel(t: Tensor) -> bool:
    """Whether kernels take the device and dtype of ``t``; CUDA kernels take no float64."""
    return t.device.type in DEVICES and (t.device.type == "cpu" or t.dtype != torch.float64)


def refuse_other_derivatives(*ops: torch.library.CustomOpDef) -> None:
    """Make ops raise NotImplementedError where a derivative other than backward's is taken.

    torch would drop the tangents of forward mode without a word, and answer torch.func.grad with advice for authors.
    """
    for op in ops:
        kernel = torch._library.autograd.make_autograd_impl(op._opoverload, op)
        guarded = _guard(kernel, op._opoverload._opname)
        _LIBRARY.impl(op._opoverload, guarded, "Autograd", with_keyset=True, allow_override=True)


_LIBRARY = torch.library.Library("sslfast", "IMPL")


def _guard(kernel: Callable, name: str) -> Callable:
    def guarded(keyset, *args, **kwargs):
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"torch.ops.sslfast.{name} has no forward-mode derivative")
        transform = peek_interpreter_stack()
        if transform is not None and transform.key() == TransformType.Grad and any(t.requires_grad for t in tensors):
            raise NotImplementedError(f"torch.ops.sslfast.{name} has no derivative for the transforms of torch.func")
        return kernel(keyset, *args, **kwargs)

    return guarded
