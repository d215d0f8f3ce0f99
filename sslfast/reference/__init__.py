from sslfast.reference import augment, info_nce

__all__ = ["augment", "info_nce"]
