"""The fused operations as functions."""

from sslfast.ops.diffusion import diffusion_loss, diffusion_noise, diffusion_step, q_sample
from sslfast.ops.group_norm_silu import group_norm_silu
from sslfast.ops.info_nce import nt_xent
from sslfast.ops.rotate4 import rotate4
from sslfast.ops.sigmoid_loss import sigmoid_loss
from sslfast.ops.similarity_lse import similarity_lse, similarity_lse_backward

__all__ = [
    "diffusion_loss",
    "diffusion_noise",
    "diffusion_step",
    "group_norm_silu",
    "nt_xent",
    "q_sample",
    "rotate4",
    "sigmoid_loss",
    "similarity_lse",
    "similarity_lse_backward",
]
