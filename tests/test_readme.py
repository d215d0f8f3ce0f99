"""What the README shows is so: its example runs, and its links and pictures are there."""

import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


def test_example_runs():
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16))
    names = {"model": model}
    exec(example, names)
    assert torch.isfinite(names["loss"])
    assert model[1].weight.grad.abs().sum() > 0


def test_loss_with_masks_of_the_documentation():
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/losses.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(example, names)
    queries, keys = nn.functional.normalize(torch.randn(2, 9, 4), dim=2)
    real = torch.arange(9) != 5
    alike = torch.tensor([[1, -1], [0, 2], [1, -1], *[[-1, -1]] * 6])
    logits = 10 * queries @ keys.T
    for row, key in ((0, 1), (1, 0), (1, 2), (2, 1)):
        logits[row, key] = -torch.inf
    logits[:, 5] = -torch.inf
    expected = nn.functional.cross_entropy(logits[real], torch.arange(9)[real])
    torch.testing.assert_close(names["info_nce"](queries, keys, alike, real).float(), expected)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
