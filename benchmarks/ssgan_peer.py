"""The training step of `sslfast ssgan` against the same networks and losses in plain PyTorch, float32.

    python benchmarks/ssgan_peer.py

Both train on the same data with the same batches, optimizer and moving average. The peer is what one writes first:
float32, PyTorch's memory layout, torch.rot90. The two take turns; printed are the medians and quartiles of steps a
second and of their ratio, which go to benchmarks/results/ssgan_peer.json.
"""

import copy
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import peers
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from sslfast.evaluation.gan import HEADS
from sslfast.gan import build_gan
from sslfast.methods import ssgan
from sslfast.training import data, files

WARM_STEPS = 10


@dataclasses.dataclass
class Options:
    """Compare steps a second of sslfast and of plain PyTorch."""

    data: str = "fashion-mnist"
    """Data set, as for `sslfast ssgan`; it must fit into memory."""
    variants: tuple[str, ...] = ("gan", "ssgan")
    """Which variants to compare."""
    networks: str = "small"
    """small or resnet."""
    batch_size: int = 64
    """Images a step."""
    steps: int = 60
    """Steps of a turn, of which the first 10 are not counted."""
    rounds: int = 5
    """Turns of each."""
    output: Path = Path(__file__).parent / "results" / "ssgan_peer.json"
    """Where the figures go."""


def ours(config: ssgan.SSGAN) -> float:
    """Return steps a second."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        ssgan.train(dataclasses.replace(config, run=str(run)))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = [line["step"] * config.batch_size / line["samples_per_second"] for line in (lines[0], lines[-1])]
        return (lines[-1]["step"] - lines[0]["step"]) / (seconds[1] - seconds[0])


def plain(config: ssgan.SSGAN, images: Tensor, steps: int) -> float:
    """Return steps a second."""
    torch.manual_seed(config.seed)
    heads = HEADS[config.variant]
    generator, discriminator = build_gan(config.networks, images.shape[2], images.shape[1], config.latent, **heads)
    average = copy.deepcopy(generator)
    adams = [torch.optim.Adam(net.parameters(), config.lr, betas=(0.0, 0.9)) for net in (generator, discriminator)]
    batch, quarter = config.batch_size, config.batch_size // 4

    def views(x: Tensor) -> Tensor:
        return x if config.variant == "gan" else torch.cat([peers.rotate4_rot90(x[:quarter])[0], x[quarter:]])

    labels = torch.arange(4).repeat_interleave(quarter)
    for step in range(steps):
        if step == WARM_STEPS:
            start = time.perf_counter()
        real = images[torch.randint(len(images), (batch,))].float() / 127.5 - 1
        with torch.no_grad():
            fake = generator(torch.randn(batch, config.latent))
        scores, logits = discriminator(torch.cat([views(real), views(fake)]))
        loss = sum(
            F.relu(1 + sign * (half if logits is None else torch.cat([half[:quarter], half[4 * quarter :]]))).mean()
            for sign, half in zip((-1, 1), scores.chunk(2), strict=True)
        )
        if logits is not None:
            loss = loss + config.beta * F.cross_entropy(logits[: 4 * quarter], labels)
        adams[1].zero_grad()
        loss.backward()
        adams[1].step()

        scores, logits = discriminator(views(generator(torch.randn(batch, config.latent))))
        loss = -(scores if logits is None else torch.cat([scores[:quarter], scores[4 * quarter :]])).mean()
        if logits is not None:
            loss = loss + config.alpha * F.cross_entropy(logits[: 4 * quarter], labels)
        adams[0].zero_grad()
        loss.backward()
        adams[0].step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), generator.parameters(), strict=True):
                slow.lerp_(fast, 1 - config.average)
        loss.item()
    return (steps - WARM_STEPS) / (time.perf_counter() - start)


def main() -> None:
    options = tyro.cli(Options)
    train = data.load(options.data, "train")
    few = data.Images(train.source[: options.steps * options.batch_size], train.labels, train.classes)
    data.load_for = lambda *_: few  # one epoch is a turn
    rows = {}
    for variant in options.variants:
        config = ssgan.SSGAN(
            data=options.data,
            variant=variant,
            networks=options.networks,
            batch_size=options.batch_size,
            epochs=1,
            device="cpu",
            log_every=WARM_STEPS,
            reports=0,
        )
        rates: dict[str, list[float]] = {"sslfast": [], "plain PyTorch": []}
        for _ in range(options.rounds):
            rates["sslfast"].append(ours(config))
            rates["plain PyTorch"].append(plain(config, few.source, options.steps))
        rates["ratio"] = [a / b for a, b in zip(*rates.values(), strict=True)]
        rows[variant] = {name: statistics.quantiles(x, n=4, method="inclusive") for name, x in rates.items()}
        for name, (low, median, high) in rows[variant].items():
            print(f"{variant:12s}{name:16s}{median:8.2f} ({low:.2f}–{high:.2f})", flush=True)
    settings = {"data": options.data, "networks": options.networks, "batch_size": options.batch_size}
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": _cpu_name()}
    settings["unit"] = "steps of both networks a second: lower quartile, median, upper quartile"
    files.write_atomically(options.output, json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
