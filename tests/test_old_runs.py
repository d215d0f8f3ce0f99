"""Runs that version 0.1 began go on, and are judged, as by version 0.1.

tests/data has two: an epoch of four steps on digits, in float32, and the losses with which version 0.1 continued them
to a second epoch. They are small: the encoder of SimCLR has 3 channels where others have 48.
"""

import json
import tarfile
from pathlib import Path

import pytest
from runs import metrics

from sslfast.cli import main
from sslfast.models import SmallEncoder
from sslfast.training import checkpoint

DATA = Path(__file__).parent / "data"


@pytest.fixture
def old(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(SmallEncoder.__init__, "__defaults__", (3,))
    with tarfile.open(DATA / f"{request.param}-0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / f"{request.param}-0.1"


@pytest.mark.parametrize("old", ["simclr", "ddpm"], indirect=True)
def test_a_run_of_version_0_1_is_continued(old, capsys):
    method = checkpoint.load_config(old)["method"]
    assert main([method, "--resume", str(old), "--epochs", "2"]) == 0
    assert "at step 4 of 8" in capsys.readouterr().out
    wanted = json.loads((DATA / f"{method}-0.1-continued.json").read_text())
    assert [line["step"] for line in metrics(old)] == [step for step, _ in wanted]
    assert [line["loss"] for line in metrics(old)] == pytest.approx([loss for _, loss in wanted], rel=1e-3)
    assert checkpoint.load_config(old)["images"] == 1437, "from now on the data is compared"


@pytest.mark.parametrize(
    ("old", "words"),
    [("simclr", ["--map-samples", "50"]), ("ddpm", ["--samples", "20", "--steps", "2"])],
    indirect=["old"],
)
def test_a_run_of_version_0_1_is_judged(old, words):
    assert main(["evaluate", str(old), "--device", "cpu", *words]) == 0
    assert (old / "evaluation.json").is_file()
