"""Counters that kernels share: zero before and after every kernel, so one memset serves a program.

A kernel whose blocks meet (split-K, split-KV) counts arrivals in GMEM. `with workspace():` inside a
traced function makes one zeroed array for all kernels in the block, where otherwise each call
would make its own, and with it one more launch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

SIZE = 1 << 15
"""int32 counters that one workspace holds."""

_CURRENT: ContextVar[Any] = ContextVar("pallas_kernels_workspace", default=None)


@contextlib.contextmanager
def workspace() -> Iterator[None]:
    """Kernels traced inside the block share one array of counters."""
    token = _CURRENT.set(jax.new_ref(jnp.zeros(SIZE, jnp.int32)))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def counters(number: int) -> Any:
    """A ref to at least `number` int32 zeros, which the kernel must leave at zero.

    Raises:
      ValueError: more counters than a workspace has.
    """
    if number > SIZE:
        raise ValueError(f"{number} counters are needed, a workspace has {SIZE}")
    current = _CURRENT.get()
    return jax.new_ref(jnp.zeros(number, jnp.int32)) if current is None else current
