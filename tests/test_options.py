"""Every option has a range, which is tested before anything is written."""

import dataclasses
import importlib
import math
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from runs import idx_folder

from sslfast.cli import main
from sslfast.evaluation.evaluate import Evaluate
from sslfast.evaluation.evaluate_ddpm import EvaluateDDPM
from sslfast.evaluation.evaluate_gan import EvaluateGAN
from sslfast.evaluation.gallery import Gallery
from sslfast.evaluation.sample import Sample
from sslfast.evaluation.sample_gan import SampleGAN
from sslfast.methods.ddpm import DDPM
from sslfast.methods.moco import MoCo
from sslfast.methods.simclr import SimCLR
from sslfast.methods.ssgan import SSGAN
from sslfast.training import UserError, checkpoint, options
from sslfast.training.options import Must, RunOptions, changeable, check, complaint

METHODS: dict[str, type[RunOptions]] = {"simclr": SimCLR, "moco": MoCo, "ddpm": DDPM, "ssgan": SSGAN}
USES: list[Any] = [Evaluate, EvaluateDDPM, EvaluateGAN, Sample, SampleGAN, Gallery]
FIELDS = [
    (kind, name, hint)
    for kind in (*METHODS.values(), *USES)
    for name, hint in get_type_hints(kind, include_extras=True).items()
]


def numbers(hint) -> list:
    """The types of numbers in an annotated type, with their marks: [(int, [Must(…)])]."""
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        return [(kind, marks)] if kind in (int, float) else numbers(kind)
    if hint in (int, float):
        return [(hint, [])]
    return [] if get_origin(hint) is Literal else [found for part in get_args(hint) for found in numbers(part)]


@pytest.mark.parametrize(("kind", "name", "hint"), FIELDS, ids=lambda x: getattr(x, "__name__", x) if x else "")
def test_every_number_has_its_range(kind, name, hint):
    for number, marks in numbers(hint):
        wrong = [math.nan, math.inf, -math.inf, "3", None, True, [3]]
        wrong += [2**70, -(2**70), 1.5] if number is int else []
        one = Annotated[(number, *marks)] if marks else number
        assert all(complaint(value, one) for value in wrong)
        if name != "guidance":
            assert any(isinstance(mark, Must) for mark in marks)
            assert complaint(-1, one), "no option is negative"


def default(kind, **changes):
    return kind(**({"run": "nowhere"} if kind in USES and kind is not Gallery else {}), **changes)


@pytest.mark.parametrize("kind", [*METHODS.values(), *USES])
def test_defaults_are_in_their_ranges(kind):
    check(default(kind))


@pytest.mark.parametrize("kind", METHODS.values())
def test_what_may_change_on_resume_is_the_same_for_all_methods(kind):
    assert changeable(kind) == changeable(RunOptions)


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_resume_names_what_may_change(method, capsys):
    with pytest.raises(SystemExit):
        main([method, "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    named = said.split("(Of these, ")[1].split(" may be changed")[0]
    wanted = {options.option(name) for name in changeable(RunOptions) - {"run", "resume"}}
    assert set(named.replace(" and ", ", ").split(", ")) == wanted
    assert {"--data", "--data-dir", "--device", "--workers", "--lr"} <= wanted


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (3, Literal[1, 2], "must be one of 1, 2, not 3"),
        (True, Literal[1, 2], "must be one of 1, 2, not True"),
        ([1, 0], tuple[options.Count, ...], "must be at least 1, not 0"),
        (5, tuple[int, ...], "must be several values, not 5"),
        ((1,), tuple[int, int], "must be 2 values, not (1,)"),
        ("", options.Text, "must not be empty, not "),
        (1, str, "must be text, not 1"),
        (1, bool, "must be true or false, not 1"),
    ],
)
def test_complaints(value, hint, message):
    assert complaint(value, hint) == message


@pytest.mark.parametrize("value", [None, (1, 2)])
def test_what_may_be_left_out(value):
    assert complaint(value, tuple[int, int] | None) is None


BAD = {
    "simclr": [
        (["--batch-size", "1"], "--batch-size 1 is too small: each rank needs at least 2 images"),
        (["--head-hidden", "0"], "--head-hidden must be at least 1, not 0"),
        (["--head-hidden", "-3"], "--head-hidden must be at least 1, not -3"),
        (["--head-hidden", "1000000000"], "--head-hidden must be at most 16,384"),
        (["--head-features", "0"], "--head-features must be at least 1"),
        (["--color", "2.6"], "--color must be at most 2.5, not 2.6"),
        (["--momentum", "2"], "--momentum must be at most 1, not 2.0"),
        (["--checkpoint-seconds", "nan"], "--checkpoint-seconds must be a finite number, not nan"),
        (["--epochs", str(2**70)], "--epochs must be at most"),
        (["--size", "1000000"], "--size must be at most 4,096, not 1000000"),
        (["--size", "3000"], "kernel_size: expected an odd number from 1 to 255"),
        (["--encoder", "resnet18-cifar", "--size", "1", "--blur", "0.5"], "--size 1 does not work with these options"),
        (["--warmup-epochs", "1e308"], "--warmup-epochs must be at most"),
        (["--temperature", "1e-310"], "--temperature must be at least 0.0001"),
        (["--data", ""], "--data must not be empty"),
        (["--data-dir", ""], "--data-dir must not be empty"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--device", "foo"], "--device foo cannot be used"),
        (["--device", ""], "--device  cannot be used"),
        (["--workers", "-1"], "--workers must be at least 0"),
    ],
    "moco": [
        (["--batch-size", "1"], "--batch-size 1 is too small"),
        (["--head-features", "-1"], "--head-features must be at least 1"),
        (["--queue", str(2**40)], "--queue must be at most"),
        (["--device", "meta"], "--device meta cannot be used"),
    ],
    "ddpm": [
        (["--widths"], "--widths, --blocks, --dropout: widths: expected positive multiples of groups"),
        (["--widths", "8", "8", "8", "8", "8", "8"], "--size 16 does not work with these options"),
        (["--attention", "7"], "--attention count resolutions from 0"),
        (["--dropout", "1"], "--dropout"),
        (["--clip", "inf"], "--clip must be a finite number, not inf"),
        (["--timesteps", str(10**9)], "--timesteps must be at most 100,000"),
        (["--blocks", "1000"], "--blocks must be at most 16"),
    ],
    "ssgan": [
        (["--batch-size", "2"], "--batch-size 2 is too small: each rank needs at least 4 images"),
        (["--latent", "0"], "--latent must be at least 1"),
        (["--beta", "nan"], "--beta must be a finite number"),
        (["--reports", "-1"], "--reports must be at least 0"),
    ],
}


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [(m, words, message) for m, cases in BAD.items() for words, message in cases],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_work_is_a_sentence_and_leaves_nothing(method, words, message, tmp_path, capsys):
    run = tmp_path / "run"
    small = ["--data", "digits", "--batch-size", "8", "--device", "cpu", "--run", str(run)]
    small += ["--widths", "8", "--attention"] if method == "ddpm" else []
    assert main([method, *small, *words]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not run.exists()


@pytest.mark.parametrize("name", ["evaluate", "sample"])
@pytest.mark.parametrize("device", ["meta", "foo", "cuda:99"])
def test_a_device_is_tried_before_anything_else(name, device, tmp_path, capsys):
    settings = {"method": "ddpm", "channels": 1, "size": 16, "precision": "float32", "classes": []}
    checkpoint.save_config(tmp_path, settings)
    assert main([name, str(tmp_path), "--device", device]) == 1
    assert f"--device {device} cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "0"], "--images must be at least 1"),
        (["--epochs", "1000000"], "--epochs must be at most 50"),
        (["--size", "-1"], "--size must be at least 0"),
        (["--out", ""], "--out must not be empty"),
        (["--out", "."], "--out must name a file"),
        (["--data", ""], "--data must not be empty"),
    ],
    ids=str,
)
def test_options_of_the_gallery(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["augment-gallery", "--data", "digits", *words]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_the_size_that_counts_is_that_of_the_data(method, tmp_path, capsys):
    """--size 0, the default, and images of an odd size for an encoder that takes even ones."""
    folder = idx_folder(tmp_path / "odd", 27)
    words = ["--data", str(folder), "--batch-size", "8", "--device", "cpu", "--run", str(tmp_path / "r")]
    assert main([method, *words]) == 1
    assert "--size must be even for the small encoder, not 27" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_wrong_types_in_python_are_refused_too():
    for changes in ({"epochs": "3"}, {"lr": None}, {"evaluate": 1}, {"batch_size": 8.0}, {"corrupt": "ignore"}):
        with pytest.raises(UserError, match=f"--{next(iter(changes)).replace('_', '-')} must be"):
            check(dataclasses.replace(SimCLR(), **changes))


@pytest.mark.parametrize("method", METHODS)
def test_missing_memory_is_told_before_anything_is_written(method, tmp_path, monkeypatch, capsys):
    """Networks within the ranges, but too large for this machine."""
    module = importlib.import_module(f"sslfast.methods.{method}")
    build = {"ddpm": "build_unet", "ssgan": "build_gan"}.get(method, "build_encoder")
    monkeypatch.setattr(module, build, lambda *_, **__: torch.empty(2**50))
    words = ["--data", "digits", "--batch-size", "16", "--device", "cpu", "--run", str(tmp_path / "run")]
    assert main([method, *words]) == 1
    assert "there is not enough memory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
