"""Attention over pages in float32, row by row: what kernels are held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


# Tuning a product that runs once is not worth it.
@partial(jax.jit, static_argnames=("scale",), compiler_options={"xla_gpu_autotune_level": 0})
def paged_rows(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    table: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """float32 result of single queries, one at a time.

    Args:
        q: `[R, Hq, D]`.
        k_pages: `[P, S, Hkv, D]`, `v_pages` too.
        v_pages: see k_pages.
        table: `[R, W]` int32.
        seen: `[R]` int32; query r attends to the first `seen[r]` tokens of its pages.
        scale: of the scores.

    Returns:
        `[R, Hq, D]` float32.
    """
    kv_heads, size = k_pages.shape[2:]
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}

    def one(row: Any) -> jax.Array:
        query, pages, length = row
        k, v = (
            x[pages].reshape(-1, kv_heads, size).astype(jnp.float32) for x in (k_pages, v_pages)
        )
        query = query.astype(jnp.float32).reshape(kv_heads, -1, size)
        scores = jnp.einsum("hgd,thd->hgt", query, k, **exact) * scale
        scores = jnp.where(jnp.arange(k.shape[0]) < length, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("hgt,thd->hgd", weights, v, **exact).reshape(-1, size)

    return jax.lax.map(one, (q, table, seen))


@cache
def rows_program(
    query: tuple[int, ...], pool: tuple[int, ...], table: tuple[int, ...], scale: float
) -> Callable[..., jax.Array]:
    """:func:`paged_rows` compiled for bf16 arrays of these shapes, without its `scale`."""
    spec = jax.ShapeDtypeStruct
    q, pages = spec(query, jnp.bfloat16), spec(pool, jnp.bfloat16)
    seen = spec(table[:1], jnp.int32)
    return paged_rows.lower(q, pages, pages, spec(table, jnp.int32), seen, scale=scale).compile()


def worst_row_error(got: Any, want: Any) -> float:
    """Largest ‖got − want‖ / ‖want‖ of any row (first axis); infinite where got is not a number."""
    got, want = (np.asarray(x).astype(np.float32).reshape(len(x), -1) for x in (got, want))
    errors = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    return float(errors.max()) if np.isfinite(errors).all() else float("inf")
