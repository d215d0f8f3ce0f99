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


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
