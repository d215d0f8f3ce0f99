from sslfast.reference import augment, diffusion, group_norm_silu, info_nce, rotate4, sigmoid_loss, similarity_lse

__all__ = ["augment", "diffusion", "group_norm_silu", "info_nce", "rotate4", "sigmoid_loss", "similarity_lse"]
