"""How good generated images are: FID, KID, precision and recall, and what they look like beside the training images.

Everything here takes features, (N, D) float tensors. They come from a small classifier trained on the data itself
(`feature_classifier`), or from the Inception network of the papers for those who have its weights
(`inception_features`). Numbers by different features, or by different numbers of images, cannot be compared.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast.evaluation.features import Features, have_labels, over_images
from sslfast.models import SmallEncoder
from sslfast.training import UserError, data, failures, files, optimizers

FEATURES = 128
LEAST_STEPS = 150  # of the classifier's training, on small data
KID_SUBSETS = 50
LEAST_ROWS = 4  # of what is compared


class Classifier(nn.Module):
    """A small convolutional classifier: images in [-1, 1], (N, C, H, W), even H and W -> logits (N, classes)."""

    def __init__(self, channels: int, classes: int, width: int = 32):
        super().__init__()
        self.encoder = SmallEncoder(channels, width)
        self.hidden = nn.Linear(self.encoder.features, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer, (N, 128)."""
        return F.relu(self.hidden(self.encoder(images)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def feature_classifier(
    path: Path, train: data.Images, test: data.Images, size: int, device: str = "cpu", epochs: int = 4
) -> tuple[Classifier, float]:
    """Return (classifier, test accuracy in percent), read from ``path`` or, the first time, trained and written there.

    The accuracy is NaN if no test image can be read. The file's metadata tell what data it was trained on. Raises
    UserError for data without labels and for a file of other data.
    """
    if not can_classify(train, test):
        raise UserError("the classifier that judges images needs classes and test images: try --features inception")
    shape = {"channels": str(train.channels), "classes": str(len(train.classes)), "size": str(size)}
    model = Classifier(train.channels, len(train.classes))
    if path.exists():
        try:
            with safetensors.safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
            if {name: facts.get(name) for name in shape} != shape:
                raise UserError(f"{path} is a classifier of other images ({facts}) than these ({shape})")
            model.load_state_dict(weights)
            return model.to(device).eval(), float(facts["accuracy"])
        except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError) as error:
            reason = failures.line(error)
            raise UserError(f"{path} is no classifier, or damaged: remove it, or name another ({reason})") from None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(train.channels, len(train.classes)).to(device)
        _train(model, train, size, device, epochs)
    model.eval()
    rows = (test.labels >= 0).nonzero()[:, 0]
    logits, ids = over_images(lambda pixels: model(_normalised(pixels, device)).cpu(), test, size, rows)
    accuracy = 100 * (logits.argmax(1) == test.labels[ids]).float().mean().item() if len(ids) else math.nan
    facts = shape | {"accuracy": f"{accuracy:.2f}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        file.write(safetensors.torch.save(model.state_dict(), metadata=facts))
    return model, accuracy


def percent(accuracy: float) -> str:
    return "unknown" if math.isnan(accuracy) else f"{accuracy:.1f} %"


def can_classify(train: data.Images, test: data.Images) -> bool:
    """Return whether `feature_classifier` has something to learn: two classes, and test images with labels."""
    return have_labels(train, test) and len(train.labels[train.labels >= 0].unique()) > 1


def _train(model: Classifier, images: data.Images, size: int, device: str, epochs: int) -> None:
    """Some epochs of AdamW along one cosine, with pictures shifted by up to a pixel or two."""
    rows = (images.labels >= 0).nonzero()[:, 0]
    batch = min(256, len(rows))
    steps = max(epochs * (len(rows) // batch), LEAST_STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    step = 0
    for epoch in itertools.count():
        before = step
        order = rows[torch.from_numpy(data.epoch_order(len(rows), 0, epoch))]
        chosen = [part.numpy() for part in order.split(batch) if len(part) == batch]
        for pixels, ids in data.batches(images, chosen, square=size):
            assert isinstance(pixels, Tensor)
            if len(ids) < 2:  # BatchNorm needs two
                continue
            margin = max(1, size // 14)
            shifts = torch.randint(-margin, margin + 1, (2,)).tolist()
            views = _normalised(pixels, device).roll(shifts, dims=(2, 3))
            optimizers.set_learning_rate(optimizer, 2e-3 * optimizers.warmup_cosine(step, steps, steps // 10))
            optimizer.zero_grad()
            F.cross_entropy(model(views), images.labels[ids].to(device), label_smoothing=0.05).backward()
            optimizer.step()
            step += 1
            if step == steps:
                return
        if step == before:
            raise UserError("the classifier that judges images needs two training images that can be read")


def _normalised(pixels: Tensor, device: str) -> Tensor:
    return pixels.to(device, memory_format=torch.channels_last).float() / 127.5 - 1


def classifier_features(classifier: Classifier, device: str = "cpu") -> Features:
    """Return the function from uint8 images (n, C, H, W) to the classifier's features (n, 128)."""
    return lambda pixels: classifier.features(_normalised(pixels, device)).float().cpu()


def inception_features(weights: Path, device: str = "cpu") -> Features:
    """Return the function from uint8 images (n, 1 or 3, H, W) to the 2048 features of FID's Inception network.

    ``weights`` is torch-fidelity's file pt_inception-2015-12-05-6726825d.pth. Raises UserError if that package or the
    file is missing.
    """
    if not weights.is_file():
        raise UserError(f"--inception-weights {weights}: there is no such file")
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    except (ImportError, TypeError) as error:
        raise UserError(f"Inception needs the package torch-fidelity: pip install torch-fidelity ({error})") from None

    def function(pixels: Tensor) -> Tensor:
        colour = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        return network(colour.contiguous().to(device)).float().cpu()

    return function


@torch.inference_mode()
def over_pixels(function: Features, pixels: Tensor) -> Tensor:
    """Return a function's results, (N, …), on images (N, C, H, W) uint8, 500 at a time."""
    return torch.cat([function(part) for part in pixels.split(500)])


def compare(real: Tensor, generated: Tensor) -> dict[str, float]:
    """Return fid, kid, precision and recall of features of generated images (N, D) against those of real ones (M, D).

    FID (Heusel et al., arXiv 1706.08500) and KID (Bińkowski et al., arXiv 1801.01401, by subsets of at most 1000) are
    torchmetrics'; for precision and recall see `precision_recall`, here of at most 5,000 images each.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    if min(len(real), len(generated)) < LEAST_ROWS or real.shape[1:] != generated.shape[1:]:
        raise ValueError(f"expected at least 4 rows of one width each, got {real.shape} and {generated.shape}")
    ready = Ready(real.shape[1])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # of KID's subsets
        fid = FrechetInceptionDistance(ready)
        kid = KernelInceptionDistance(ready, subsets=KID_SUBSETS, subset_size=min(1000, len(real), len(generated)))
        for metric in (fid, kid):
            metric.update(real, real=True)
            metric.update(generated, real=False)
        value = {"fid": fid.compute().item(), "kid": kid.compute()[0].item()}
        some, others = (x[torch.randperm(len(x))[:5000]] for x in (real, generated))
    precision, recall = precision_recall(some, others)
    return value | {"precision": precision, "recall": recall}


def judge_against(known: Tensor, results: dict, width: int) -> Callable[[str, Tensor], None]:
    """Return a function (name, features) that compares features with ``known``, prints a row and adds it to results.

    Fewer than 4 rows, of either, give no row, but a remark.
    """
    print(f"\n{'':{width}s}{'FID':>10s}{'KID':>10s}{'precision':>11s}{'recall':>10s}")

    def judge(name: str, found: Tensor) -> None:
        if min(len(known), len(found)) < LEAST_ROWS:
            print(f"{name:{width}s}of {len(found)} images against {len(known)} nothing can be said")
            return
        results[name] = compare(known, found)
        fid, kid, precision, recall = results[name].values()
        print(f"{name:{width}s}{fid:10.3f}{kid:10.5f}{precision:11.3f}{recall:10.3f}", flush=True)

    return judge


class Ready(nn.Module):
    """What torchmetrics takes as the network where the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Return (precision, recall) of features (N, D) and (M, D), both in [0, 1] (Kynkäänniemi et al., arXiv 1904.06991).

    Precision is the share of generated images that lie within the k-th neighbour's distance of some real image, recall
    the share of real images that lie so near to some generated one.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"expected more than k={k} rows of each, got {len(real)} and {len(generated)}")

    def covered(points: Tensor, centres: Tensor) -> float:
        radius = torch.cdist(centres, centres).kthvalue(k + 1).values  # the first is the centre itself
        return (torch.cdist(points, centres) <= radius).any(1).float().mean().item()

    return covered(generated, real), covered(real, generated)


def write_results(path: Path, results: dict) -> None:
    """Write results as JSON, atomically."""
    files.write_atomically(path, json.dumps(results, indent=2) + "\n")
