"""Decode attention in plain float32 JAX, for tests and the start-up self-check."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Any, Any]:
    """Attention of one query token a row over its paged keys and values.

    Returns:
      Output [B, Hq, D] and the natural log of the softmax denominator [B, Hq], both float32; 0 and
      -inf in rows of length 0.
    """
    batch, heads, size = q.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    scale = size**-0.5 if scale is None else scale
    f32 = jnp.float32
    k = k_pages[page_table].reshape(batch, -1, kv_heads, size).astype(f32)
    v = v_pages[page_table].reshape(batch, -1, kv_heads, size).astype(f32)
    grouped = q.astype(f32).reshape(batch, kv_heads, group, size)
    scores = jnp.einsum("bhgd,bthd->bhgt", grouped, k, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    token = jnp.arange(k.shape[1])[None]
    seen = token < lengths[:, None]
    if window is not None:
        seen &= token >= lengths[:, None] - window
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(jnp.isfinite(lse)[..., None], jnp.exp(scores - lse[..., None]), 0.0)
    out = jnp.einsum("bhgt,bthd->bhgd", weights, v, precision="highest")
    return out.reshape(q.shape), lse.reshape(batch, heads)
