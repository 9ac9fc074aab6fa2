"""The implementation "xla": the product, and then XLA's collective."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from jpd.ops.overlap.weights import product
from jpd.overlap import Plan


def collective(op: str, y: jax.Array, axis_name: Any) -> jax.Array:
    """The collective `op` (of `jpd.overlap.OPS`) on y, over rows."""
    match op:
        case "all_reduce":
            return lax.psum(y, axis_name)
        case "reduce_scatter":
            return lax.psum_scatter(y, axis_name, scatter_dimension=0, tiled=True)
        case "all_to_all":
            return lax.all_to_all(y, axis_name, split_axis=0, concat_axis=0, tiled=True)
    raise ValueError(f"op is {op!r}")


def matmul_collective(
    op: str, x: jax.Array, w: jax.Array, axis_name: Any, plan: Plan | None, resident: bool
) -> jax.Array:
    """One after the other; a plan has nothing to say about that."""
    del plan
    return collective(op, product(x, w, resident=resident), axis_name)
