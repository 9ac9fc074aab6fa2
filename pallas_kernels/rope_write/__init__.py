"""Rotary embedding of queries and keys, and the store of keys and values into their pages."""

from pallas_kernels.rope_write.kernel import rope_write

__all__ = ["rope_write"]
