"""The four rotations of a batch with their labels: ours, torch.rot90, and image by image as mimicry does it."""

from functools import partial

import peers
import pytest
import torch
from measure import copy_ceiling

from sslfast.ops import rotate4

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = ["64×1×28×28", "64×3×32×32", "64×3×64×64"]


def batch(shape: str, dtype: str, layout: str) -> torch.Tensor:
    images = 255 * torch.rand([int(n) for n in shape.split("×")], generator=torch.Generator().manual_seed(0))
    return images.to(getattr(torch, dtype)).contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotate4_forward(race, quick, shape, dtype, layout):
    if quick and (shape != SHAPES[0] or dtype != "float32"):
        pytest.skip("not in the quick selection")
    images = batch(shape, dtype, layout)
    others = {name: partial(function, images) for name, function in peers.ROTATE4.items()}
    case = {"images": shape, "dtype": dtype, "layout": layout, "direction": "forward"}
    # Read once, written four times.
    floor = (5 * images.nbytes, copy_ceiling())
    race(case, partial(rotate4, images), others, floor, headline=layout == "contiguous")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotate4_forward_and_backward(race, quick, shape, dtype):
    if quick and (shape != SHAPES[0] or dtype != "float32"):
        pytest.skip("not in the quick selection")
    images = batch(shape, dtype, "contiguous").requires_grad_()
    grad = torch.cat([images.detach()] * 4)

    def step(function):
        return torch.autograd.grad(function(images)[0], images, grad)

    others = {name: partial(step, function) for name, function in peers.ROTATE4.items()}
    case = {"images": shape, "dtype": dtype, "layout": "contiguous", "direction": "and backward"}
    floor = (10 * images.nbytes, copy_ceiling())
    race(case, partial(step, rotate4), others, floor, headline=dtype == "float32")
