"""The options that methods share, each declared once, with the values that it may have.

A method's options are a dataclass derived from `RunOptions` or `EncoderOptions`. What is known about an option stands
on its field: the type carries conditions (`Count`, `Positive`, `Share`, …), the mark `MAY_CHANGE` says that a resumed
run may take another value. `check` tests all of it before a run writes anything.
"""

import dataclasses
import math
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import tyro

from sslfast.models import EncoderName
from sslfast.training import UserError, datasets, decode


@dataclasses.dataclass(frozen=True)
class Must:
    """A condition on the value of an option, for `Annotated`: how it is told, and whether a value holds it."""

    be: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Must:
    return Must(f"be at least {_number(least)}", lambda value: value >= least)


def at_most(most: float) -> Must:
    return Must(f"be at most {_number(most)}", lambda value: value <= most)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


_positive = Must("be more than 0", lambda value: value > 0)

# Numbers are finite, always. Where memory or time grow with a number, its upper bound keeps a slip of the finger from
# taking the machine down.
Positive = Annotated[float, _positive, at_most(1e9)]
NotNegative = Annotated[float, at_least(0), at_most(1e9)]
Share = Annotated[float, at_least(0), at_most(1)]
Temperature = Annotated[float, at_least(1e-4), at_most(1e4)]
Epochs = Annotated[float, at_least(0), at_most(1e6)]
Count = Annotated[int, at_least(1), at_most(2**31 - 1)]
Whole = Annotated[int, at_least(0), at_most(2**31 - 1)]
Depth = Annotated[int, at_least(1), at_most(16)]
Width = Annotated[int, at_least(1), at_most(2**14)]
Pixels = Annotated[int, at_least(0), at_most(4096)]
Seed = Annotated[int, at_least(0), at_most(2**31 - 1)]
Workers = Annotated[int, at_least(0), at_most(1024)]
MaxPixels = Annotated[int, at_least(1), at_most(2**40)]
MaxUnpacked = Annotated[int, at_least(1), at_most(2**50)]
Text = Annotated[str, Must("not be empty", bool)]

MAY_CHANGE = "may change when a run is resumed"
LearningRate = Annotated[float, _positive, at_most(1e4), MAY_CHANGE]


def _what_may_change(_: str) -> str:
    *names, last = sorted(option(name) for name in changeable(RunOptions) - {"run", "resume"})
    return f"(Of these, {', '.join(names)} and {last} may be changed.)"


@dataclasses.dataclass(kw_only=True)
class RunOptions:
    """What every training is told."""

    data: Annotated[Text, MAY_CHANGE] = "digits"
    """What to train on: digits (comes with scikit-learn), fashion-mnist, cifar10, or a directory with images
    (train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg) or with MNIST's four idx files. To resume a run: the same
    data, wherever it lies now."""
    data_dir: Annotated[Text, MAY_CHANGE] = "~/.cache/sslfast"
    """Where downloaded data sets are kept."""
    run: Annotated[str, MAY_CHANGE] = ""
    """The folder to write; by default runs/METHOD-DATA-DATE-TIME."""
    resume: Annotated[str, MAY_CHANGE, tyro.conf.arg(help_behavior_hint=_what_may_change)] = ""
    """Continue the run in this folder with its own settings."""

    epochs: Annotated[Count, MAY_CHANGE] = 5
    """How often each image is seen."""
    batch_size: Count = 512
    """Images per step, of all processes together."""
    lr: LearningRate
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256."""

    size: Pixels = 0
    """Height and width of the images in pixels; 0: as the data (28 or 32), 224 for image files."""
    flip: Share = 0.0
    """Probability of a horizontal flip: 0.5 for photographs."""

    seed: Seed = 0
    """Seed of everything random: weights, order and augmentation."""
    device: Annotated[str, MAY_CHANGE] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train: cpu, cuda, cuda:1, …"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the networks; auto: bfloat16 where the hardware multiplies matrices in it."""
    workers: Annotated[Workers, MAY_CHANGE] = 2
    """Processes that decode image files; data sets in memory need none."""
    corrupt: Annotated[Literal["skip", "stop"], MAY_CHANGE] = "skip"
    """What to do when an image file cannot be decoded: name it and go on, or stop."""
    background: str = "white"
    """Colour on which transparent images are laid: a name, '#808080' or 'rgb(128, 128, 128)'."""
    max_pixels: MaxPixels = decode.MAX_PIXELS
    """Image files of more pixels count as files that cannot be decoded."""
    max_unpacked: MaxUnpacked = datasets.MAX_UNPACKED
    """Bytes that a .gz file of MNIST's kind may unpack to."""
    log_every: Annotated[Count, MAY_CHANGE] = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_seconds: Annotated[NotNegative, MAY_CHANGE] = 60.0
    """Seconds between two checkpoints."""
    evaluate: Annotated[bool, MAY_CHANGE] = True
    """Judge what was learnt when the training is over, as `sslfast evaluate RUN` does."""


@dataclasses.dataclass(kw_only=True)
class EncoderOptions(RunOptions):
    """What every training of an encoder is told in addition."""

    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum, or LARS (for batches of thousands; try --lr 0.3 --weight-decay 1e-6)."""
    momentum: Share = 0.9
    """Momentum of either optimizer."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of matrices and filters; biases and normalisation have none."""
    warmup_epochs: Epochs = 0.5
    """Epochs in which the learning rate rises from 0; afterwards it falls along half a cosine."""

    encoder: EncoderName = "small"
    """small: a few convolutions, made for 16 to 64 pixels on a CPU. resnet*-cifar: with a stem for 32 pixels."""
    head_hidden: Width = 512
    """Width of the projection head's hidden layers."""
    head_features: Width = 128
    """Width of the vectors that the loss compares."""

    crop_scale: Annotated[float, _positive, at_most(1)] = 0.2
    """Smallest area of a random crop, as a part of the image; the largest is 1."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    compile: bool = False
    """Compile the model with torch.compile: a minute at the start, faster steps."""
    sync_batchnorm: bool = False
    """Under torchrun: BatchNorm sees the batch of all ranks instead of each rank its own part."""


@dataclasses.dataclass(kw_only=True)
class UseOptions:
    """What every command that uses a finished run is told."""

    run: tyro.conf.Positional[str]
    """The run's folder."""
    data: str = ""
    """Where the data of the run lies now; by default where the training found it."""
    data_dir: str = ""
    """Where downloaded data sets are kept now; by default as in the training."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute: cpu, cuda, cuda:1, …"""


def check(options: Any) -> None:
    """Raise UserError for the first option, of any dataclass, whose value is not among those that it may have."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if wrong := complaint(getattr(options, name), hint):
            raise UserError(f"{option(name)} {wrong}")
    if hasattr(options, "device"):
        check_device(options.device)


def complaint(value: Any, hint: Any) -> str | None:
    """Return why a value does not fit an annotated type, as the rest of a sentence, or None where it does."""
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        if wrong := complaint(value, kind):
            return wrong
        broken = (mark for mark in marks if isinstance(mark, Must) and not mark.holds(value))
        return next((f"must {mark.be}, not {value}" for mark in broken), None)
    if get_origin(hint) in (Union, UnionType):
        found = [complaint(value, kind) for kind in get_args(hint) if kind is not NoneType or value is None]
        return None if None in found else found[0]
    if get_origin(hint) is Literal:
        if any(type(value) is type(known) and value == known for known in get_args(hint)):
            return None
        return f"must be one of {', '.join(map(str, get_args(hint)))}, not {_shown(value)}"
    if get_origin(hint) in (tuple, list):
        if not isinstance(value, (tuple, list)):
            return f"must be several values, not {_shown(value)}"
        kinds = [kind for kind in get_args(hint) if kind is not Ellipsis]
        if Ellipsis not in get_args(hint) and get_origin(hint) is tuple and len(value) != len(kinds):
            return f"must be {len(kinds)} values, not {_shown(value)}"
        each = kinds * len(value) if len(kinds) == 1 else kinds
        return next((wrong for one, kind in zip(value, each, strict=True) if (wrong := complaint(one, kind))), None)
    if hint is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            return f"must be a finite number, not {_shown(value)}"
        return None
    if type(value) is not hint:
        names = {int: "a whole number", str: "text", bool: "true or false", NoneType: "nothing"}
        return f"must be {names[hint]}, not {_shown(value)}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def check_device(name: str) -> None:
    """Raise UserError unless this machine can compute on the device of that name."""
    try:
        torch.zeros(1, device=name).add(1).item()
    except Exception as error:  # RuntimeError, AssertionError, ImportError: each backend has its own
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def changeable(kind: type) -> set[str]:
    """Return the names of the options that may change when a run is resumed."""
    hints = get_type_hints(kind, include_extras=True)
    return {name for name, hint in hints.items() if MAY_CHANGE in getattr(hint, "__metadata__", ())}


def option(name: str) -> str:
    """Return a field's name as it is on the command line."""
    return f"--{name.replace('_', '-')}"
