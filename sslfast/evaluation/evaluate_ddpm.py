"""`sslfast evaluate RUN` of a DDPM: how good its images are, whether it copies, and what its features are worth."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from sslfast.evaluation import generative, plots, sampling
from sslfast.evaluation.evaluate import pictures
from sslfast.evaluation.features import accuracies, centred, extract, have_labels, raw_pixels
from sslfast.evaluation.neighbours import nearest
from sslfast.evaluation.sheets import save_png, sheet
from sslfast.ops import q_sample
from sslfast.training import UserError, data
from sslfast.training.loop import load_images
from sslfast.training.options import Count, Seed, UseOptions, Whole, at_least, at_most, check

UNTRAINED = 500  # images of the untrained network: enough for a ceiling


@dataclasses.dataclass(kw_only=True)
class EvaluateDDPM(UseOptions):
    """Measure what a DDPM draws by FID, KID, precision and recall, and its features by a linear probe.

    Writes evaluation.json, loss.png, samples.png and neighbours.png into the run's folder.
    """

    samples: Annotated[int, at_least(10), at_most(1_000_000)] = 2000
    """Images to draw and to compare. FID falls with their number: compare only figures of one number."""
    steps: Count = 50
    """Steps of the sampler."""
    sampler: sampling.Sampler = "ddim"
    """ddim, ddpm or dpm-solver++."""
    guidance: float = 1.0
    """Classifier-free guidance, for runs with --conditional."""
    seed: Seed = 0
    """Seed of the first image."""
    features: Literal["classifier", "inception"] = "classifier"
    """By what to compare images: a small classifier, trained on the data at first, or FID's Inception network."""
    classifier: str = ""
    """The classifier's file, so that several runs are judged by the same; by default RUN/classifier.safetensors."""
    inception_weights: str = "pt_inception-2015-12-05-6726825d.pth"
    """torch-fidelity's weights of the Inception network."""
    probe_timestep: Whole = 50
    """Noise, as a timestep, that images get before the network turns them into features."""
    batch_size: Count = 100
    """Images drawn at once."""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast evaluate` for a run of ddpm."""
    evaluate(tyro.cli(EvaluateDDPM, args=args, prog="sslfast evaluate"))


def evaluate(options: EvaluateDDPM) -> dict[str, Any]:
    """Print and return the figures of a run, and write them and three pictures into its folder.

    What cannot be measured for want of images or classes is left out.
    """
    run = Path(options.run)
    config = sampling.load_config(run)
    check(options)
    sampling.make_scheduler(config, options.sampler, options.steps)
    sampling.load_unet(run)
    if options.probe_timestep >= config["timesteps"]:
        raise UserError(f"--probe-timestep must be below {config['timesteps']}, not {options.probe_timestep}")
    plots.loss_curve(run / "metrics.jsonl", run / "loss.png")
    train, test = (load_images(config, split, options.data, options.data_dir) for split in ("train", "test"))
    results: dict[str, Any] = {"samples": options.samples, "steps": options.steps, "sampler": options.sampler}

    size = config["size"]
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    unseen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: options.samples]
    images = draw(options, config, "average", options.samples)
    if options.features == "classifier" and not generative.can_classify(train, test):
        print(
            f"{config['data']} has no test images in class folders, or one class alone: there is no classifier, and no "
            "FID, but --features inception"
        )
    else:
        function, results["features"] = features(options, config, train, test)
        known, _ = generative.over_images(function, train, size, rows[:50_000])
        print(f"\n{options.samples:,} images each against {len(known):,} training images, by {results['features']}")
        judge = generative.judge_against(known, results, width=18)
        judge("test images", generative.over_images(function, test, size, unseen)[0])
        judge("average weights", generative.over_pixels(function, images))
        judge("raw weights", generative.over_pixels(function, draw(options, config, "raw", options.samples)))
        untrained = draw(options, config, "untrained", min(UNTRAINED, options.samples))
        judge("untrained", generative.over_pixels(function, untrained))

    columns = len(config["classes"]) if config["conditional"] else 10
    save_png(sheet(images[: 10 * columns], columns), run / "samples.png")
    drawn = [name for name in ("loss.png", "samples.png") if (run / name).exists()]
    if nearby := neighbours(images, train, test, rows, unseen, size, run / "neighbours.png"):
        results["nearest"] = nearby
        drawn.append("neighbours.png")
        print(
            "\nsimilarity to the nearest training image, median: "
            + ", ".join(f"{name} {value:.3f}" for name, value in nearby.items())
        )
    if have_labels(train, test):
        results["probe"] = probe(options, config, train, test)
    generative.write_results(run / "evaluation.json", results)
    print(f"\npictures: {run}/{', '.join(drawn)}")
    return results


def features(
    options: EvaluateDDPM, config: dict[str, Any], train: data.Images, test: data.Images
) -> tuple[generative.Features, str]:
    """Return the function by which images are compared, and what to call it."""
    if options.features == "inception":
        return generative.inception_features(Path(options.inception_weights), options.device), "Inception's features"
    path = Path(options.classifier or Path(options.run) / "classifier.safetensors")
    return features_of_classifier(path, train, test, config["size"], options.device)


def features_of_classifier(
    path: Path, train: data.Images, test: data.Images, size: int, device: str
) -> tuple[generative.Features, str]:
    """Return the function, and what to call it, of a classifier's file, which is written where it is missing."""
    new = not path.exists()
    model, accuracy = generative.feature_classifier(path, train, test, size, device)
    name = f"features of a classifier with {generative.percent(accuracy)} test accuracy"
    print(f"{name} ({'trained and ' if new else ''}kept in {path})", flush=True)
    return generative.classifier_features(model, device), name


def draw(
    options: EvaluateDDPM, config: dict[str, Any], weights: Literal["average", "raw", "untrained"], n: int
) -> Tensor:
    """Return n images (n, C, H, W) uint8."""
    unet = sampling.load_unet(Path(options.run), weights).to(options.device)
    scheduler = sampling.make_scheduler(config, options.sampler, options.steps)
    seeds = options.seed + torch.arange(n, device=options.device)
    classes = seeds % len(config["classes"]) if config["conditional"] else None
    noise = scheduler.initial_noise(seeds, sampling.noise_shape(config))
    found = []
    parts = torch.arange(n).split(options.batch_size)
    for part in tqdm(parts, desc=f"{weights} weights", unit="batch", disable=None, leave=False, dynamic_ncols=True):
        own = None if classes is None else classes[part]
        model = sampling.predictor(unet, config["precision"], own, options.guidance)
        found.append(sampling.to_pixels(sampling.generate(model, scheduler, noise[part], seeds[part]), config["patch"]))
    return torch.cat(found)


def neighbours(
    images: Tensor, train: data.Images, test: data.Images, rows: Tensor, unseen: Tensor, size: int, path: Path
) -> dict[str, float]:
    """Draw images beside the training images most like them, so that copies would show; return median similarities.

    Similarity is the correlation of pixels: 1 for a copy. Test images tell what is usual. Without training images that
    can be read it draws nothing and returns {}.
    """
    keys, known = generative.over_images(raw_pixels, train, size, rows[:20_000])
    if not len(known):
        return {}
    mean = keys.mean(0)
    similarity, index = nearest(raw_pixels(images) - mean, keys - mean, min(8, len(keys)))
    medians = {"generated": similarity[:, 0].median().item()}
    others, _ = generative.over_images(raw_pixels, test, size, unseen)
    if len(others):
        medians["test images"] = nearest(others - mean, keys - mean, 1)[0].median().item()
    shown = []
    for image, found in zip(images[:10], index[:10], strict=True):
        shown += [image[None], torch.full_like(image[None], 255), pictures(train, known[found], size)]
    save_png(sheet(torch.cat(shown), 2 + index.shape[1]), path)
    return medians


def probe(options: EvaluateDDPM, config: dict[str, Any], train: data.Images, test: data.Images) -> dict[str, Any]:
    """Print and return the accuracy in percent of kNN and a linear probe on features of the U-Net's middle."""
    kinds = {
        "raw pixels": raw_pixels,
        "untrained U-Net": unet_features(options, config, "untrained"),
        f"ddpm, t = {options.probe_timestep}": unet_features(options, config, "average"),
    }
    known, known_ids = extract(kinds, train, config["size"], config["workers"])
    unknown, unknown_ids = extract(kinds, test, config["size"], config["workers"])
    centred(known, unknown)
    return accuracies(kinds, (known, train.labels[known_ids]), (unknown, test.labels[unknown_ids]), ks=(10,))


def unet_features(
    options: EvaluateDDPM, config: dict[str, Any], weights: Literal["average", "untrained"]
) -> generative.Features:
    """Return the function from uint8 images (n, C, H, W) to the U-Net's middle, averaged over quadrants: (n, 4·width).

    Images get the noise of ``probe_timestep``, the same in every call; the class is withheld.
    """
    device = options.device
    unet = sampling.load_unet(Path(options.run), weights).to(device)
    alphas_cumprod = sampling.make_scheduler(config, "ddpm", 1).alphas_cumprod.to(device)

    @torch.inference_mode()
    def function(pixels: Tensor) -> Tensor:
        x0 = F.pixel_unshuffle(pixels.to(device).float() / 127.5 - 1, config["patch"])
        seeds = torch.arange(len(x0), device=device)
        noisy, _ = q_sample(x0, torch.full_like(seeds, options.probe_timestep), alphas_cumprod, seeds=seeds)
        nothing = torch.full_like(seeds, len(config["classes"])) if config["conditional"] else None
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config["precision"] == "bfloat16"):
            middle = unet.middle(noisy.contiguous(memory_format=torch.channels_last), options.probe_timestep, nothing)
        return F.adaptive_avg_pool2d(middle.float(), 2).flatten(1).cpu()

    return function
