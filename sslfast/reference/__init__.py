from sslfast.reference import augment, info_nce, similarity_lse

__all__ = ["augment", "info_nce", "similarity_lse"]
