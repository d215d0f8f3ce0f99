from sslfast.reference import augment, diffusion, group_norm_silu, info_nce, rotate4, similarity_lse

__all__ = ["augment", "diffusion", "group_norm_silu", "info_nce", "rotate4", "similarity_lse"]
