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

    def __call__(self, x: ops.Stream) -> tuple[jax.Array, jax.Array]:
        """The norm of a residual stream `[M, N]`, and the stream with all that was added to it."""
        return ops.normed_stream(x, self.weight[...], self.eps)
