"""Along which mesh axes a value differs, as `shard_map` with `check_vma=True` keeps track of it.

With `check_vma=False` nothing is known, and all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax


def names(axis_name: Any) -> frozenset[Any]:
    """The axes of what collectives take as `axis_name`."""
    return frozenset(axis_name) if isinstance(axis_name, tuple | list) else frozenset({axis_name})


def varying(*values: jax.Array) -> frozenset[Any]:
    """Axes along which one of the values differs."""
    return frozenset().union(*(jax.typeof(v).manual_axis_type.varying for v in values))


def marked(value: jax.Array, axes: Iterable[Any]) -> jax.Array:
    """`value` as one that differs along `axes` too."""
    missing = tuple(sorted(frozenset(axes) - varying(value)))
    return lax.pcast(value, missing, to="varying") if missing else value


def summed_to(like: jax.Array, gradient: jax.Array) -> jax.Array:
    """Sums over the axes along which the gradient differs and what it belongs to does not."""
    extra = tuple(sorted(varying(gradient) - varying(like)))
    return lax.psum(gradient, extra) if extra else gradient
