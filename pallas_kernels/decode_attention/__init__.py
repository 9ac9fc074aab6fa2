"""Paged split-KV decode attention with asynchronous softmax (FlashDecoding++, section 3)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.decode_attention import config as configs
from pallas_kernels.decode_attention.config import DecodeConfig
from pallas_kernels.decode_attention.launch import launch
from pallas_kernels.decode_attention.plan import make_plan
from pallas_kernels.decode_attention.reference import reference
from pallas_kernels.decode_attention.spec import Spec
from pallas_kernels.workspace import counters

__all__ = ["DecodeAttention", "DecodeConfig", "decode_attention", "reference"]


class DecodeAttention(NamedTuple):
    """What `decode_attention` returns.

    Attributes:
      out: [B, Hq, D] in q's dtype; 0 in padded rows.
      lse: [B, Hq] float32, natural log of the softmax denominator of the scaled (and capped)
        scores, or None; -inf in padded rows.
      recomputed: [B, Hkv] int32, 1 where the guard recomputed a row's heads of one kv head.
    """

    out: Any
    lse: Any
    recomputed: Any


@functools.partial(jax.jit, static_argnames=("spec", "interpret"))
def _launch(q, k_pages, v_pages, page_table, lengths, plan, phi, counter, *, spec, interpret):
    return launch(spec, q, k_pages, v_pages, page_table, lengths, plan, phi, counter, interpret)


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    phi: Any = None,
    softmax: str = "async",
    return_lse: bool = False,
    early: bool = False,
    config: DecodeConfig | None = None,
    interpret: Any = None,
) -> DecodeAttention:
    """Attention of one query token a row over its paged keys and values, in one launch.

    The tokens of a row are split over blocks, and with the unified value phi of FlashDecoding++
    (section 3) in the place of each block's own maximum, partial results are independent: they
    are added up, in a fixed order, by the last block that reaches the row.

    A row's heads of one kv head are recomputed with synchronized softmax in the same launch if for
    one of them the denominator l = sum exp(score - phi) is not safe:

    * bfloat16: l outside [2^-64, 2^64], or NaN. P and l have float32's exponents, so every
      exp(score - phi) <= l is finite and O stays finite while |v| < 2^63; what underflowed (below
      2^-126 each) is less than 2^-40 of l.
    * float16: l above 2^64 or NaN, where l sums P as rounded to float16, so that one P above 65504
      makes it infinite; or l below 2^-14 times the visible tokens. Above it the mean of P is a
      normal float16 number, and what the coarse spacing below 2^-14 costs is less than 2^-10 of
      the result.

    With `early` the caller promises that these were complete before the kernel directly ahead on
    the stream let this one start:

    * k_pages and v_pages, but for the newest token of each row (the last of its `length`),
    * page_table and lengths, and the plan that is computed here from lengths and window. That is
      so if the same program attended with the same three before; not in a program's first
      attention, since XLA may compute any of these directly ahead of it.

    `rope_write` lets the next kernel start after its own wait (`mosaic.take_turn`), when all before
    it is complete. So a decoding step may set `early` from the second layer on if `rope_write` gets
    one token of each row and nothing between it and this kernel writes to pages. Directly after a
    product nobody may, unless the promise holds before the product too: products let the next
    kernel start at once. Nor who writes several tokens of a row, copies pages or writes them by XLA
    directly ahead. A broken promise is a race: wrong results at times, or reads at places that a
    stale plan names.

    Args:
      q: [B, Hq, D] bfloat16 or float16, D one of 64, 96, 128, 256.
      k_pages: [P, S, Hkv, D] in q's dtype, S one of 16, 32, 64, Hq / Hkv a whole number up to 16.
      v_pages: as k_pages.
      page_table: [B, W] int32, page ids of each row in order. Only the entries that hold a row's
        tokens are read (one entry in a padded row).
      lengths: [B] int32, visible tokens of each row with the current one; 0 marks a padded row.
        Pages must hold finite values in the unused part of a row's last page.
      scale: of the scores; D**-0.5 by default.
      window: only the last `window` tokens are visible.
      soft_cap: scores become soft_cap * tanh(score / soft_cap) after scaling.
      phi: the unified value in natural-log units of the scaled (and capped) scores: a number, or
        [Hq] float32. 0 by default.
      softmax: "async"; "sync" keeps a running maximum and rescales at every tile; "lazy" rescales
        only when the maximum grows by more than 2^8. The latter two need no phi and no guard.
      return_lse: also return lse.
      early: the first keys and values are read before the kernel ahead of this one has ended
        (programmatic dependent launch). q and the 64 tokens around each row's newest one are read
        after its end in any case. See above for who may set it.
      config: tunables; picked from the shape by default.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU, None for the GPU.

    Returns:
      A `DecodeAttention`.

    Raises:
      NotImplementedError: a dtype, or a number of rows, head size, page size or group size that is
        not supported.
      ValueError: arguments that do not fit together, or a scale, window or cap that is not
        positive.
    """
    _check(q, k_pages, v_pages, page_table, lengths, scale, window, soft_cap, softmax)
    batch, heads, size = q.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    config = config or configs.choose(size, group, batch, kv_heads)
    blocks = configs.blocks_per_head(config, kv_heads, batch)
    if phi is None or softmax != "async":
        phi = 0.0
    if isinstance(phi, (int, float)):
        fixed, table = float(phi), None
    else:
        table = jnp.asarray(phi, jnp.float32)
        if table.shape not in ((), (heads,)):
            raise ValueError(f"phi has shape {table.shape}, expected () or ({heads},)")
        fixed, table = None, jnp.broadcast_to(table, (heads,))
    spec = Spec(
        group=group,
        head_size=size,
        page_size=k_pages.shape[1],
        dtype=q.dtype.name,
        scale=float(size**-0.5 if scale is None else scale),
        window=window,
        soft_cap=soft_cap,
        phi=fixed,
        softmax=softmax,
        return_lse=return_lse,
        blocks=blocks,
        early=early,
        config=config,
    )
    # Outside the jitted launch, so that XLA sees that all layers of a step share it.
    plan = make_plan(lengths, window, blocks, config.min_tiles)
    out, recomputed, lse = _launch(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        plan,
        table,
        counters(blocks * kv_heads),
        spec=spec,
        interpret=interpret,
    )
    return DecodeAttention(out, lse, recomputed)


def _check(q, k_pages, v_pages, page_table, lengths, scale, window, soft_cap, softmax) -> None:
    checks.paged(q, k_pages, v_pages)
    batch, heads, _ = q.shape
    group = heads // k_pages.shape[2]
    if page_table.ndim != 2 or page_table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(
            f"page_table {page_table.shape} and lengths {lengths.shape} must have {batch} rows"
        )
    checks.int32(page_table=page_table, lengths=lengths)
    if softmax not in ("async", "sync", "lazy"):
        raise ValueError(f"softmax is {softmax!r}, expected 'async', 'sync' or 'lazy'")
    checks.scores(scale, window, soft_cap)
    if not 0 < batch <= configs.MAX_BATCH:
        raise NotImplementedError(f"{batch} rows; supported are 1 to {configs.MAX_BATCH}")
    if group > configs.MAX_GROUP:
        raise NotImplementedError(
            f"{group} query heads a kv head; supported are 1 to {configs.MAX_GROUP}"
        )
