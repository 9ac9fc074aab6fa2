"""Rotary embedding of query and key heads, and the store of keys and values into pages."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpd.ops.norm import rms_norm_xla
from jpd.ops.registry import Op, register


class HeadNorms(NamedTuple):
    """RMS norms of every query and key head before they are rotated (Qwen3)."""

    q: jax.Array
    """`[D]` weight."""
    k: jax.Array
    """`[D]` weight."""
    eps: float


rope_write = Op("rope_write")
"""rope_write(qkv, cos, sin, k_pages, v_pages, slots, *, num_heads, norms=None).

Splits qkv `[T, Hq + 2 Hkv, D]` into q, k and v, rotates q and k by the angles whose cosine and sine
are `[T, D / 2]` float32 (after `norms: HeadNorms`, if any), and stores k and v at the flat
positions `slots` `[T]` = page * S + offset, in place when the pages `[P, S, Hkv, D]` are donated.
Tokens of padding may share a slot. Returns (q `[T, Hq, D]`, k_pages, v_pages).
"""


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x `[T, H, D]` in float32 by angles `[T, D / 2]`; the result has x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def split_heads(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, num_heads: int, norms: HeadNorms | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated q `[T, Hq, D]` and k `[T, Hkv, D]`, and v, of qkv `[T, Hq + 2 Hkv, D]`."""
    kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = jnp.split(qkv, (num_heads, num_heads + kv_heads), axis=1)
    if norms is not None:
        q, k = rms_norm_xla(q, norms.q, norms.eps), rms_norm_xla(k, norms.k, norms.eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def write_kv(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A scatter of rows; one row is an update of a slice, which XLA runs in one kernel."""

    def store(pages: jax.Array, rows: jax.Array) -> jax.Array:
        flat, rows = pages.reshape(-1, *pages.shape[2:]), rows.astype(pages.dtype)
        if len(rows) == 1:
            flat = jax.lax.dynamic_update_slice(flat, rows, (slots[0], 0, 0))
        else:
            flat = flat.at[slots].set(rows)
        return flat.reshape(pages.shape)

    return store(k_pages, k), store(v_pages, v)


def rope_write_xla(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    *,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fused rotations, and a scatter for each of keys and values."""
    q, k, v = split_heads(qkv, cos, sin, num_heads, norms)
    return q, *write_kv(k_pages, v_pages, k, v, slots)


register("rope_write", "xla", rope_write_xla)
