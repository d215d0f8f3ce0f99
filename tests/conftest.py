"""What the tests share. Kernels are tested on every instruction set that this machine has."""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # graphs of another version of an op would be found there

import pytest
import torch

from sslfast import _C

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(params=_C.available_cpu_capabilities())
def cpu_capability(request):
    """Runs the test once per instruction set, with the kernels of that set."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)
