"""The fused operations as functions."""

from sslfast.ops.info_nce import nt_xent
from sslfast.ops.similarity_lse import similarity_lse, similarity_lse_backward

__all__ = ["nt_xent", "similarity_lse", "similarity_lse_backward"]
