from sslfast.reference import info_nce

__all__ = ["info_nce"]
