"""Contrast with labels."""

import torch
from torch import Tensor, nn

from sslfast.losses._common import (
    add_rows,
    by_blocks,
    check_matrix,
    check_temperature,
    inverse,
    normalize,
    row_dots,
    same_dtype,
    take_rows,
    total,
)
from sslfast.ops.similarity_lse import similarity_lse


class SupConLoss(nn.Module):
    """Supervised contrastive loss; a drop-in for `pytorch_metric_learning.losses.SupConLoss` with its defaults.

    >>> loss = SupConLoss(temperature=0.1)(embeddings, labels)

    The loss of a row is lse_i − mean of its positives' logits: the vectors of its own label. As in
    pytorch-metric-learning, the mean goes over the rows that have a positive and whose loss is above 0, and the loss
    is 0 where no row has a positive or none has a negative.

    Args:
        temperature: number but 0, or a tensor with one element, which gets a gradient.
        distance, reducer, embedding_regularizer, embedding_reg_weight, collect_stats: of pytorch-metric-learning.
            Nothing but its defaults is implemented: CosineSimilarity(), AvgNonZeroReducer(), no regularizer and no
            statistics.

    Call with embeddings (N, dim), which are L2-normalised, and labels (N,) of any dtype but complex, and optionally
        ref_emb (M, dim), ref_labels (M,): compare with these instead of with each other. Without ref_labels, the first
            N of ref_emb are other views of the embeddings: they have the same labels, i is not compared with i, and
            the rest is not compared.
        indices_tuple: (anchors, positives, negatives) or (anchors, positives, anchors, negatives) as from a miner:
            only these pairs count. Pairs can be any, so that here there are (N, M) matrices of masks and indices.
    Labels are the same if == says so: 0.0 and −0.0 are, and NaN is the label of no other vector, and not of its own.

    Raises:
        ValueError: a temperature of 0, neither labels nor indices_tuple, or shapes that do not fit.
        TypeError: what is not a tensor of the kind, or dtypes that differ, unless within torch.autocast.
        NotImplementedError: another distance, reducer, regularizer, or statistics.

    Source: Khosla et al., "Supervised Contrastive Learning", arXiv 2004.11362.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        distance: nn.Module | None = None,
        reducer: nn.Module | None = None,
        embedding_regularizer: nn.Module | None = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ):
        super().__init__()
        check_temperature(temperature)
        check_defaults(distance, reducer, embedding_regularizer, collect_stats)
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
        if labels is not None:
            _check_labels("labels", labels, embeddings)
        queries = keys = normalize(embeddings)
        if ref_emb is not None:
            _check_ref(ref_emb, embeddings)
            if ref_labels is not None:
                _check_labels("ref_labels", ref_labels, ref_emb)
            queries, keys = same_dtype(queries, normalize(ref_emb))
        if indices_tuple is not None:
            return self._loss_of_pairs(queries, keys, indices_tuple)
        if labels is None:
            raise ValueError("labels: expected a tensor, or indices_tuple, got neither")
        if ref_emb is not None and ref_labels is not None and ref_labels is not labels:
            return self._loss_of_labels(queries, keys, labels, ref_labels)
        if len(keys) < len(labels):
            found = f"got {tuple(labels.shape)} and no ref_labels"
            raise ValueError(f"labels: expected shape ({len(keys)},), a label for each of ref_emb, {found}")
        return self._loss_of_labels(queries, keys[: len(labels)] if ref_emb is not None else keys, labels, labels)

    def _loss_of_labels(self, queries: Tensor, keys: Tensor, labels: Tensor, key_labels: Tensor) -> Tensor:
        """Where queries and keys have the same labels, i is not compared with i."""
        own = torch.arange(len(queries), device=queries.device) if key_labels is labels else None
        scale = inverse(self.temperature)
        if keys is queries:
            lse = similarity_lse(queries, None, scale)
        else:
            lse = similarity_lse(queries, keys, scale, exclude=own)

        # Σ of the positives' logits by the sums of the classes: ⟨q_i, Σ_{j: own class} k_j⟩. A class has the number of
        # the first of its labels in sorted order.
        codes, key_codes = _codes(labels, key_labels, queries.device)
        sorted_codes = key_codes.sort().values
        first = torch.searchsorted(sorted_codes, codes)
        count = torch.searchsorted(sorted_codes, codes, right=True) - first
        classes = first if own is not None else torch.searchsorted(sorted_codes, key_codes)
        sums = add_rows(keys, classes, keys)
        positives = take_rows(sums, first.clamp(max=len(keys) - 1))
        compared = len(keys)
        if own is not None:
            positives, count, compared = positives - keys, count - 1, compared - 1
        # There are positives and negatives, and more than one of either.
        usable = count.sum().double() * (compared - count).sum() > 1
        return self._mean(lse, scale, row_dots(queries, positives), count, usable).to(queries.dtype)

    def _loss_of_pairs(self, queries: Tensor, keys: Tensor, pairs: tuple[Tensor, ...]) -> Tensor:
        if len(pairs) not in (3, 4):
            raise ValueError(f"indices_tuple: expected 3 or 4 tensors, got {len(pairs)}")
        anchors, positives, negative_anchors, negatives = pairs if len(pairs) == 4 else (*pairs[:2], pairs[0], pairs[2])
        positive = torch.zeros(len(queries), len(keys), dtype=torch.bool, device=queries.device)
        negative = positive.clone()
        positive[anchors, positives] = True
        negative[negative_anchors, negatives] = True
        if (positive & negative).any():
            raise ValueError("indices_tuple: expected each pair to be positive or negative, found one that is both")
        scale = inverse(self.temperature)
        every = torch.arange(len(keys), device=keys.device).expand(positive.shape)
        compared = positive | negative
        lse = similarity_lse(queries, keys, scale, exclude=every.masked_fill(compared, -1))
        of_row, of_key = positive.nonzero(as_tuple=True)
        sums = add_rows(queries, of_row, take_rows(keys, of_key))
        usable = positive.any() & negative.any() & (max(len(anchors), len(negative_anchors)) > 1)
        usable = usable & (compared.sum(1) > 1)  # the loss of a row with one positive alone is 0, and not its rounding
        return self._mean(lse, scale, row_dots(queries, sums), positive.sum(1), usable).to(queries.dtype)

    def _mean(
        self, lse: Tensor, scale: float | Tensor, sum_of_dots: Tensor, positives: Tensor, usable: Tensor
    ) -> Tensor:
        """Over the rows that count, given the sum of the similarities of each row's positives, and their number."""
        losses = by_blocks(lambda a, b, n: a - scale * b / n, lse, sum_of_dots, positives.clamp(min=1))
        counted = (positives > 0) & ~(losses <= 0) & usable
        return total(torch.where(counted, losses, 0)) / counted.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def _check_ref(ref_emb: Tensor, embeddings: Tensor) -> None:
    check_matrix("ref_emb", ref_emb)
    if ref_emb.shape[1] != embeddings.shape[1]:
        expected = f"{embeddings.shape[1]} columns, as embeddings"
        raise ValueError(f"ref_emb: expected {expected}, got shape {tuple(ref_emb.shape)}")
    if ref_emb.device != embeddings.device:
        raise ValueError(f"ref_emb: expected the device of embeddings, {embeddings.device}, got {ref_emb.device}")


def _check_labels(name: str, labels: Tensor, rows: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_complex():
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: expected a tensor of real numbers, got {found}")
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"{name}: expected shape ({rows.shape[0]},), a label a vector, got {tuple(labels.shape)}")


def _codes(labels: Tensor, key_labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64, the same where == says of the labels that they are."""
    dtype = torch.promote_types(labels.dtype, key_labels.dtype)
    if not dtype.is_floating_point:
        return labels.to(device, torch.int64), key_labels.to(device, torch.int64)
    bits: list[Tensor] = []
    for t in (labels, key_labels):
        t = t.detach().to(device, dtype).double() + 0.0  # +0.0 makes 0.0 of −0.0
        # A NaN of its own for each, by the bits that do not matter.
        different = _NAN + len(bits) * len(labels) + torch.arange(len(t), device=device)
        bits.append(torch.where(t.isnan(), different, t.view(torch.int64)))
        if key_labels is labels:
            return bits[0], bits[0]
    return bits[0], bits[1]


_NAN = 0x7FF8 << 48


def check_defaults(distance, reducer, embedding_regularizer, collect_stats) -> None:
    """Raise NotImplementedError for what is not the default of pytorch-metric-learning's SupConLoss."""
    if distance is not None or reducer is not None:
        from pytorch_metric_learning import distances, reducers
    if distance is not None and (
        type(distance) is not distances.CosineSimilarity
        or (distance.p, distance.power, distance.normalize_embeddings, distance.is_inverted) != (2, 1, True, True)
    ):
        raise NotImplementedError(f"distance: only CosineSimilarity() is implemented, got {distance}")
    if reducer is not None and (
        type(reducer) is not reducers.AvgNonZeroReducer or (reducer.low, reducer.high) != (0, None)
    ):
        raise NotImplementedError(f"reducer: only AvgNonZeroReducer() is implemented, got {reducer}")
    if embedding_regularizer is not None:
        raise NotImplementedError(f"embedding_regularizer: only None is implemented, got {embedding_regularizer}")
    if collect_stats or getattr(distance, "collect_stats", False) or getattr(reducer, "collect_stats", False):
        raise NotImplementedError("collect_stats: only False is implemented, got True")
