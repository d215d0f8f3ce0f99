"""Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # similarities held in memory at once: 64 MiB


def nearest(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (similarity, index), both (Q, k): the k keys most cosine-similar to each query, best first.

    queries (Q, D) and keys (K, D) are float; the Q × K similarities are computed in chunks, never all at once.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"k must be between 1 and the {len(keys)} keys, not {k}")
    keys = F.normalize(keys, dim=1).T
    rows = max(1, CHUNK_ELEMENTS // keys.shape[1])
    best = [(F.normalize(chunk, dim=1) @ keys).topk(k) for chunk in queries.split(rows)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float = 0.1) -> Tensor:
    """Return the predicted class (Q,) from neighbours' similarity and labels, both (Q, k).

    Each neighbour votes for its class with weight exp(similarity / temperature).
    """
    weights = (similarity / temperature).exp()
    return similarity.new_zeros(len(similarity), classes).scatter_add_(1, labels, weights).argmax(1)


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, ks: Sequence[int] = (10, 200)
) -> dict[int, float]:
    """Return {k: accuracy in percent} of the weighted kNN classifier; k is capped at the number of training samples."""
    classes = int(train_labels.max()) + 1
    similarity, index = nearest(test, train, min(max(ks), len(train)))
    neighbour_labels = train_labels[index]
    accuracy = {}
    for k in ks:
        predicted = vote(similarity[:, :k], neighbour_labels[:, :k], classes)
        accuracy[k] = 100 * (predicted == test_labels).float().mean().item()
    return accuracy
