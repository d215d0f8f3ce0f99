"""Objects of the API survive pickle with every protocol, copy, deepcopy and torch.save, and do the same afterwards."""

import copy
import io
import pickle

import pytest
import torch

from sslfast import losses, schedulers, transforms
from sslfast.ops.augment import AugmentDistribution, draw_params

IMAGES = (torch.arange(2 * 3 * 400) % 251).view(2, 3, 20, 20).to(torch.uint8)
Z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def by_torch_save(obj):
    file = io.BytesIO()
    torch.save({"hyper_parameters": {"it": obj}}, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)["hyper_parameters"]["it"]


WAYS = {f"pickle {n}": lambda obj, n=n: pickle.loads(pickle.dumps(obj, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
WAYS |= {"copy": copy.copy, "deepcopy": copy.deepcopy, "torch.save": by_torch_save}


def views(transform):
    return [transform(IMAGES) for _ in range(2)]


def loss_of(loss):
    if isinstance(loss, losses.SupConLoss):
        return loss(Z, torch.tensor([0, 0, 1, 1]))
    if isinstance(loss, losses.ClipLoss | losses.SigLipLoss):
        return loss(Z, Z.flip(0), 2.0, -1.0)
    return loss(Z, Z.flip(0))


def steps(scheduler):
    scheduler.set_timesteps(4)
    x = IMAGES / 255
    for t in scheduler.timesteps:
        x = scheduler.step(x / 2, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    return x


def in_use(scheduler):
    steps(scheduler)
    return scheduler


def cases() -> dict:
    """By name: what makes an object, and what it does."""
    found = {}
    for name in losses.__all__:
        if isinstance(getattr(losses, name), type):
            found[name] = getattr(losses, name), loss_of
    found["NTXentLoss with a bank"] = lambda: losses.NTXentLoss(0.5, (8, 6)), loss_of
    for name in transforms.__all__:
        kind = getattr(transforms, name)
        if isinstance(kind, type):
            found[name] = lambda kind=kind: kind(16, seed=3, memory_format=torch.channels_last), views
            random = {"dtype": torch.bfloat16, "interpolation": "bicubic"}
            found[f"{name} of a generator"] = (
                lambda kind=kind, random=random: kind(16, generator=torch.Generator().manual_seed(3), **random),
                views,
            )
    found["AugmentDistribution"] = AugmentDistribution, lambda d: draw_params(d, [(20, 20)], seed=1)
    found["AugmentParams"] = lambda: draw_params(AugmentDistribution(), [(20, 20)], seed=1), list
    for name in schedulers.__all__:
        kind = getattr(schedulers, name)
        if isinstance(kind, type) and hasattr(kind, "set_timesteps"):
            found[name] = kind, steps
            found[f"{name} in use"] = lambda kind=kind: in_use(kind()), steps
    return found


CASES = cases()


def test_all_of_the_api_is_here():
    public = {
        name
        for module in (losses, transforms, schedulers)
        for name in module.__all__
        if isinstance(getattr(module, name), type) and name != "SchedulerMixin"  # diffusers' own
    }
    assert public <= CASES.keys()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_copy_does_the_same(name, way):
    make, use = CASES[name]
    obj = make()
    copied = WAYS[way](obj)
    assert type(copied) is type(obj)
    expected = use(copy.deepcopy(obj))
    torch.testing.assert_close(use(copied), expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_used_copy_goes_on_where_the_object_was(way):
    transform = transforms.SimCLRTransform(16, generator=torch.Generator().manual_seed(3))
    transform(IMAGES)
    copied = WAYS[way](transform)
    torch.testing.assert_close(copied(IMAGES), copy.deepcopy(transform)(IMAGES) if way != "copy" else views_after(1))
    transform = transforms.SimCLRTransform(16, seed=3)
    transform.set_epoch(5)
    copied = WAYS[way](transform)
    transform.set_epoch(6)
    assert (copied.epoch, transform.epoch) == (5, 6)


def views_after(calls: int):
    transform = transforms.SimCLRTransform(16, generator=torch.Generator().manual_seed(3))
    for _ in range(calls):
        transform(IMAGES)
    return transform(IMAGES)


def test_transforms_of_one_generator_share_it_afterwards():
    generator = torch.Generator().manual_seed(3)
    pair = [transforms.RandomAugment(16, brightness=0.5, generator=generator) for _ in range(2)]
    for copies in (pickle.loads(pickle.dumps(pair)), copy.deepcopy(pair), [copy.copy(t) for t in pair]):
        assert copies[0].generator is copies[1].generator
    assert copy.copy(pair[0]).generator is generator
    assert copy.deepcopy(pair[0]).generator is not generator
