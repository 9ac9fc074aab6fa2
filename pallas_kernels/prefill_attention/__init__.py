"""Causal attention of prompt chunks over paged keys and values: FlashAttention-3 in Pallas."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import checks, mosaic
from pallas_kernels.prefill_attention.config import ROWS, Config, candidates, default
from pallas_kernels.prefill_attention.kernel import attend
from pallas_kernels.prefill_attention.tiles import ALIGNMENT, tile_map

__all__ = ["Config", "candidates", "default", "prefill_attention"]


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    contexts: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Attends each token of packed prompt chunks to its sequence's tokens up to itself.

    Sequence n owns the tokens `starts[n] : starts[n] + counts[n]` of q, which are the last
    `counts[n]` of its `contexts[n]` tokens; the keys and values of all of them are in the pages
    already. Chunks follow each other without gaps; tokens after the last one give zeros.

    Args:
      q: `[T, Hq, D]` bfloat16 or float16; D is 64, 96, 128 or 256.
      k_pages: `[P, S, Hkv, D]`, pages of S = 16, 32 or 64 tokens; Hkv divides Hq. What is past a
        sequence's end in its pages must be finite.
      v_pages: as k_pages.
      page_table: `[N, W]` int32, valid page ids everywhere.
      starts: `[N]` int32, ascending.
      counts: `[N]` int32; 0 marks an unused slot.
      contexts: `[N]` int32, at least counts and at most W * S.
      scale: factor of the scores, `1 / sqrt(D)` when None.
      window: each token sees only the last `window` tokens, itself included.
      soft_cap: scores s become `soft_cap * tanh(s / soft_cap)`.
      config: how the kernel is cut, by D when None.
      interpret: `InterpretGPUParams` to run on a CPU.

    Returns:
      `[T, Hq, D]` in q's dtype.

    Raises:
      NotImplementedError: a dtype, head or page size, or configuration that the kernel lacks.
      ValueError: arguments that do not fit together, or a scale, window or cap that is not
        positive.
    """
    _check(q, k_pages, v_pages, page_table, starts, counts, contexts)
    checks.scores(scale, window, soft_cap)
    tokens, heads, size = q.shape
    page_size = k_pages.shape[1]
    config = default(size) if config is None else config
    if not config.fits(size, page_size, heads):
        raise NotImplementedError(
            f"{config} does not fit heads of {size}, pages of {page_size} and {heads} heads"
        )

    if tokens == 0:
        return q
    # A warpgroup reads 64 rows, TMA groups of 8.
    padding = max(-tokens % ALIGNMENT, ROWS - tokens)
    if padding:
        q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    tiles = tile_map(
        starts, counts, contexts, tokens=tokens + padding, rows=config.rows, window=window
    )
    out = attend(
        q,
        k_pages,
        v_pages,
        page_table,
        tiles,
        scale=1 / math.sqrt(size) if scale is None else float(scale),
        window=window,
        soft_cap=soft_cap,
        config=config,
        blocks=mosaic.sm_count(),
        interpret=interpret,
    )
    return out[:tokens] if padding else out


def _check(q, k_pages, v_pages, page_table, starts, counts, contexts):
    checks.paged(q, k_pages, v_pages)
    if page_table.ndim != 2:
        raise ValueError(f"page_table {page_table.shape} must be [N, W]")
    numbers = {"starts": starts, "counts": counts, "contexts": contexts}
    number = (page_table.shape[0],)
    for name, value in numbers.items():
        if value.shape != number:
            raise ValueError(f"{name} {value.shape} must be {number}, a number a page table row")
    checks.int32(page_table=page_table, **numbers)
