"""Contrast with labels."""

import torch
from torch import Tensor, nn

from sslfast.losses._common import check_labels, check_matrix, check_temperature, normalize, row_dots
from sslfast.ops.similarity_lse import similarity_lse


class SupConLoss(nn.Module):
    """Supervised contrastive loss; a drop-in for `pytorch_metric_learning.losses.SupConLoss` with its defaults.

    >>> loss = SupConLoss(temperature=0.1)(embeddings, labels)

    The loss of a row is lse_i − mean of its positives' logits: the vectors of its own label. As in
    pytorch-metric-learning, the mean goes over the rows that have a positive and whose loss is above 0, and the loss
    is 0 where no row has a positive or none has a negative.

    Call with embeddings (N, dim), which are L2-normalised, and labels (N,), and optionally
        ref_emb (M, dim), ref_labels (M,): compare with these instead of with each other. Without ref_labels, ref_emb
            (N, dim) are other views of the embeddings: they have the same labels, and i is not compared with i.
        indices_tuple: (anchors, positives, negatives) or (anchors, positives, anchors, negatives) as from a miner:
            only these pairs count. Pairs can be any, so that here the (N, M) matrix is made, in plain PyTorch.

    Raises:
        ValueError: a temperature that is not positive, or shapes that do not fit.

    Source: Khosla et al., "Supervised Contrastive Learning", arXiv 2004.11362.
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        check_matrix("embeddings", embeddings)
        if ref_emb is not None:
            check_matrix("ref_emb", ref_emb)
        queries = normalize(embeddings)
        keys = queries if ref_emb is None else normalize(ref_emb)
        if indices_tuple is not None:
            return self._loss_of_pairs(queries, keys, indices_tuple)
        labels = key_labels = check_labels("labels", labels, embeddings)
        if ref_emb is not None and ref_labels is None:
            check_labels("labels", labels, ref_emb)
        elif ref_emb is not None:
            key_labels = check_labels("ref_labels", ref_labels, ref_emb)
        own = None if key_labels is not labels else torch.arange(len(queries), device=queries.device)
        scale = 1 / self.temperature
        if ref_emb is None:
            lse = similarity_lse(queries, None, scale)
        else:
            lse = similarity_lse(queries, keys, scale, exclude=own)

        # Σ of the positives' logits by the sums of the classes: ⟨q_i, Σ_{j: own class} k_j⟩. A class has the number of
        # the first of its labels in sorted order.
        sorted_labels = key_labels.sort().values
        first = torch.searchsorted(sorted_labels, labels)
        count = torch.searchsorted(sorted_labels, labels, right=True) - first
        classes = first if key_labels is labels else torch.searchsorted(sorted_labels, key_labels)
        sums = torch.zeros_like(keys).index_add(0, classes, keys)
        positives = sums[first.clamp(max=len(keys) - 1)]
        compared = len(keys)
        if own is not None:
            positives, count, compared = positives - keys, count - 1, compared - 1
        losses = lse - scale * row_dots(queries, positives) / count.clamp(min=1)
        return self._mean(losses, count, compared - count).to(queries.dtype)

    def _loss_of_pairs(self, queries: Tensor, keys: Tensor, pairs: tuple[Tensor, ...]) -> Tensor:
        if len(pairs) not in (3, 4):
            raise ValueError(f"indices_tuple: expected 3 or 4 tensors, got {len(pairs)}")
        anchors, positives, negative_anchors, negatives = pairs if len(pairs) == 4 else (*pairs[:2], pairs[0], pairs[2])
        with torch.autocast(queries.device.type, enabled=False):
            logits = (queries @ keys.T / self.temperature).double()
        positive = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        negative = positive.clone()
        positive[anchors, positives] = True
        negative[negative_anchors, negatives] = True
        if (positive & negative).any():
            raise ValueError("indices_tuple: expected each pair to be positive or negative, found one that is both")
        compared = positive | negative
        empty = ~compared.any(1, keepdim=True)
        lse = logits.masked_fill(~(compared | empty), float("-inf")).logsumexp(1)
        count = positive.sum(1)
        losses = lse - (logits * positive).sum(1) / count.clamp(min=1)
        return self._mean(losses, count, negative.sum(1)).to(queries.dtype)

    def _mean(self, losses: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """Over the rows that count, given how many positives and negatives each row has."""
        usable = positives.sum().double() * negatives.sum() > 1  # there are both, and more than one of either
        counted = (positives > 0) & ~(losses <= 0) & usable
        return torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
