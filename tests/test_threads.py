"""Scratch memory and loops have the same number of threads, whatever other threads do to torch.set_num_threads."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from op_calls import CALLS
from torch import Tensor

from sslfast import _C
from sslfast.ops import group_norm_silu, nt_xent, sigmoid_loss, similarity_lse
from sslfast.ops.augment import AugmentDistribution, augment, draw_params

IMAGES = torch.arange(6 * 3 * 20 * 20).reshape(6, 3, 20, 20).to(torch.uint8)
PARAMS = draw_params(AugmentDistribution(hue=0.1, contrast=0.5, blur_p=1.0), [(20, 20)] * 6, seed=0)


def rows(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 40, generator=torch.Generator().manual_seed(count)).to(dtype).requires_grad_()


def with_gradients(function, *inputs: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]


KEYS = rows(2000).detach()

# Large enough for as many tasks as threads: what a kernel keeps for each thread is used.
LARGE = {
    "nt_xent": lambda: with_gradients(nt_xent, rows(700), rows(700)),
    "nt_xent bfloat16": lambda: with_gradients(nt_xent, rows(700, torch.bfloat16), rows(700, torch.bfloat16)),
    "similarity_lse": lambda: with_gradients(lambda q, k: similarity_lse(q, k, 0.2), rows(700), rows(2000)),
    "similarity_lse of queries": lambda: with_gradients(lambda q: similarity_lse(q, KEYS, 0.2), rows(70)),
    "similarity_lse self": lambda: with_gradients(lambda q: similarity_lse(q, None, 0.2), rows(900, torch.bfloat16)),
    "sigmoid_loss": lambda: with_gradients(lambda q, k: sigmoid_loss(q, k, 0.2), rows(700), rows(2000)),
    "group_norm_silu": lambda: with_gradients(lambda x: group_norm_silu(x.view(-1, 40, 5, 5), 8), rows(1000)),
    "augment": lambda: [augment(IMAGES, PARAMS, 16, kernel_size=3)],
}
LARGE |= {f"{name}, small": lambda op=op, inputs=inputs: _tensors(op(*inputs)) for name, (op, inputs) in CALLS.items()}


def _tensors(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


# Each op in a thread that has used torch, but not sslfast, before another one raises the number of threads.
FIRST_CALL = """
import threading, torch
from test_threads import LARGE
torch.set_num_threads(1)
expected = {name: call() for name, call in LARGE.items()}
for name, call in LARGE.items():
    torch.set_num_threads(1)
    ready, go, found = threading.Event(), threading.Event(), []
    def work():
        torch.get_num_threads()
        ready.set(); go.wait()
        found.extend(call())
    thread = threading.Thread(target=work)
    thread.start(); ready.wait()
    torch.set_num_threads(16)
    go.set(); thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected[name], found, strict=True)), name
print("fine")
"""


def test_first_call_of_a_thread_after_another_raised_the_number():
    folder = Path(__file__).parent  # where this module is found
    run = subprocess.run([sys.executable, "-c", FIRST_CALL], cwd=folder, capture_output=True, text=True)
    assert run.stdout == "fine\n", run.stderr


@pytest.mark.parametrize("seconds", [4])
def test_number_changes_while_ops_run(cpu_capability, seconds):
    """Four threads call ops, each with a number of threads that all of them change all the time."""
    if cpu_capability not in (_C.available_cpu_capabilities()[0], _C.available_cpu_capabilities()[-1]):
        seconds = 1
    before = torch.get_num_threads()
    expected = {name: call() for name, call in LARGE.items()}
    wrong: list[str] = []
    end = time.monotonic() + seconds

    def work(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < end and not wrong:
            torch.set_num_threads(choose.choice([1, 2, 3, 5, 8, 16]))
            name = choose.choice(list(LARGE))
            if not all(torch.equal(a, b) for a, b in zip(expected[name], LARGE[name](), strict=True)):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert not wrong
