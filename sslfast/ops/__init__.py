"""The fused operations as functions."""

from sslfast.ops.info_nce import nt_xent
from sslfast.ops.rotate4 import rotate4
from sslfast.ops.similarity_lse import similarity_lse, similarity_lse_backward

__all__ = ["nt_xent", "rotate4", "similarity_lse", "similarity_lse_backward"]
