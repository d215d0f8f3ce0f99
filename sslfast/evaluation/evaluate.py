"""`sslfast evaluate RUN`: what the encoder of a run has learnt, against raw pixels and the untrained encoder."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from sslfast.evaluation.linear import linear_probe
from sslfast.evaluation.neighbours import knn_accuracy, nearest
from sslfast.models import build_encoder
from sslfast.training import checkpoint, data, files
from sslfast.training.loop import load_images
from sslfast.training.options import UseOptions, Whole, check, check_device

PIXELS_AT_MOST = 32  # the raw-pixel baseline shrinks larger images to this size


@dataclasses.dataclass(kw_only=True)
class Evaluate(UseOptions):
    """Measure the encoder of a run by kNN and a linear probe, and draw pictures into the run's folder."""

    map_samples: Whole = 2500
    """Test images in the t-SNE map."""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast evaluate`; runs of ddpm and ssgan have judges, and options, of their own."""
    method = checkpoint.method_of(args)
    if method == "ddpm":
        from sslfast.evaluation import evaluate_ddpm

        return evaluate_ddpm.main(args)
    if method == "ssgan":
        from sslfast.evaluation import evaluate_gan

        return evaluate_gan.main(args)
    options = tyro.cli(Evaluate, args=args, prog="sslfast evaluate")
    check(options)
    evaluate(Path(options.run), options.device, options.map_samples, options.data, options.data_dir)


def evaluate(
    run: Path, device: str | None = None, map_samples: int = 2500, where: str = "", data_dir: str = ""
) -> dict[str, dict[str, float]]:
    """Print and return accuracies in percent, and write evaluation.json and three pictures into the run's folder.

    ``where`` and ``data_dir`` are --data and --data-dir, if the data lies elsewhere now. Data without classes or
    without a test split gives only the picture of the loss, and {}.
    """
    from sslfast.evaluation import plots

    config = checkpoint.load_config(run)
    device = device or config["device"]
    check_device(device)
    untrained, trained = load_encoder(run, trained=False), load_encoder(run)
    train, test = (load_images(config, split, where, data_dir) for split in ("train", "test"))
    plots.loss_curve(run / "metrics.jsonl", run / "loss.png")
    if (train.labels < 0).all() or (test.labels < 0).all():
        print(f"{config['data']} has no test images in class folders, by which features could be judged")
        return {}

    kinds = {
        "raw pixels": raw_pixels,
        "untrained encoder": encoder_features(untrained, device, config["precision"]),
        config["method"]: encoder_features(trained, device, config["precision"]),
    }
    start = time.monotonic()
    train_features, train_ids = extract(kinds, train, config["size"], config["workers"])
    test_features, test_ids = extract(kinds, test, config["size"], config["workers"])
    train_labels, test_labels = train.labels[train_ids], test.labels[test_ids]
    seconds = time.monotonic() - start
    print(f"features of {len(train_ids):,} training and {len(test_ids):,} test images: {seconds:.0f} s")

    for kind in kinds:  # cosine similarity depends on the origin: give every representation its best one
        mean = train_features[kind].mean(0)
        train_features[kind] -= mean
        test_features[kind] -= mean
    results = {}
    print(f"\n{'test accuracy, %':20s}{'kNN(10)':>10s}{'kNN(200)':>10s}{'linear':>10s}")
    for kind in kinds:
        sets = (train_features[kind], train_labels, test_features[kind], test_labels)
        knn = knn_accuracy(*sets)
        results[kind] = {"knn10": knn[10], "knn200": knn[200], "linear": linear_probe(*sets)}
        print(f"{kind:20s}" + "".join(f"{value:10.1f}" for value in results[kind].values()), flush=True)
    files.write_atomically(run / "evaluation.json", json.dumps(results, indent=2) + "\n")

    features, train_vectors = test_features[config["method"]], train_features[config["method"]]
    sample = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:map_samples]
    plots.embedding_map(features[sample], test_labels[sample], test.classes, run / "embedding.png")
    first = torch.stack([(test_labels == c).nonzero()[0, 0] for c in test_labels.unique()[:10]])
    index = nearest(features[first], train_vectors, min(10, len(train_ids)))[1]
    plots.neighbour_sheet(
        pictures(test, test_ids[first], config["size"]),
        test_labels[first],
        torch.stack([pictures(train, train_ids[row], config["size"]) for row in index]),
        train_labels[index],
        test.classes,
        run / "neighbours.png",
    )
    print(f"\npictures: {run}/loss.png, embedding.png, neighbours.png")
    return results


def load_encoder(run: Path | str, trained: bool = True) -> nn.Module:
    """Return the encoder of a run, in evaluation mode on the CPU; with ``trained=False`` as it was before training.

    It maps images in [-1, 1], (N, C, H, W), to features (N, F).
    """
    config = checkpoint.load_config(Path(run))
    with torch.random.fork_rng():
        torch.manual_seed(config["seed"])
        encoder, _ = build_encoder(config["encoder"], config["channels"])
    if trained:
        checkpoint.load_weights(Path(run), encoder=encoder)
    return encoder.eval()


def encoder_features(encoder: nn.Module, device: str, precision: str) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 images (n, C, H, W) to the encoder's features (n, F), float32 on the CPU."""
    encoder.to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def function(pixels: Tensor) -> Tensor:
        images = pixels.to(device, memory_format=torch.channels_last).float() / 127.5 - 1
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            return encoder(images).float().cpu()

    return function


def raw_pixels(pixels: Tensor) -> Tensor:
    """Return uint8 images (n, C, H, W) as vectors in [0, 1], shrunk to 32 pixels where they are larger."""
    images = pixels.float() / 255
    if pixels.shape[-1] > PIXELS_AT_MOST:
        images = F.interpolate(images, size=(PIXELS_AT_MOST, PIXELS_AT_MOST), mode="area")
    return images.flatten(1)


def extract(
    functions: dict[str, Callable[[Tensor], Tensor]], images: data.Images, size: int, workers: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Return ({name: features (N, F)}, row numbers (N,)): each function on every labelled image, in one pass."""
    found: dict[str, list[Tensor]] = {name: [] for name in functions}
    ids = []
    rows = (images.labels >= 0).nonzero()[:, 0].numpy()
    parts = [rows[start : start + 500] for start in range(0, len(rows), 500)]
    for pixels, chosen in data.batches(images, parts, workers, square=size):
        ids.append(chosen)
        assert isinstance(pixels, Tensor)
        for name, function in functions.items():
            found[name].append(function(pixels))
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(ids)


def pictures(images: data.Images, rows: Tensor, size: int) -> Tensor:
    """Return images (n, C, size, size) uint8 by row number."""
    pixels, _ = next(data.batches(images, [rows.numpy()], square=size))
    assert isinstance(pixels, Tensor)
    return pixels
