"""The gallery picture and its command."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslfast.cli import main
from sslfast.evaluation.gallery import draw_gallery
from sslfast.transforms import RandomAugment


def test_picture_shows_originals_and_views(tmp_path):
    red, blue = torch.zeros(2, 3, 20, 30, dtype=torch.uint8).unbind()
    red[0], blue[2] = 255, 255
    transform = RandomAugment(16, views=2, brightness=(0.5, 0.5), seed=0)
    draw_gallery([red, blue], transform, tmp_path / "a.png", epochs=3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    colors, counts = np.unique(
        np.asarray(Image.open(tmp_path / "a.png"))[..., :3].reshape(-1, 3), axis=0, return_counts=True
    )
    area = {tuple(color): count for color, count in zip(colors.tolist(), counts.tolist(), strict=True)}
    for bright, dark in (((255, 0, 0), (128, 0, 0)), ((0, 0, 255), (0, 0, 128))):
        views = sum(count for color, count in area.items() if np.abs(np.subtract(color, dark)).max() <= 1)
        assert views / area[bright] == pytest.approx(
            6 * 1.5, rel=0.05
        )  # originals of 20 × 30 fill two thirds of a cell


def test_command_draws_a_data_set(tmp_path, capsys):
    out = tmp_path / "digits.png"
    assert main(["augment-gallery", "--data", "digits", "--out", str(out), "--images", "3", "--epochs", "2"]) == 0
    assert "3 images, 2 pairs" in capsys.readouterr().out
    assert Image.open(out).size[0] > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--images", "0"], "--images must be at least 1, not 0"), (["--data", "/nowhere"], "no such directory")],
)
def test_mistakes_are_explained(arguments, message, capsys):
    assert main(["augment-gallery", *arguments]) == 1
    assert message in capsys.readouterr().err
