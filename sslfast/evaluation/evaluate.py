"""`sslfast evaluate RUN`: what the encoder of a run has learnt, against raw pixels and the untrained encoder."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from sslfast.evaluation.features import accuracies, centred, extract, have_labels, raw_pixels
from sslfast.evaluation.neighbours import nearest
from sslfast.models import build_encoder
from sslfast.training import checkpoint, data, files
from sslfast.training.loop import load_images
from sslfast.training.options import UseOptions, Whole, check, check_device


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
    without a test split gives only the picture of the loss, and {}. Accuracies that mean nothing and pictures that
    cannot be drawn, for want of images or classes, are left out.
    """
    from sslfast.evaluation import plots

    config = checkpoint.load_config(run)
    device = device or config["device"]
    check_device(device)
    untrained, trained = load_encoder(run, trained=False), load_encoder(run)
    train, test = (load_images(config, split, where, data_dir) for split in ("train", "test"))
    plots.loss_curve(run / "metrics.jsonl", run / "loss.png")
    if not have_labels(train, test):
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
    centred(train_features, test_features)
    results = accuracies(kinds, (train_features, train_labels), (test_features, test_labels))
    files.write_atomically(run / "evaluation.json", json.dumps(results, indent=2) + "\n")

    features, train_vectors = test_features[config["method"]], train_features[config["method"]]
    drawn = ["loss.png"] if (run / "loss.png").exists() else []
    sample = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:map_samples]
    if plots.embedding_map(features[sample], test_labels[sample], test.classes, run / "embedding.png"):
        drawn.append("embedding.png")
    if len(train_ids) and len(test_ids):
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
        drawn.append("neighbours.png")
    left_out = {"embedding.png", "neighbours.png"} - set(drawn)
    print(f"\npictures: {run}/{', '.join(drawn)}")
    if left_out:
        print(f"not drawn, for want of images: {', '.join(sorted(left_out))}")
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


def pictures(images: data.Images, rows: Tensor, size: int) -> Tensor:
    """Return images (n, C, size, size) uint8 by row number; grey for files that cannot be read any more."""
    found = torch.full((len(rows), images.channels, size, size), 128, dtype=torch.uint8)
    for place, row in enumerate(rows):
        pixels, _ = next(data.batches(images, [row[None].numpy()], square=size))
        if len(pixels):
            found[place] = pixels[0]
    return found
