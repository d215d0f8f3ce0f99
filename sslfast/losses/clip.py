"""Losses of images and their texts: CLIP and SigLIP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast import distributed
from sslfast.losses._common import check_pairs, check_ranks, compute_dtype, row_dots
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
        if self.world_size > 1 and self.local_loss:
            loss = self._of_own_rows(image_features, text_features, logit_scale)
        else:
            images, texts = image_features, text_features
            if self.world_size > 1:
                gather = distributed.all_gather if self.gather_with_grad else _all_gather_own_gradient
                images, texts = gather(images), gather(texts)
            own = torch.arange(len(images), device=images.device)
            per_image, per_text = similarity_lse(images, texts, logit_scale, exclude=own, columns=True)
            positives = logit_scale * row_dots(images, texts)
            loss = F.softplus(torch.stack((per_image, per_text)) - positives).mean()
        if logit_bias is not None:
            loss = loss + 0 * logit_bias
        loss = loss.to(compute_dtype(image_features))
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_own_rows(self, images: Tensor, texts: Tensor, logit_scale: float | Tensor) -> Tensor:
        """Own images against the texts of all ranks, and own texts against their images."""
        own = torch.arange(len(images), device=images.device)
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        for rows, keys in ((images, texts), (texts, images)):
            keys = keys if self.gather_with_grad else keys.detach()
            lse = distributed.similarity_lse(rows, keys, logit_scale, exclude=own, ring=self.ring)
            total = total + F.softplus(lse - logit_scale * row_dots(rows, keys)).mean() / 2
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
        dist_impl: has no effect: texts are gathered.

    Raises:
        ValueError, TypeError: features of different shapes, dtypes or devices, on different ranks too; a rank or
            world_size that the process group does not have.
    """

    def __init__(self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None):
        super().__init__()
        self.cache_labels, self.rank, self.world_size, self.dist_impl = cache_labels, rank, world_size, dist_impl

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
        first_text = self.rank * len(text_features)
        if self.world_size > 1:
            text_features = distributed.all_gather(text_features)
        bias = 0.0 if logit_bias is None else logit_bias
        total = sigmoid_loss(image_features, text_features, logit_scale, bias, first_key=first_text)
        loss = (total / len(image_features)).to(compute_dtype(image_features))
        return {"contrastive_loss": loss} if output_dict else loss
