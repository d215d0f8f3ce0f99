"""DDPM by sslfast against the same by diffusers: sampling, a training step, and a training of equal time.

    python benchmarks/ddpm_peer.py                        # speed: a few minutes
    python benchmarks/ddpm_peer.py --train                # and a training of each: an hour on two cores

Both sides have the same network with the same weights. The peer is written as its project's own examples are: a
`UNet2DModel` in float32, `DDIMPipeline`, and the training step of examples/unconditional_image_generation (noise,
add_noise, mean squared error, clipping, AdamW, EMA), with the example's rates and noise schedule. Sides take turns,
round after round; printed are medians and quartiles of the ratios within a round, which go into
benchmarks/results/ddpm_peer.json.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import tyro
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from sslfast.evaluation import generative, sampling
from sslfast.evaluation.evaluate_ddpm import features_of_classifier
from sslfast.methods import ddpm
from sslfast.ops import diffusion_loss, q_sample
from sslfast.schedulers import DDIMScheduler
from sslfast.training import data, files, optimizers
from sslfast.training.average import update_average
from sslfast.training.loop import best_precision
from sslfast.unet import UNet, from_diffusers


@dataclasses.dataclass
class Options:
    """Compare DDPM of sslfast with diffusers."""

    train: bool = False
    """Also train both for equal time, and compare FID."""
    data: str = "fashion-mnist"
    """Data set of the training."""
    epochs: int = 3
    """Epochs of sslfast; the peer gets the seconds that they took."""
    run: Path = Path("runs/ddpm-peer")
    """Where the training of sslfast is kept: a new folder."""
    batch_size: int = 64
    """Images a step, and images sampled at once."""
    size: int = 32
    """Height and width of the images of the speed rows."""
    widths: tuple[int, ...] = (64, 64, 64)
    """Channels of each resolution."""
    steps: int = 50
    """Steps of DDIM."""
    samples: int = 2000
    """Images of each model to compare with the data."""
    rounds: int = 10
    """Rounds of the training step; sampling gets a third of them."""
    output: Path = Path(__file__).parent / "results" / "ddpm_peer.json"
    """Where the figures go."""


def peer_network(options: Options, size: int) -> diffusers.UNet2DModel:
    levels = len(options.widths)
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=options.widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        attention_head_dim=min(64, options.widths[-1]),
        norm_num_groups=8,
    )


def sampling_rows(options: Options) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    theirs = peer_network(options, options.size).eval()
    ours = from_diffusers(theirs).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    pipeline = diffusers.DDIMPipeline(unet=theirs, scheduler=diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    seeds, shape = torch.arange(options.batch_size), (1, options.size, options.size)

    def sslfast(precision: str) -> Tensor:
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(options.steps)
        noise = scheduler.initial_noise(seeds, shape)
        return sampling.generate(sampling.predictor(ours, precision), scheduler, noise, seeds)

    return {
        "sslfast": lambda: sslfast(best_precision("cpu")),
        "sslfast float32": lambda: sslfast("float32"),
        "diffusers": lambda: pipeline(
            batch_size=options.batch_size, num_inference_steps=options.steps, output_type="np"
        ),
    }


def our_step(unet: UNet, precision: str) -> Callable[[Tensor], Tensor]:
    """The step of sslfast/methods/ddpm.py."""
    average = from_unet(unet)
    alphas_cumprod = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    optimizer = torch.optim.AdamW(optimizers.parameter_groups(unet, 0.01), lr=1e-4, fused=True)
    step = 0

    def run(images: Tensor) -> Tensor:
        nonlocal step
        timesteps, seeds = torch.randint(0, 1000, (len(images),)), torch.arange(len(images))
        kind = {"prediction_type": "v_prediction"}
        noisy, target = q_sample(images, timesteps, alphas_cumprod, seeds=seeds, step=step, **kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            predicted = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps)
        loss = diffusion_loss(predicted.float(), target, timesteps, alphas_cumprod, snr_gamma=5.0, **kind)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        update_average(average, unet, 0.999)
        step += 1
        return loss

    return run


def from_unet(unet: UNet) -> UNet:
    copy = UNet(**unet.settings)
    copy.load_state_dict(unet.state_dict())
    return copy.requires_grad_(False).to(memory_format=torch.channels_last)


def peer_step(model: diffusers.UNet2DModel, total_steps: int) -> tuple[Callable[[Tensor], Tensor], EMAModel]:
    """The step of diffusers' example, with its defaults."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_cosine_schedule_with_warmup(optimizer, min(500, total_steps // 10), total_steps)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def run(images: Tensor) -> Tensor:
        noise = torch.randn(images.shape)
        timesteps = torch.randint(0, 1000, (len(images),)).long()
        noisy = scheduler.add_noise(images, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps).sample.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        return loss

    return run, average


def step_rows(options: Options) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    theirs = peer_network(options, options.size)
    images = torch.rand(options.batch_size, 1, options.size, options.size) * 2 - 1
    rows: dict[str, Callable[[], object]] = {}
    for name, precision in (("sslfast", best_precision("cpu")), ("sslfast float32", "float32")):
        step = our_step(from_diffusers(theirs).to(memory_format=torch.channels_last), precision)
        rows[name] = lambda step=step: step(images)
    peer, _ = peer_step(theirs, 10_000)
    rows["diffusers"] = lambda: peer(images)
    return rows


def race(rows: dict[str, Callable[[], object]], rounds: int, items: int) -> dict[str, dict[str, float]]:
    """Return, by row: items a second, and the median and quartiles of how much faster than the last row it is."""
    for run in rows.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    *_, peer = times.values()
    results = {}
    for name, own in times.items():
        ratios = [theirs / ours for theirs, ours in zip(peer, own, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        results[name] = {
            "per_second": items / statistics.median(own),
            "ratio": middle,
            "ratio_quartiles": [low, high],
        }
        print(
            f"  {name:16s}{results[name]['per_second']:9.1f} images/s {middle:7.2f}x  ({low:.2f} to {high:.2f})",
            flush=True,
        )
    return results


def train_peer(options: Options, images: data.Images, seconds: float) -> tuple[UNet, UNet, int]:
    """Return (averaged, raw, steps): diffusers' example, as many steps as it makes in so many seconds."""
    torch.manual_seed(0)
    model = peer_network(options, images.size)
    assert isinstance(images.source, Tensor)
    warm, _ = peer_step(peer_network(options, images.size), 100)
    batch = images.source[: options.batch_size].float() / 127.5 - 1
    start = time.perf_counter()
    for _ in range(10):
        warm(batch)
    planned = max(10, int(seconds / ((time.perf_counter() - start) / 10)))  # its cosine needs to know the end
    step, average = peer_step(model, planned)
    start, done, epoch = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds:
        order = torch.from_numpy(data.epoch_order(len(images), 0, epoch))
        for chosen in order.split(options.batch_size):
            step(images.source[chosen].float() / 127.5 - 1)
            done += 1
            if time.perf_counter() - start > seconds:
                break
        epoch += 1
    raw = from_diffusers(model)
    average.copy_to(model.parameters())
    return from_diffusers(model), raw, done


def training(options: Options) -> dict[str, dict[str, float]]:
    """Train both for equal time; return FID and KID by the same classifier, of averaged and raw weights."""
    config = ddpm.DDPM(
        data=options.data,
        epochs=options.epochs,
        batch_size=options.batch_size,
        widths=options.widths,
        blocks=1,
        attention=(len(options.widths) - 1,),
        device="cpu",
        run=str(options.run),
        evaluate=False,
    )
    start = time.perf_counter()
    ddpm.train(config)
    seconds = time.perf_counter() - start
    settings = sampling.load_config(options.run)
    kinds = ("average", "raw", "untrained")
    models = {f"sslfast, {kind}": (sampling.load_unet(options.run, kind), settings) for kind in kinds}
    train, test = (data.load(options.data, split) for split in ("train", "test"))
    averaged, raw, steps = train_peer(options, train, seconds)
    theirs = settings | {"schedule": "linear", "prediction": "epsilon"}
    models |= {"diffusers, average": (averaged, theirs), "diffusers, raw": (raw, theirs)}
    function, name = features_of_classifier(options.run / "classifier.safetensors", train, test, train.size, "cpu")
    known, _ = generative.over_images(function, train, train.size, torch.arange(len(train)))
    print(f"{seconds:.0f} s of training each ({steps} steps of diffusers); {options.samples} images, {name}")
    results = {}
    for row, (unet, own) in models.items():
        images = sample(unet, own, options)
        results[row] = generative.compare(known, generative.over_pixels(function, images))
        print(f"  {row:20s}" + "".join(f"{key} {value:8.3f}   " for key, value in results[row].items()), flush=True)
    return results | {"seconds": {"each": seconds}, "steps": {"diffusers": steps}}


def sample(unet: UNet, config: dict, options: Options) -> Tensor:
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    scheduler = sampling.make_scheduler(config, "ddim", options.steps)
    seeds = torch.arange(options.samples)
    noise = scheduler.initial_noise(seeds, sampling.noise_shape(config))
    model = sampling.predictor(unet, best_precision("cpu"))
    parts = [sampling.generate(model, scheduler, part) for part in noise.split(100)]
    return sampling.to_pixels(torch.cat(parts), config["patch"])


def main() -> None:
    options = tyro.cli(Options)
    count = sum(p.numel() for p in peer_network(options, options.size).parameters())
    print(
        f"a network of {count / 1e6:.2f} million parameters, images of {options.size} pixels, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"sampling {options.batch_size} images by DDIM in {options.steps} steps:")
    results: dict[str, dict] = {
        "sampling": race(sampling_rows(options), max(3, options.rounds // 3), options.batch_size)
    }
    print(f"training steps of {options.batch_size} images:")
    results["step"] = race(step_rows(options), options.rounds, options.batch_size)
    write(options, results, count)
    if options.train:
        results["training"] = training(options)
        write(options, results, count)


def write(options: Options, results: dict[str, dict], parameters: int) -> None:
    settings = {k: v for k, v in dataclasses.asdict(options).items() if not isinstance(v, Path)}
    settings |= {"parameters": parameters, "threads": torch.get_num_threads()}
    settings |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(options.output, json.dumps({"settings": settings, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
