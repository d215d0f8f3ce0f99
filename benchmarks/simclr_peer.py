"""SimCLR by sslfast against the same training by lightly's loss and torchvision's transforms.

    python benchmarks/simclr_peer.py --epochs 2

All rows train the same encoder and head from the same weights, with the same batches, augmentation, optimizer and
schedule. The peer is written as its projects' examples are: one image at a time through torchvision.transforms.v2 in
DataLoader workers, then lightly's NTXentLoss; in float32, and in bfloat16 with channels_last as sslfast does itself.
Prints samples/s (of the whole run, from the end of its first ten steps) and test accuracy, and writes
benchmarks/results/simclr_peer.json.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch
import tyro
from lightly.loss import NTXentLoss
from torch import nn
from torchvision.transforms import v2

from sslfast.evaluation.evaluate import encoder_features, extract
from sslfast.evaluation.linear import linear_probe
from sslfast.evaluation.neighbours import knn_accuracy
from sslfast.methods import simclr
from sslfast.models import build_encoder, projection_head
from sslfast.training import data, files, optimizers
from sslfast.training.loop import best_precision

WARM_STEPS = 10


@dataclasses.dataclass
class Options:
    """Compare SimCLR of sslfast with lightly's loss and torchvision's transforms."""

    data: str = "fashion-mnist"
    """Data set, as for `sslfast simclr`; it must fit into memory."""
    epochs: int = 2
    """Epochs of each row."""
    batch_size: int = 512
    """Images a step."""
    workers: int = 2
    """DataLoader workers of the peer."""
    rows: tuple[str, ...] = ("sslfast", "peer bfloat16", "peer float32")
    """Which rows to run."""
    output: Path = Path(__file__).parent / "results" / "simclr_peer.json"
    """Where the figures go."""


class TwoViews(torch.utils.data.Dataset):
    def __init__(self, images: data.Images, config: simclr.SimCLR):
        self.images = images.source
        jitter = v2.ColorJitter(*[0.8 * config.color] * 3, 0.2 * config.color)
        self.chain = v2.Compose(
            [
                v2.RandomResizedCrop(images.size, scale=(config.crop_scale, 1.0)),
                v2.RandomHorizontalFlip(config.flip),
                v2.RandomApply([jitter], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.chain(self.images[row]), self.chain(self.images[row])


def train_peer(images: data.Images, config: simclr.SimCLR, bfloat16: bool, workers: int) -> tuple[nn.Module, float]:
    """Return (encoder, samples/s)."""
    torch.manual_seed(config.seed)
    encoder, features = build_encoder(config.encoder, images.channels)
    model = nn.Sequential(encoder, projection_head(features, config.head_hidden, config.head_features))
    layout = torch.channels_last if bfloat16 else torch.contiguous_format
    model.to(memory_format=layout)
    optimizer = torch.optim.SGD(
        optimizers.parameter_groups(model, config.weight_decay), lr=config.lr, momentum=config.momentum
    )
    criterion = NTXentLoss(config.temperature)
    loader = torch.utils.data.DataLoader(
        TwoViews(images, config), config.batch_size, shuffle=True, drop_last=True, num_workers=workers
    )
    step, total = 0, config.epochs * len(loader)
    warmup = round(config.warmup_epochs * len(loader))
    for _ in range(config.epochs):
        for views in loader:
            rate = config.lr * config.batch_size / 256 * optimizers.warmup_cosine(step, total, warmup)
            optimizers.set_learning_rate(optimizer, rate)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                vectors = model(torch.cat(views).to(memory_format=layout))
            loss = criterion(*vectors.float().chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == WARM_STEPS:
                start = time.perf_counter()
    return encoder.eval(), (total - WARM_STEPS) * config.batch_size / (time.perf_counter() - start)


def train_ours(config: simclr.SimCLR) -> tuple[nn.Module, float]:
    """Return (encoder, samples/s)."""
    from sslfast.evaluation.evaluate import load_encoder

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        simclr.train(dataclasses.replace(config, run=str(run)))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = [line["step"] * config.batch_size / line["samples_per_second"] for line in (lines[0], lines[-1])]
        steps = lines[-1]["step"] - lines[0]["step"]
        return load_encoder(run), steps * config.batch_size / (seconds[1] - seconds[0])


def main() -> None:
    options = tyro.cli(Options)
    train, test = data.load(options.data, "train"), data.load(options.data, "test")
    config = simclr.SimCLR(
        data=options.data,
        epochs=options.epochs,
        batch_size=options.batch_size,
        device="cpu",
        log_every=WARM_STEPS,
        size=train.size,
        evaluate=False,
    )
    results = {}
    for row in options.rows:
        if row == "sslfast":
            encoder, rate = train_ours(config)
        else:
            encoder, rate = train_peer(train, config, row == "peer bfloat16", options.workers)
        kinds = {row: encoder_features(encoder, "cpu", best_precision("cpu"))}
        (known, _), (unknown, _) = (extract(kinds, split, train.size) for split in (train, test))
        mean = known[row].mean(0)
        sets = (known[row] - mean, train.labels, unknown[row] - mean, test.labels)
        knn = knn_accuracy(*sets)
        results[row] = {"samples_per_second": rate, "knn10": knn[10], "knn200": knn[200], "linear": linear_probe(*sets)}
        print(f"{row:15s}" + "".join(f"{name} {value:8,.1f}   " for name, value in results[row].items()), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"data": options.data, "epochs": options.epochs, "batch_size": options.batch_size}
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": _cpu_name()}
    files.write_atomically(options.output, json.dumps({"settings": settings, "rows": results}, indent=2) + "\n")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
