"""Products of rows whose RMS norm is left to them: a kernel may take it for no pass of its own."""

from typing import NamedTuple

import jax

from jpd.ops.linear import gated_linear, linear
from jpd.ops.norm import rms_norm
from jpd.ops.pallas import takes_norm


class Unnormed(NamedTuple):
    """Rows that are to be read through a norm."""

    rows: jax.Array
    """`[M, E]`."""
    weight: jax.Array
    """`[E]`."""
    eps: float


def normed(x: jax.Array | Unnormed) -> jax.Array:
    """The rows `[M, E]`, after their norm if that was left to be taken."""
    return rms_norm(*x) if isinstance(x, Unnormed) else x


def linear_of(
    x: jax.Array | Unnormed,
    weight: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`linear` `[M, N]` of rows `[M, K]`, which it normalises if that was left to be done.

    Where the kernel takes the norm along, nothing is rounded between the two, and `choices()`
    counts no `rms_norm`.

    Args:
      x: `[M, K]`.
      weight: `[N, K]`.
      bias: `[N]`.
      residual: `[M, N]`, added last.
    """
    if isinstance(x, Unnormed) and takes_norm(x.rows, x.weight, weight, gated=False):
        norm = x.weight, x.eps
        return linear(x.rows, weight, bias=bias, residual=residual, norm=norm)
    return linear(normed(x), weight, bias=bias, residual=residual)


def gated_linear_of(
    x: jax.Array | Unnormed, weight: jax.Array, *, bias: jax.Array | None = None
) -> jax.Array:
    """`gated_linear` `[M, F]` likewise, of `weight` `[2F, K]` and `bias` `[2F]`."""
    if isinstance(x, Unnormed) and takes_norm(x.rows, x.weight, weight, gated=True):
        return gated_linear(x.rows, weight, bias=bias, norm=(x.weight, x.eps))
    return gated_linear(normed(x), weight, bias=bias)
