"""Contrastive losses as modules, with the signatures that people already use.

All take float32, bfloat16, float16, or float64 on the CPU, and return the loss in float32 (float64 for float64 input).
None stores the matrix of similarities: memory grows with the number of vectors.
"""

from sslfast.losses.clip import ClipLoss, SigLipLoss
from sslfast.losses.dcl import DCLLoss, DCLWLoss, negative_mises_fisher_weights
from sslfast.losses.info_nce import InfoNCE
from sslfast.losses.nt_xent import NTXentLoss
from sslfast.losses.supcon import SupConLoss

__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "InfoNCE",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "negative_mises_fisher_weights",
]
