"""Features of images, and how well they tell classes apart: kNN and a linear probe, against raw pixels and the like.

A function that gives features maps uint8 images (n, C, H, W) to float vectors (n, D) on the CPU.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslfast.evaluation.linear import linear_probe
from sslfast.evaluation.neighbours import knn_accuracy
from sslfast.training import data

Features = Callable[[Tensor], Tensor]

AT_ONCE = 500  # images
PIXELS_AT_MOST = 32  # the raw-pixel baseline shrinks larger images to this size


def raw_pixels(pixels: Tensor) -> Tensor:
    """Return uint8 images (n, C, H, W) as vectors in [0, 1], shrunk to 32 pixels where they are larger."""
    images = pixels.float() / 255
    if pixels.shape[-1] > PIXELS_AT_MOST:
        images = F.interpolate(images, size=(PIXELS_AT_MOST, PIXELS_AT_MOST), mode="area")
    return images.flatten(1)


def extract(
    functions: dict[str, Features], images: data.Images, size: int, workers: int = 0, rows: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return ({name: features (N, …)}, row numbers (N,)): each function on the images, in one pass.

    ``rows`` (int64) are by default those with a label. Files that cannot be decoded are left out: N may be smaller than
    what was asked for, and 0, with features (0, 0) then.
    """
    rows = (images.labels >= 0).nonzero()[:, 0] if rows is None else rows
    found: dict[str, list[Tensor]] = {name: [] for name in functions}
    ids = []
    for pixels, chosen in data.batches(images, [part.numpy() for part in rows.split(AT_ONCE)], workers, square=size):
        assert isinstance(pixels, Tensor)
        if not len(chosen):
            continue
        ids.append(chosen)
        for name, function in functions.items():
            found[name].append(function(pixels))
    if not ids:
        return {name: torch.empty(0, 0) for name in functions}, rows[:0]
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(ids)


def over_images(
    function: Features, images: data.Images, size: int, rows: Tensor, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (results (N, …), row numbers (N,)) of a function on images by row number; see `extract`."""
    with torch.inference_mode():
        results, ids = extract({"": function}, images, size, workers, rows)
    return results[""], ids


def have_labels(train: data.Images, test: data.Images) -> bool:
    """Return whether both splits have images of a known class, without which nothing can be judged by classes."""
    return bool((train.labels >= 0).any() and (test.labels >= 0).any())


def accuracies(
    functions: dict[str, Features],
    train: tuple[dict[str, Tensor], Tensor],
    test: tuple[dict[str, Tensor], Tensor],
    ks: Sequence[int] = (10, 200),
) -> dict[str, dict[str, float]]:
    """Print and return, for each kind of features, the test accuracy in percent of kNN and a linear probe.

    ``train`` and ``test`` are (features by kind, labels). Without test images, or without two classes to tell apart, it
    prints that and returns {}.
    """
    (known, known_labels), (unknown, unknown_labels) = train, test
    classes = len(known_labels.unique())
    if classes < 2 or not len(unknown_labels):
        print(f"\nno accuracies: classes that could be read: {classes}, test images: {len(unknown_labels)}")
        return {}
    results = {}
    width = max(20, *(len(kind) + 1 for kind in functions))
    print(f"\n{'test accuracy, %':{width}s}" + "".join(f"{f'kNN({k})':>10s}" for k in ks) + f"{'linear':>10s}")
    for kind in functions:
        sets = (known[kind], known_labels, unknown[kind], unknown_labels)
        results[kind] = {f"knn{k}": value for k, value in knn_accuracy(*sets, ks).items()}
        results[kind]["linear"] = linear_probe(*sets)
        print(f"{kind:{width}s}" + "".join(f"{value:10.1f}" for value in results[kind].values()), flush=True)
    return results


def centred(train: dict[str, Tensor], test: dict[str, Tensor]) -> None:
    """Subtract the mean of training features, in place: cosine similarity depends on the origin, and this one is good.

    Each representation gets its own.
    """
    for kind, known in train.items():
        if len(known) and len(test[kind]):
            mean = known.mean(0)
            known -= mean
            test[kind] -= mean
