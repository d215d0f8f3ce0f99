"""The pictures of a run, as PNG files."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from sslfast.training import datasets, files, logging

INK, FAINT, LINE = "#22272e", "#c9d1d9", "#1f6feb"
RIGHT, WRONG = "#2da44e", "#d1242f"


def loss_curve(metrics: Path, path: Path) -> None:
    """Draw the loss and learning rate of ``metrics.jsonl`` over the epochs."""
    lines = logging.read(metrics)
    if not lines:
        return
    loss = np.array([line["loss"] for line in lines])
    epochs = np.array([line["step"] for line in lines]) * (lines[-1]["epoch"] / lines[-1]["step"])
    window = max(1, len(loss) // 40)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")

    figure, axes = _figure(7, 4)
    axes.plot(epochs, loss, color=LINE, alpha=0.25, linewidth=1)
    axes.plot(epochs[window - 1 :], smooth, color=LINE, linewidth=2)
    axes.set(xlabel="epoch", ylabel="loss", title="Training loss", xlim=(0, epochs[-1]))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    rate = axes.twinx()
    rate.plot(epochs, [line["lr"] for line in lines], color="#8b949e", linewidth=1.2, linestyle=":")
    rate.set_ylabel("learning rate (dotted)", color="#6e7781")
    rate.set_ylim(bottom=0)
    rate.spines[["top", "left"]].set_visible(False)
    _save(figure, path)


def gan_curves(metrics: Path, path: Path) -> None:
    """Draw both losses of a GAN's ``metrics.jsonl``, and the accuracy of rotation prediction if it is there."""
    lines = logging.read(metrics)
    if not lines:
        return
    steps = np.array([line["step"] for line in lines])
    window = max(1, len(lines) // 40)
    figure, axes = _figure(7, 4)

    def draw(where, name: str, color: str, label: str) -> None:
        values = np.convolve([line[name] for line in lines], np.ones(window) / window, mode="valid")
        where.plot(steps[window - 1 :], values, color=color, linewidth=1.6, label=label)

    draw(axes, "loss", LINE, "discriminator")
    draw(axes, "generator_loss", RIGHT, "generator")
    axes.set(xlabel="step", ylabel="loss", title="Losses of discriminator and generator", xlim=(0, steps[-1]))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    if "rotation" in lines[0]:
        right = axes.twinx()
        draw(right, "rotation", "#8b949e", "rotations told")
        right.set(ylabel="rotations of real images told, %", ylim=(0, 100))
        right.spines[["top", "left"]].set_visible(False)
        axes.plot([], [], color="#8b949e", linewidth=1.6, label="rotations told (right)")
    axes.legend(frameon=False)
    _save(figure, path)


def probe_curves(runs: dict[str, list[dict[int, float]]], path: Path) -> None:
    """Draw accuracies in percent over the steps of a training: for each kind of run, its mean and range over seeds."""
    figure, axes = _figure(7, 4.2)
    for place, (name, curves) in enumerate(runs.items()):
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        color = colormaps["tab10"](place)
        axes.plot(steps, values.mean(0), color=color, linewidth=2, label=name)
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="linear probe, test accuracy, %", title="What the discriminator knows of classes")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.legend(frameon=False)
    _save(figure, path)


def embedding_map(features: Tensor, labels: Tensor, classes: list[str], path: Path, seed: int = 0) -> bool:
    """Draw a 2-D t-SNE map (cosine distance) of features (N, D), one colour a class (labels (N,) int64).

    Returns False, and draws nothing, where there is nothing to map: fewer than 4 points, or all at one place.
    """
    from sklearn.manifold import TSNE

    if len(features) < 4 or torch.equal(features, features[:1].expand_as(features)):
        return False
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(features.numpy())
    shown = torch.unique(labels).tolist()
    figure, axes = _figure(8, 6.4)
    palette = colormaps["tab10" if len(shown) <= 10 else "tab20" if len(shown) <= 20 else "gist_ncar"]
    for place, number in enumerate(shown):
        color = palette(place if len(shown) <= 20 else place / len(shown))
        mine = points[(labels == number).numpy()]
        axes.scatter(*mine.T, s=7, color=color, alpha=0.75, linewidths=0, label=_name(classes[number]))
    if len(shown) <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=3, handletextpad=0.2)
    axes.set(title=f"Features of {len(features):,} test images (t-SNE), coloured by class", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.margins(0.02)
    _save(figure, path)
    return True


def neighbour_sheet(
    queries: Tensor, query_labels: Tensor, found: Tensor, found_labels: Tensor, classes: list[str], path: Path
) -> None:
    """Draw each query image (Q, C, H, W) uint8 with its nearest neighbours (Q, k, C, H, W) in a row.

    A green frame marks a neighbour of the query's class, a red frame another; labels are (Q,) and (Q, k).
    """
    rows, columns = found.shape[:2]
    width, height = 0.72 * (columns + 2.6), 0.72 * rows + 0.4
    figure = Figure(figsize=(width, height), facecolor="white")
    grid = figure.add_gridspec(rows, columns + 2, width_ratios=[1, 0.35] + [1] * columns, wspace=0.12, hspace=0.12)
    grid.update(left=0.15, right=1 - 0.08 / width, bottom=0.08 / height, top=1 - 0.32 / height)
    for row in range(rows):
        cells = [(0, queries[row], INK)]
        for column in range(columns):
            same = found_labels[row, column] == query_labels[row]
            cells.append((column + 2, found[row, column], RIGHT if same else WRONG))
        for column, image, color in cells:
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=color, linewidth=2)
            if column == 0:
                name = _name(classes[query_labels[row]])
                axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, color=INK, fontsize=10)
                if row == 0:
                    axes.set_title("query", fontsize=10, color=INK)
            elif column == 2 and row == 0:
                axes.set_title("nearest training images, best first", fontsize=10, color=INK, loc="left")
    _save(figure, path)


def _name(name: str) -> str:
    """Return a class's name as matplotlib shows it as it is: no formula, no hidden label."""
    shown = datasets.printable(name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set(color=INK, fontsize=12)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with files.replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
