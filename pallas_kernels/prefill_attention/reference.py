"""Prefill attention in plain jax.numpy, float32 throughout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def reference(
    q,
    k_pages,
    v_pages,
    page_table,
    starts,
    counts,
    contexts,
    *,
    scale=None,
    window=None,
    soft_cap=None,
):
    """The same as `prefill_attention`, one sequence after the other, in float32.

    The integer arguments must be concrete.
    """
    heads, size = q.shape[1:]
    kv_heads = k_pages.shape[2]
    scale = 1 / math.sqrt(size) if scale is None else scale
    out = np.zeros(q.shape, np.float32)
    numbers = zip(*(np.asarray(x).tolist() for x in (starts, counts, contexts)), strict=True)
    for n, (start, count, context) in enumerate(numbers):
        if count == 0:
            continue
        grouped = q[start : start + count].astype(jnp.float32)
        grouped = grouped.reshape(count, kv_heads, heads // kv_heads, size)
        keys, values = (
            pages[page_table[n]].reshape(-1, kv_heads, size)[:context].astype(jnp.float32)
            for pages in (k_pages, v_pages)
        )
        scores = jnp.einsum("qhgd,thd->hgqt", grouped, keys, precision="highest") * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        position = context - count + jnp.arange(count)[:, None]
        at = jnp.arange(context)
        seen = at <= position
        if window is not None:
            seen &= at > position - window
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("hgqt,thd->qhgd", weights, values, precision="highest")
        out[start : start + count] = np.asarray(mixed.reshape(count, heads, size))
    return jnp.asarray(out)
