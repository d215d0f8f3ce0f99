from sslfast.reference import augment, info_nce, rotate4, similarity_lse

__all__ = ["augment", "info_nce", "rotate4", "similarity_lse"]
