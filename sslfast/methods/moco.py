"""MoCo: contrast with the keys of a slowly moving encoder (v1: arXiv 1911.05722; v2: 2003.04297; v3: 2104.02057).

Every image is augmented twice. The encoder turns one view into a query, the key encoder the other into a key. No
gradient trains the key encoder: its weights are a moving average of the encoder's. InfoNCE asks each query to be more
similar to its own key than to all keys of past steps, which wait in a queue (v1, v2), or to the other keys of the batch
(v3, which has no queue, but a predictor behind the encoder, and uses each view once as query and once as key).

BatchNorm would give away which key belongs to a query if both were normalised among the same images. So queries and
keys pass it in groups, as on so many devices, and the keys in shuffled ones (section 3.3 of the first paper).
"""

import copy
import dataclasses
import math
from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast.distributed import all_gather, world_size
from sslfast.models import build_encoder, projection_head
from sslfast.ops.similarity_lse import similarity_lse
from sslfast.training import UserError, data, distributed, optimizers
from sslfast.training.average import update_average
from sslfast.training.loop import Loop, parse, rehearsal, start
from sslfast.training.options import MAY_CHANGE, EncoderOptions, Must, NotNegative, Share, at_least, at_most
from sslfast.transforms import MoCoV1Transform, MoCoV2Transform, MoCoV3Transform, RandomAugment

LEAST = 2  # images of a step: BatchNorm needs two


@dataclasses.dataclass(kw_only=True)
class MoCo(EncoderOptions):
    """Train an encoder on unlabelled images with MoCo, then evaluate it.

    Writes a folder: metrics.jsonl, TensorBoard events, checkpoints, and at the end accuracies and pictures. An option
    of 0 that explains its 0 follows the paper of the version, or for images of up to 64 pixels the authors' CIFAR-10
    recipe.

    Example: sslfast moco --data fashion-mnist --epochs 10
    """

    version: Literal[1, 2, 3] = 2
    """1: a linear head. 2: an MLP head, and blur in the augmentation of photographs. 3: no queue, a predictor, a
    momentum that rises to 1, and both views as queries."""
    queue: Annotated[int, at_least(0), at_most(2**24)] = 0
    """Keys of past steps that are negatives; 0: 65536, or 4096 for small images. Version 3 has none."""
    key_momentum: Share = 0.0
    """How much of its weights the key encoder keeps in a step; 0: 0.999, or 0.99 for small images and in version 3."""
    temperature: Annotated[float, Must("be 0 or at least 0.0001", lambda t: t == 0 or t >= 1e-4), at_most(1e4)] = 0.0
    """Temperature of the loss; 0: 0.07 in version 1, 0.2 in version 2, 1 in version 3, or 0.1 for small images."""
    symmetric: bool = False
    """Use each view once as query and once as key. Version 3 always does."""
    bn_groups: Annotated[int, at_least(0), at_most(2**20)] = 0
    """Groups of a batch that pass BatchNorm by themselves, shuffled for the keys, and dealt to the ranks, one to each
    at least; 0: 8, or 1 in version 3."""

    lr: Annotated[NotNegative, at_most(1e4), MAY_CHANGE] = 0.0
    """Learning rate at a batch of 256, which is multiplied by batch_size / 256; 0: 0.03, or 0.3 in version 3."""
    weight_decay: NotNegative = 5e-4
    """Weight decay of matrices and filters; biases and normalisation have none. The papers use 1e-4 for photographs."""


RECIPES: dict[int, dict[str, float]] = {
    1: {"queue": 65536, "key_momentum": 0.999, "temperature": 0.07, "lr": 0.03, "bn_groups": 8},
    2: {"queue": 65536, "key_momentum": 0.999, "temperature": 0.2, "lr": 0.03, "bn_groups": 8},
    3: {"queue": 0, "key_momentum": 0.99, "temperature": 1.0, "lr": 0.3, "bn_groups": 1},
}
SMALL_IMAGES = {"queue": 4096, "key_momentum": 0.99, "temperature": 0.1, "lr": 0.03, "bn_groups": 8}


def main(args: list[str] | None = None) -> None:
    """The command `sslfast moco`."""
    with distributed.session():
        config = parse(MoCo, "moco", args)
        run = train(config)
        main_rank = distributed.is_main()
    if run is None:
        raise SystemExit(130)  # as a shell reports a process that was interrupted
    if config.evaluate and main_rank:
        from sslfast.evaluation import evaluate

        evaluate.evaluate(run)


def train(config: MoCo) -> Path | None:
    """Train as ``config`` says and return the run's folder, or None if the person stopped it."""
    config, images = start(config, LEAST)
    config = settle(config, images)
    device = distributed.local_device(config.device)
    encoder, features = build_encoder(config.encoder, images.channels)
    head, predictor = build_heads(config, features)
    backbone = nn.Sequential(encoder, head)
    model = InGroups(backbone, predictor).to(device).to(memory_format=torch.channels_last)
    wrapped = distributed.wrap(model, config.sync_batchnorm)
    forward = torch.compile(wrapped) if config.compile else wrapped
    key_model = InGroups(copy.deepcopy(backbone)).requires_grad_(False)
    queue = Queue(config.queue, config.head_features).to(device)
    saved = nn.ModuleDict(OrderedDict(encoder=encoder, head=head, predictor=predictor, key=key_model, queue=queue))
    with rehearsal(config, images, model) as some:
        transform = build_transform(config, images.channels)
        model(transform(some, torch.arange(2), 0)[0].to(device))
    optimizer = optimizers.build(config.optimizer, model, config.lr, config.momentum, config.weight_decay)
    pairs = [(0, 1), (1, 0)] if config.symmetric else [(0, 1)]  # (the view of the queries, the view of the keys)

    top_rate = config.lr * config.batch_size / 256

    with Loop("moco", config, images, saved, {"optimizer": optimizer}) as loop:
        warmup_steps = round(config.warmup_epochs * loop.steps_per_epoch)
        for epoch, pixels, ids in loop.batches(least=LEAST):
            views = [view.to(device) for view in transform(pixels, ids, epoch)]
            rate = top_rate * optimizers.warmup_cosine(loop.step, loop.total_steps, warmup_steps)
            optimizers.set_learning_rate(optimizer, rate)
            update_average(key_model[0], backbone, key_momentum(config, loop.step / loop.total_steps))

            # BatchNorm needs two images in each group, also of a batch that unreadable files have made smaller.
            all_groups = min(config.bn_groups, len(ids) // 2 * world_size())
            groups = max(1, all_groups // world_size())
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                queries = forward(torch.cat([views[q] for q, _ in pairs]), groups * len(pairs)).float()
                keys = [encode_keys(key_model, views[k], all_groups, loop.step) for _, k in pairs]
            negatives = queue.keys if config.queue else None
            losses = [
                contrast(F.normalize(q), k, negatives, config.temperature)
                for q, k in zip(queries.chunk(len(pairs)), keys, strict=True)
            ]
            loss = torch.stack(losses).sum() * (2 * config.temperature if config.version == 3 else 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            queue.put(torch.cat(keys))
            loop.end_step(len(ids), loss=loss, lr=rate)
    return loop.result


@torch.no_grad()
def encode_keys(key_model: nn.Module, views: Tensor, groups: int, step: int) -> Tensor:
    """Return the normalised keys of all ranks' views, in the order of ranks: (N · ranks, features), float32.

    They pass BatchNorm in ``groups`` random parts of all ranks' views.
    """
    if groups == 1:
        return all_gather(F.normalize(key_model(views).float()))
    views = all_gather(views)
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(step))
    own = views[order[distributed.share(len(order))]]
    keys = key_model(own, max(1, groups // world_size())).float()
    return all_gather(F.normalize(keys))[order.argsort()]


def contrast(queries: Tensor, keys: Tensor, queue: Tensor | None, temperature: float) -> Tensor:
    """Return the InfoNCE loss of queries (N, D).

    Of ``keys`` (N · ranks, D), those of all ranks, the rank's own N belong to its queries, one to each. The others that
    they are contrasted with are the queue (K, D), or where there is none, all other keys.
    """
    own = distributed.share(len(keys))
    positives = (queries * keys[own]).sum(1) / temperature
    if queue is None:
        mine = torch.arange(own.start, own.stop, device=keys.device)
        others = similarity_lse(queries, keys, 1 / temperature, exclude=mine)
    else:
        others = similarity_lse(queries, queue, 1 / temperature)
    assert isinstance(others, Tensor)
    return F.softplus(others - positives).mean()  # log(exp(positive) + exp(others)) - positive


def key_momentum(config: MoCo, progress: float) -> float:
    """Return the momentum after a part of the training; in version 3 it rises to 1 along half a cosine."""
    if config.version < 3:
        return config.key_momentum
    return 1 - (1 - config.key_momentum) * (1 + math.cos(math.pi * progress)) / 2


class InGroups(nn.Sequential):
    """Modules through which a batch passes in groups, one after the other, as on so many devices."""

    def forward(self, images: Tensor, groups: int = 1) -> Tensor:
        return torch.cat([super(InGroups, self).forward(part) for part in images.tensor_split(groups)])


class Queue(nn.Module):
    """The last ``size`` keys, random ones at first: new keys take the places of the oldest, round and round."""

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, features: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, features)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def put(self, keys: Tensor) -> None:
        """Store keys (N, features); of more than ``size`` the last ``size``."""
        size = len(self.keys)
        if size:
            places = (self.position + torch.arange(len(keys), device=keys.device)) % size
            self.keys[places[-size:]] = keys[-size:]
            self.position.add_(len(keys)).remainder_(size)


def settle(config: MoCo, images: data.Images) -> MoCo:
    """Return the settings with nothing left open, or raise UserError where they cannot work."""
    values = SMALL_IMAGES if images.size <= 64 and config.version < 3 else RECIPES[config.version]
    recipe: dict[str, Any] = {name: getattr(config, name) or value for name, value in values.items()}
    config = dataclasses.replace(
        config,
        **recipe,
        symmetric=config.symmetric or config.version == 3,
    )
    if config.version == 3 and config.queue:
        raise UserError(f"--queue {config.queue}: version 3 has no queue")
    if config.batch_size < 2 * config.bn_groups:
        raise UserError(f"--bn-groups {config.bn_groups} needs a --batch-size of 2 for each, not {config.batch_size}")
    return config


def build_heads(config: MoCo, features: int) -> tuple[nn.Module, nn.Module]:
    """Return the head behind both encoders and the predictor behind the trained one, which only version 3 has."""
    hidden, out = config.head_hidden, config.head_features
    if config.version == 1:
        return nn.Linear(features, out), nn.Identity()
    if config.version == 2:
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)), nn.Identity()
    head, predictor = projection_head(features, hidden, out), projection_head(out, hidden, out)
    head[-1] = nn.BatchNorm1d(out, affine=False)
    return head, predictor[:-1]  # no normalisation at the end


def build_transform(config: MoCo, channels: int) -> RandomAugment:
    """Return the version's augmentation; small images are not blurred."""
    kind = {1: MoCoV1Transform, 2: MoCoV2Transform, 3: MoCoV3Transform}[config.version]
    return kind(
        config.size,
        scale=(config.crop_scale, 1.0),
        flip_p=config.flip,
        mean=[0.5] * channels,
        std=[0.5] * channels,
        memory_format=torch.channels_last,
        seed=config.seed,
        **({"blur_p": 0.0} if config.size <= 32 else {}),
    )
