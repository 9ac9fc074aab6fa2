"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from jpd import ops


class RMSNorm(nnx.Module):
    """Normalises the last axis in float32, then scales in the input's dtype."""

    def __init__(self, width: int, eps: float, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: ops.Stream) -> tuple[jax.Array | ops.Unnormed, jax.Array]:
        """A residual stream `[M, N]` to be read through the norm, and the stream itself.

        The latter with all that was added to it; `ops.normed` of the former, or a `Linear` that
        reads it, takes the norm.
        """
        return ops.normed_stream(x, self.weight[...], self.eps)
