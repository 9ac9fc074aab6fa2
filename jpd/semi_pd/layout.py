"""Where arrays lie in a block of memory: plain data that every process can hold, without JAX."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from native.memory import ALIGNMENT_BYTES

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Field:
    """One array of a block."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Bytes from the start of the block."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """The arrays of a block, one behind the other, and the bytes that they take together."""

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, arrays: Iterable[tuple[tuple[Any, ...], tuple[int, ...], str]]) -> Layout:
        """Lays out arrays given as (path, shape, dtype) in their order, each aligned.

        Raises:
          ValueError: a path comes twice, or a dtype is no parameter's.
        """
        fields: dict[tuple[Any, ...], Field] = {}
        end = 0
        for path, shape, dtype in arrays:
            if path in fields:
                raise ValueError(f"two arrays have the path {path!r}")
            if dtype not in _ITEM_BYTES:
                raise ValueError(f"dtype={dtype!r} is not allowed: one of {list(_ITEM_BYTES)}")
            fields[path] = field = Field(path, tuple(shape), dtype, end)
            end += -(-field.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(tuple(fields.values()), end)


def pages_layout(
    *,
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> Layout:
    """K and V pages `[P, S, Hkv, D]` of every layer; paths are (layer, "k") and (layer, "v")."""
    shape = (num_pages, page_size, num_kv_heads, head_dim)
    return Layout.of(((i, kind), shape, dtype) for i in range(num_layers) for kind in ("k", "v"))
