"""Losses of images and their texts: CLIP and SigLIP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast import distributed
from sslfast.losses._common import (
    as_scalar,
    check_pairs,
    check_ranks,
    compute_dtype,
    losses_of,
    mean,
    overrides,
    row_dots,
    same_dtype,
)
from sslfast.ops.sigmoid_loss import sigmoid_loss
from sslfast.ops.similarity_lse import similarity_lse


class ClipLoss(nn.Module):
    """The loss of CLIP, both directions from one pass; a drop-in for `open_clip.ClipLoss`.

    >>> loss = ClipLoss()(image_features, text_features, logit_scale)  # (batch, dim) each; a number or a tensor

    Call with image_features and text_features (batch, dim), normalised by the caller, logit_scale, which gets a
    gradient, and logit_bias, which changes neither the loss nor a gradient, as it shifts all logits by the same. With
    output_dict=True it returns {"contrastive_loss": loss}.

    Args:
        local_loss: with several ranks, each compares its own rows with those of all; the mean over ranks is the loss of
            the whole batch. False: each computes that loss, all of it.
        gather_with_grad: gradients reach the features of other ranks, so that those that DistributedDataParallel
            averages are the gradients of the whole batch. False: as in open_clip, they do not.
        cache_labels: has no effect: there are no labels.
        rank, world_size: of the process group of torch.distributed.
        use_horovod: only False.
        ring: pass the features from rank to rank instead of holding all of them on each; with local_loss and
            gather_with_grad.

    Raises:
        ValueError, TypeError: features of different shapes, dtypes or devices, on different ranks too; a rank or
            world_size that the process group does not have; ring without what it needs.
        NotImplementedError: use_horovod.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        ring: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise NotImplementedError("use_horovod: only False is implemented, got True")
        if ring and not (local_loss and gather_with_grad):
            raise ValueError("ring: expected False without local_loss=True and gather_with_grad=True")
        self.ring = ring
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        check_pairs(("image_features", image_features), ("text_features", text_features))
        check_ranks(self.rank, self.world_size)
        if overrides(self, ClipLoss, "get_logits", "get_ground_truth"):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, len(logits[0]))
            loss = (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2
        else:
            loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, images: Tensor, texts: Tensor, logit_scale, logit_bias) -> Tensor:
        scale, bias = as_scalar("logit_scale", logit_scale), as_scalar("logit_bias", logit_bias)
        images, texts = same_dtype(images, texts)
        if self.world_size > 1 and self.local_loss:
            loss = self._of_own_rows(images, texts, scale)
        else:
            images, texts = self._everyones(images, texts)
            own = torch.arange(len(images), device=images.device)
            per_image, per_text = similarity_lse(images, texts, scale, exclude=own, columns=True)
            positives = row_dots(images, texts)
            loss = (mean(losses_of(per_image, scale, positives)) + mean(losses_of(per_text, scale, positives))) / 2
        return (loss if logit_bias is None else loss + 0 * bias).to(compute_dtype(images))

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits of images (N, M), and of texts, as matrices; for subclasses: the loss needs them only if a
        subclass overrides this."""
        all_images, all_texts = self._everyones(image_features, text_features)
        images, texts = (image_features, text_features) if self.local_loss else (all_images, all_texts)
        bias = 0 if logit_bias is None else logit_bias
        return logit_scale * images @ all_texts.T + bias, logit_scale * texts @ all_images.T + bias

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """For each row of the logits the number of its positive; for subclasses, as `get_logits`."""
        first = self.rank * num_logits if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def _everyones(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        if self.world_size == 1:
            return images, texts
        if self.gather_with_grad:
            return distributed.all_gather(images), distributed.all_gather(texts)
        if self.local_loss:
            return distributed.all_gather(images.detach()), distributed.all_gather(texts.detach())
        return _all_gather_own_gradient(images), _all_gather_own_gradient(texts)

    def _of_own_rows(self, images: Tensor, texts: Tensor, logit_scale: float | Tensor) -> Tensor:
        """Own images against the texts of all ranks, and own texts against their images."""
        own = torch.arange(len(images), device=images.device)
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        for rows, keys in ((images, texts), (texts, images)):
            keys = keys if self.gather_with_grad else keys.detach()
            lse = distributed.similarity_lse(rows, keys, logit_scale, exclude=own, ring=self.ring)
            total = total + mean(losses_of(lse, logit_scale, row_dots(rows, keys))) / 2
        return total


def _all_gather_own_gradient(features: Tensor) -> Tensor:
    """The rows of all ranks, of which only the own ones carry a gradient."""
    everyones = distributed.all_gather(features.detach())
    start = distributed.rank() * len(features)
    return torch.cat([everyones[:start], features, everyones[start + len(features) :]])


class SigLipLoss(nn.Module):
    """The sigmoid loss of SigLIP; a drop-in for `open_clip.SigLipLoss`.

    >>> loss = SigLipLoss()(image_features, text_features, logit_scale, logit_bias)

    Σ_ij −log sigmoid(±(logit_scale·⟨image_i, text_j⟩ + logit_bias)) / batch, + for i = j. Call with image_features and
    text_features (batch, dim), normalised by the caller; logit_scale and logit_bias get gradients.

    Args:
        cache_labels: has no effect: there are no labels.
        rank, world_size: of the process group of torch.distributed. A rank compares its images with the texts of all;
            the mean over ranks is the loss of the whole batch, and DistributedDataParallel's gradients are those of it.
        dist_impl: "bidir", "shift", "reduce" or "gather", which makes no difference: texts are gathered.
        chunk_size: has no effect: logits are never stored.

    Raises:
        ValueError, TypeError: features of different shapes, dtypes or devices, on different ranks too; a rank or
            world_size that the process group does not have.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got {dist_impl!r}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size = dist_impl or "bidir", chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        check_pairs(("image_features", image_features), ("text_features", text_features))
        check_ranks(self.rank, self.world_size)
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        if self.world_size > 1:
            everyones = distributed.all_gather(text_features).split(len(text_features))
            for texts in everyones[: self.rank] + everyones[self.rank + 1 :]:
                loss = loss + self._loss(image_features, texts, logit_scale, logit_bias, negative_only=True)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, images: Tensor, texts: Tensor, logit_scale, logit_bias=None, negative_only: bool = False) -> Tensor:
        if overrides(self, SigLipLoss, "get_logits", "get_ground_truth"):
            logits = self.get_logits(images, texts, logit_scale, logit_bias)
            labels = self.get_ground_truth(images.device, images.dtype, len(images), negative_only=negative_only)
            return -F.logsigmoid(labels * logits).sum() / len(images)
        scale, bias = as_scalar("logit_scale", logit_scale), as_scalar("logit_bias", logit_bias)
        images, texts = same_dtype(images, texts)
        total = sigmoid_loss(images, texts, scale, bias, first_key=len(texts) if negative_only else 0)
        return (total / len(images)).to(compute_dtype(images))

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """The logits of images and texts as a matrix; for subclasses: the loss needs it only if one overrides this."""
        return logit_scale * image_features @ text_features.T + (0 if logit_bias is None else logit_bias)

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """1 on the diagonal unless negative_only, −1 elsewhere; for subclasses, as `get_logits`."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)
