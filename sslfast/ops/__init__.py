"""The fused operations as functions."""

from sslfast.ops.info_nce import nt_xent

__all__ = ["nt_xent"]
