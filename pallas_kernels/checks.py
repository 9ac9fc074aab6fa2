"""What the kernels take in common, and how they refuse the rest.

What no kernel of this package has is a `NotImplementedError`, so that a caller may turn to another
implementation; arguments that nobody could use are a `ValueError`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

DTYPES = ("bfloat16", "float16")
HEAD_SIZES = (64, 96, 128, 256)
"""Of attention."""
PAGE_SIZES = (16, 32, 64)


def supported(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises `NotImplementedError` if a value is none of what there is."""
    if value not in choices:
        allowed = ", ".join(map(str, choices))
        raise NotImplementedError(f"{name} {value}: one of {allowed} is supported")


def not_empty(**sizes: int) -> None:
    """Raises `NotImplementedError` for the axis of an array that has no elements."""
    for name, size in sizes.items():
        if size < 1:
            raise NotImplementedError(f"{name} is {size}: at least 1 is supported")


def whole(least: int, step: int = 1, **values: Any) -> None:
    """Raises `ValueError` for what is no whole number, or too small, or no multiple of `step`."""
    multiple = f", a multiple of {step}" if step > 1 else ""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or value < least or value % step:
            raise ValueError(
                f"{name} is {value}, expected a whole number of at least {least}{multiple}"
            )


def positive(*, or_zero: bool = False, **values: Any) -> None:
    """Raises `ValueError` for a number that is not finite and above 0; None is let pass."""
    for name, value in values.items():
        if value is not None and not (0 < value < math.inf or (or_zero and value == 0)):
            above = "at least" if or_zero else "more than"
            raise ValueError(f"{name} is {value}, expected a finite number of {above} 0")


def scores(scale: Any, window: Any, soft_cap: Any) -> None:
    """Raises `ValueError` for what attention cannot do to its scores."""
    positive(scale=scale, soft_cap=soft_cap)
    if window is not None:
        whole(1, window=window)


def paged(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> None:
    """Checks the queries `[_, Hq, D]` and pages `[P, S, Hkv, D]` of attention.

    Raises:
      ValueError: they do not fit together.
      NotImplementedError: an empty axis, or a dtype, head or page size that attention lacks.
    """
    if q.ndim != 3 or k_pages.ndim != 4:
        raise ValueError(
            f"q {q.shape} and k_pages {k_pages.shape} must be [T, Hq, D] and [P, S, Hkv, D]"
        )
    _, heads, size = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != size:
        raise ValueError(
            f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must be equal, with q's head "
            f"size {size}"
        )
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(f"dtypes {q.dtype}, {k_pages.dtype} and {v_pages.dtype} must be equal")
    not_empty(Hq=heads, Hkv=kv_heads)
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} kv heads")
    supported("dtype", q.dtype.name, DTYPES)
    supported("head size", size, HEAD_SIZES)
    supported("page size", page_size, PAGE_SIZES)


def int32(**arrays: jax.Array) -> None:
    """Raises `ValueError` for an array of another dtype."""
    for name, array in arrays.items():
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} has dtype {array.dtype}, expected int32")
