"""When an op may skip torch's dispatcher."""

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain_eager(*tensors: Tensor) -> bool:
    """True where nothing but autograd watches the call: no tracing, tensor subclass, dispatch mode or transform."""
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in _PLAIN for t in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )
