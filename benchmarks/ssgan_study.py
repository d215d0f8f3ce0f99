"""Does self-supervision help? FID and features of gan, ssgan, ssgan-la and ssgan-la+ over several seeds.

    python benchmarks/ssgan_study.py                    all variants, three seeds: half an hour each on two cores
    python benchmarks/ssgan_study.py --epochs 2 --seeds 1 --variants gan ssgan
    python benchmarks/ssgan_study.py --only-report      table and plot of the runs that are there

Runs are kept in runs/study/VARIANT-SEED: started again, the study goes on where it was stopped, bit for bit. All are
judged by the same classifier, which is trained first. Writes benchmarks/results/ssgan_study.json, a table
(ssgan_study.md: mean and standard deviation over the seeds) and a plot (ssgan_forgetting.png: the accuracy of a linear
probe on the discriminator's features over the training, the "forgetting" of arXiv 1811.11212).
"""

import dataclasses
import json
import statistics
from pathlib import Path

import tyro

from sslfast.evaluation import evaluate_gan, plots
from sslfast.methods.ssgan import SSGAN, Variant, train
from sslfast.training import UserError, checkpoint, files

RESULTS = Path(__file__).parent / "results"
FIGURES = {
    "FID": ("generator", "fid"),
    "KID": ("generator", "kid"),
    "precision": ("generator", "precision"),
    "recall": ("generator", "recall"),
    "linear probe, %": ("features: discriminator", "linear"),
    "kNN(10), %": ("features: discriminator", "knn10"),
}


@dataclasses.dataclass
class Options:
    """Train every variant with every seed, judge all, and write a table and a plot."""

    data: str = "fashion-mnist"
    """Data set, as for `sslfast ssgan`."""
    variants: tuple[Variant, ...] = ("gan", "ssgan", "ssgan-la", "ssgan-la+")
    """Which variants to compare."""
    seeds: int = 3
    """Runs of each variant."""
    epochs: int = SSGAN.epochs
    """Epochs of each run."""
    samples: int = 10_000
    """Generated images that are compared with the training images."""
    folder: Path = Path("runs/study")
    """Where the runs are kept."""
    results: Path = RESULTS
    """Where table and plot go."""
    only_report: bool = False
    """Train nothing: report on the runs that have been judged."""


def main() -> None:
    options = tyro.cli(Options)
    runs = {v: [options.folder / f"{v}-{seed}" for seed in range(options.seeds)] for v in options.variants}
    if not options.only_report:
        for seed in range(options.seeds):  # a whole round of variants before the next seed
            for variant in options.variants:
                train_and_judge(options, variant, seed, runs[variant][seed])
    report(options, runs)


def train_and_judge(options: Options, variant: Variant, seed: int, run: Path) -> None:
    if (run / "evaluation.json").exists():
        return
    print(f"\n{run}", flush=True)
    config = SSGAN(data=options.data, variant=variant, seed=seed, epochs=options.epochs, run=str(run))
    if (run / "config.json").exists():
        settings = checkpoint.load_config(run)
        saved = {field.name: settings[field.name] for field in dataclasses.fields(SSGAN)}
        config = SSGAN(**saved | {"resume": str(run)})
    if train(config) is None:
        raise SystemExit(130)
    classifier = str(options.folder / "classifier.safetensors")
    evaluate_gan.evaluate(evaluate_gan.EvaluateGAN(run=str(run), samples=options.samples, classifier=classifier))


def report(options: Options, runs: dict[Variant, list[Path]]) -> None:
    """Write the table, the plot and the figures of the runs that have been judged."""
    found, curves = {}, {}
    for variant, folders in runs.items():
        judged = [folder for folder in folders if (folder / "evaluation.json").exists()]
        if judged:
            found[variant] = [json.loads((folder / "evaluation.json").read_text()) for folder in judged]
            curves[variant] = [evaluate_gan.probes(folder) for folder in judged]
    if not found:
        raise UserError(f"{options.folder} has no run that was judged")
    lines = ["| | seeds | " + " | ".join(FIGURES) + " |", "|" + " --- |" * (len(FIGURES) + 2)]
    for variant, results in found.items():
        cells = [spread([result[of][name] for result in results]) for of, name in FIGURES.values()]
        lines.append(f"| {variant} | {len(results)} | " + " | ".join(cells) + " |")
    first = next(iter(found.values()))[0]
    others = {"untrained generator": "untrained generator", "test images": "test images"}
    text = "\n".join(lines) + "\n\n"
    for name, key in others.items():
        fid = spread([result[key]["fid"] for results in found.values() for result in results])
        text += f"FID of {name}: {fid}. "
    features = first["features"].partition(",")[0]  # without the path
    text += f"{first['samples']:,} images each, by the features of {features}; mean ± standard deviation.\n"
    options.results.mkdir(parents=True, exist_ok=True)
    files.write_atomically(options.results / "ssgan_study.md", text)
    files.write_atomically(options.results / "ssgan_study.json", json.dumps(found, indent=1) + "\n")
    plots.probe_curves(curves, options.results / "ssgan_forgetting.png")
    print(f"\n{text}\n{options.results}: ssgan_study.md, ssgan_study.json, ssgan_forgetting.png")


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4g}"
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


if __name__ == "__main__":
    main()
