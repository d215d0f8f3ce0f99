"""`sslfast evaluate RUN` of an ssgan run: how good its images are, and what its discriminator's features are worth."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image

from sslfast.evaluation import generative
from sslfast.evaluation.features import accuracies, centred, extract, raw_pixels
from sslfast.evaluation.gan import features_of, generate, latents_of, load_config, load_networks
from sslfast.evaluation.plots import gan_curves
from sslfast.evaluation.sheets import save_gif, save_png, sheet
from sslfast.training.loop import load_images
from sslfast.training.options import Seed, UseOptions, at_least, at_most, check


@dataclasses.dataclass(kw_only=True)
class EvaluateGAN(UseOptions):
    """Measure what a GAN draws by FID, KID, precision and recall, and its discriminator's features by kNN and probe.

    Writes evaluation.json, loss.png, samples.png and training.gif into the run's folder.
    """

    samples: Annotated[int, at_least(10), at_most(1_000_000)] = 10_000
    """Images to draw and to compare. FID falls with their number: compare only figures of one number."""
    seed: Seed = 0
    """Seed of the first image."""
    classifier: str = ""
    """The classifier by whose features images are compared, so that several runs are judged by the same; by default
    RUN/classifier.safetensors. Trained on the data, and written, if there is none."""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast evaluate` for a run of ssgan."""
    evaluate(tyro.cli(EvaluateGAN, args=args, prog="sslfast evaluate"))


def evaluate(options: EvaluateGAN) -> dict[str, Any]:
    """Print and return the figures of a run, and write them and the pictures into its folder.

    Data without classes or without test images gives only the pictures, and {}.
    """
    run = Path(options.run)
    config = load_config(run)
    check(options)
    trained, untrained = load_networks(run), load_networks(run, "untrained")
    for network in (*trained, *untrained):
        network.to(options.device)
    latents = latents_of(range(options.seed, options.seed + options.samples), config["latent"])
    images = generate(trained[0], latents, config["precision"])
    save_png(sheet(images[:100], 10), run / "samples.png")
    gan_curves(run / "metrics.jsonl", run / "loss.png")
    sheets = [Image.open(path) for path in sorted((run / "samples").glob("step-*.png"))]
    if sheets:
        save_gif(sheets, run / "training.gif")
    train, test = (load_images(config, split, options.data, options.data_dir) for split in ("train", "test"))
    if not generative.can_classify(train, test):
        print(
            f"{config['data']} has no test images in class folders, or one class alone: a GAN cannot be judged by them"
        )
        return {}

    path = Path(options.classifier or run / "classifier.safetensors")
    classifier, accuracy = generative.feature_classifier(path, train, test, config["size"], options.device)
    by = f"a classifier with {generative.percent(accuracy)} test accuracy, kept in {path}"
    print(f"{options.samples:,} images, by the features of {by}", flush=True)
    function = generative.classifier_features(classifier, options.device)
    results: dict[str, Any] = {"samples": options.samples, "features": by}
    known, _ = generative.over_images(function, train, config["size"], torch.arange(len(train)))
    judge = generative.judge_against(known, results, width=24)
    unseen = torch.arange(len(test))[: options.samples]
    judge("test images", generative.over_images(function, test, config["size"], unseen)[0])
    judge("generator", generative.over_pixels(function, images))
    noise = generate(untrained[0], latents, config["precision"])
    judge("untrained generator", generative.over_pixels(function, noise))

    kinds = {
        "raw pixels": raw_pixels,
        "untrained discriminator": features_of(untrained[1], config["precision"]),
        "discriminator": features_of(trained[1], config["precision"]),
    }
    known_features, known_ids = extract(kinds, train, config["size"], config["workers"])
    unknown_features, unknown_ids = extract(kinds, test, config["size"], config["workers"])
    centred(known_features, unknown_features)
    labels, unknown_labels = train.labels[known_ids], test.labels[unknown_ids]
    probed = accuracies(kinds, (known_features, labels), (unknown_features, unknown_labels))
    results |= {f"features: {kind}": row for kind, row in probed.items()}
    generative.write_results(run / "evaluation.json", results)
    print(f"\npictures: {run}/loss.png, samples.png{', training.gif' if sheets else ''}")
    return results


def probes(run: Path) -> dict[int, float]:
    """Return the accuracies of the discriminator's features over the training, by step."""
    path = run / "probes.json"
    return {int(step): value for step, value in json.loads(path.read_text()).items()} if path.exists() else {}
