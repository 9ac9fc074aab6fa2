"""Root-mean-square norm."""

import jax
import jax.numpy as jnp

from jpd.ops.registry import Op, register

rms_norm = Op("rms_norm")
"""rms_norm(x [M, E], weight [E], eps) -> [M, E]: the last axis is normalised in float32, rounded to
x's dtype, and then multiplied with the weight."""


def rms_norm_xla(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """A reduction that XLA fuses with what is around it. Takes any number of leading axes."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight


register("rms_norm", "xla", rms_norm_xla)
