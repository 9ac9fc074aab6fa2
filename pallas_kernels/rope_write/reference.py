"""What the kernel computes, in float32 where it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def rope_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    *,
    num_heads: int,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel's function, with scatters for the stores."""
    kv_heads = k_pages.shape[2]
    q, k, v = jnp.split(qkv, (num_heads, num_heads + kv_heads), axis=1)
    if q_norm is not None:
        q, k = _norm(q, q_norm, eps), _norm(k, k_norm, eps)

    def store(pages: jax.Array, rows: jax.Array) -> jax.Array:
        flat = pages.reshape(-1, *pages.shape[2:])
        return flat.at[slots].set(rows).reshape(pages.shape)

    k = _rotate(k, cos, sin)
    return _rotate(q, cos, sin), store(k_pages, k), store(v_pages, v)
