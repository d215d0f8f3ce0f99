"""What the tests share: kernels are tested on every instruction set that this machine has, and as CUDA kernels.

A test that takes the fixture `backend` runs once for each instruction set, once with the CUDA kernels in the emulator
and once with them on a device. Its tensors are CPU tensors in all cases: in the last two, functions of `_C` that have
CUDA kernels are replaced by ones that copy their tensors to (emulated) device memory, run the kernel, and copy back. So
a new op joins:

  1. tests/cuda_emulator/module.cpp   m.def("my_op_forward", on_device(&sslfast::my_op_forward));
  2. CUDA_FUNCTIONS below             "my_op_forward": ALL of its tensors go to the device, or those at some places
  3. tests/test_my_op.py              def test_…(backend, …): backend is "cpu-avx2", …, "cuda-emulated" or "cuda"

Where emulation is slow, cut the sizes: if backend == "cuda-emulated". Float64, which CUDA kernels do not take, is left
out by itself: cases with a parameter `dtype` that is torch.float64 have no CUDA backend.
"""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # graphs of another version of an op would be found there

import cuda_emulation
import pytest
import torch
from torch.utils._pytree import tree_map_only

from sslfast import _C

torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))

ALL = slice(None)
CUDA_FUNCTIONS = {
    "augment_forward": slice(1),
    "diffusion_step": ALL,
    "diffusion_q_sample": ALL,
    "diffusion_loss_forward": ALL,
    "diffusion_loss_backward": ALL,
    "diffusion_noise": ALL,
    "group_norm_silu_forward": ALL,
    "group_norm_silu_backward": ALL,
    "info_nce_forward": ALL,
    "info_nce_backward": ALL,
    "rotate4_forward": ALL,
    "rotate4_backward": ALL,
    "sigmoid_loss_forward": ALL,
    "similarity_lse_forward": ALL,
    "similarity_lse_backward": ALL,
}
BACKENDS = [*(f"cpu-{name}" for name in _C.available_cpu_capabilities()), "cuda-emulated", "cuda"]


@pytest.fixture(params=_C.available_cpu_capabilities())
def cpu_capability(request):
    """Runs the test once per instruction set, with the kernels of that set."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs the test once per instruction set and with the CUDA kernels, emulated and on a device; see above."""
    before = _C.cpu_capability()
    if request.param == "cuda":
        request.getfixturevalue("cuda_device")
        for name, places in CUDA_FUNCTIONS.items():
            monkeypatch.setattr(_C, name, on_device(getattr(_C, name), places))
        monkeypatch.setattr(_C, "nt_xent", nt_xent_by_its_parts)
    elif request.param == "cuda-emulated":
        request.getfixturevalue("emulator")
    else:
        _C.set_cpu_capability(request.param.removeprefix("cpu-"))
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture
def emulator(monkeypatch):
    """The module sslfast_emulated, with its CUDA kernels in place of functions of `_C`: for what it alone can show."""
    emulator = cuda_emulation.load()
    emulator.set_order("shuffled")
    emulator.reset_counters()
    for name in CUDA_FUNCTIONS:
        monkeypatch.setattr(_C, name, getattr(emulator, name))
    monkeypatch.setattr(_C, "nt_xent", nt_xent_by_its_parts)
    yield emulator
    emulator.run_all_blocks()


@pytest.fixture
def cuda_device():
    """For what only a device can show; skips the test, with the reason, where there is none."""
    if not _C.build_info()["cuda"]:
        pytest.skip(f"CUDA kernels were not built: {_C.build_info()['cuda_why_not']}")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device on this machine")
    return torch.device("cuda")


def nt_xent_by_its_parts(*args):
    """_C.nt_xent through the functions that the fixtures replace, which it calls in C++."""
    return torch.ops.sslfast.info_nce_forward(*args)[0]


def on_device(function, places: slice):
    """function with its tensors at these places copied to the device, and its results copied back."""

    def run(*args):
        args = list(args)
        args[places] = tree_map_only(torch.Tensor, lambda t: t.cuda(), args[places])
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), function(*args))

    return run


def pytest_collection_modifyitems(items):
    """Mark what runs CUDA kernels (cuda, emulated), and drop cases that do not exist.

    CUDA kernels take no float64; a module may say CAPABILITIES where the others would only repeat them.
    """
    kept = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("backend", "")
        capabilities = getattr(item.module, "CAPABILITIES", None)
        if backend.startswith("cuda") and parameters.get("dtype") == torch.float64:
            continue
        if backend.startswith("cpu") and capabilities and backend.removeprefix("cpu-") not in capabilities:
            continue
        fixtures = getattr(item, "fixturenames", ())
        if backend == "cuda" or "cuda_device" in fixtures:
            item.add_marker("cuda")
        if backend == "cuda-emulated" or "emulator" in fixtures:
            item.add_marker("emulated")
        kept.append(item)
    items[:] = kept
