"""Attention over paged keys and values.

Shapes: `B` decoding sequences, `N` sequences with a prompt chunk, `T` chunk tokens in all, `P`
pages of `S` tokens, `W` entries of a page table row, `Hq`/`Hkv` heads of size `D`.
Entries of a page table past a sequence's length must be valid page ids; what those pages hold is
masked, and must be finite.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jpd.ops.registry import Op, register


class DecodeAttention(NamedTuple):
    """What decode attention gives."""

    out: jax.Array
    """`[B, Hq, D]`."""
    recomputed: jax.Array | None = None
    """`[B, Hkv]` int32: softmax rows that left the range of asynchronous softmax and were computed
    again with their own maximum; None where every row has its own maximum anyway."""


decode_attention = Op("decode_attention")
"""decode_attention(q, k_pages, v_pages, page_table, lengths, *, scale, window=None, phi=None,
early=False).

Attends one new token per sequence over its paged KV: q `[B, Hq, D]`, pages `[P, S, Hkv, D]`,
page_table `[B, W]` int32, lengths `[B]` int32 tokens in the cache with the new one (0 marks a
padded row, whose output is zero). `window`: only the last `window` tokens are seen. `phi`: `[Hq]`
float32, the value near the log-sum-exp of a head's scaled scores that asynchronous softmax
subtracts from them (FlashDecoding++, section 3); it changes no result, only how often rows are
computed again. Returns a `DecodeAttention`.

`early`: keys and values may be read before the kernel ahead has ended. The caller promises that
the pages come right from `rope_write`, which was given no token of these rows but the newest, and
that the program has attended with the same page_table, lengths and window before (so that they, and
what is computed from them, are there). An implementation that does not overlap kernels, such as
XLA's, ignores it.
"""

prefill_attention = Op("prefill_attention")
"""prefill_attention(q, k_pages, v_pages, page_table, starts, counts, contexts, *, scale, window).

Causal attention of prompt chunks over their paged prefix and themselves (already in the pages):
q `[T, Hq, D]`; sequence n owns tokens `starts[n] : starts[n] + counts[n]`, which are the last of
its `contexts[n]` tokens. Starts ascend. Tokens of no sequence give zeros. Returns `[T, Hq, D]`.
"""

_NEG_INF = -1e30
BLOCK_BYTES = 1 << 30
"""Most that the gathered pages or the scores of one block may take."""
_TILE = 64
_SINGLE_ROW_SPLITS = 4


def _paged_attention(q, k_pages, v_pages, page_table, positions, *, scale, window):
    """Online-softmax attention in blocks of pages small enough for the device memory.

    q `[R, Q, Hq, D]`, page_table `[R, W]`, positions `[R, Q]` of each query in its sequence, -1
    for none. Returns `[R, Q, Hq, D]`.
    """
    rows, queries, heads, size = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(rows, queries, kv_heads, group, size)
    products = {"precision": precision, "preferred_element_type": jnp.float32}

    def scores_and_values(table, first_page):
        """Masked scores `[R, Hkv, G, Q, tokens]` float32 and values `[R, tokens, Hkv, D]`."""
        keys = k_pages[table].reshape(rows, -1, kv_heads, size)
        values = v_pages[table].reshape(rows, -1, kv_heads, size)
        at = first_page * page_size + jnp.arange(keys.shape[1])
        seen = at <= positions[:, :, None]
        if window is not None:
            seen &= at > positions[:, :, None] - window
        scores = jnp.einsum("rqhgd,rthd->rhgqt", q, keys, **products) * scale
        return jnp.where(seen[:, None, None], scores, _NEG_INF), values

    def weigh(weights, values):
        return jnp.einsum("rhgqt,rthd->rhgqd", weights.astype(values.dtype), values, **products)

    pages_in_table = page_table.shape[1]
    gathered_bytes = 2 * rows * kv_heads * size * k_pages.dtype.itemsize
    per_page = page_size * max(gathered_bytes, 4 * rows * queries * heads)
    blocks = math.ceil(pages_in_table / max(1, BLOCK_BYTES // per_page))
    width = math.ceil(pages_in_table / blocks)
    if blocks == 1:
        scores, values = scores_and_values(page_table, 0)
        out = weigh(jax.nn.softmax(scores, axis=-1), values)
    else:
        table = jnp.pad(page_table, ((0, 0), (0, blocks * width - pages_in_table)))
        table = table.reshape(rows, blocks, width).swapaxes(0, 1)

        def step(carry, xs):
            out, total, peak = carry
            scores, values = scores_and_values(*xs)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - new_peak[..., None])
            keep = jnp.exp(peak - new_peak)
            out = out * keep[..., None] + weigh(weights, values)
            return (out, total * keep + weights.sum(-1), new_peak), None

        shape = (rows, kv_heads, group, queries)
        zero = (
            jnp.zeros((*shape, size), jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.full(shape, _NEG_INF, jnp.float32),
        )
        (out, total, _), _ = jax.lax.scan(step, zero, (table, jnp.arange(blocks) * width))
        out = out / total[..., None]
    # A query without a position saw nothing but the mask; its mean over everything is no result.
    out = jnp.where(positions[:, None, None, :, None] < 0, 0.0, out)
    return jnp.moveaxis(out, 3, 1).reshape(rows, queries, heads, size).astype(q.dtype)


def _multi_head_decode(q, k_pages, v_pages, page_table, lengths, *, scale, window):
    """Decode attention where every query head has keys of its own.

    Nothing is used twice, so products and sums are as good as dots, and on a GPU XLA reads the
    pages where they are, with no gathered copy (on a CPU it makes one). The barrier and the
    layouts see to it; without them XLA rotates q again for every key and writes a transposed copy
    of the values.
    """
    rows, heads, size = q.shape
    q, k_pages, v_pages = jax.lax.optimization_barrier((q, k_pages, v_pages))
    keys = k_pages[page_table].reshape(rows, -1, heads, size)
    values = v_pages[page_table].reshape(rows, -1, heads, size)
    at = jnp.arange(keys.shape[1])
    seen = at < lengths[:, None]
    if window is not None:
        seen &= at >= lengths[:, None] - window
    scores = (q[:, None].astype(jnp.float32) * keys.astype(jnp.float32)).sum(-1)
    scores = with_layout_constraint(scores.swapaxes(1, 2), Layout((0, 1, 2)))
    scores = jax.lax.optimization_barrier(scores) * scale
    scores = jnp.where(seen[:, None], scores, _NEG_INF)
    weights = with_layout_constraint(jax.nn.softmax(scores, axis=-1), Layout((0, 1, 2)))
    weights = weights.swapaxes(1, 2)[..., None]
    # A single row is summed in parts, which keep more of the chip busy.
    splits = math.gcd(_SINGLE_ROW_SPLITS, keys.shape[1]) if rows == 1 else 1
    parts = (weights * values.astype(jnp.float32)).reshape(rows, splits, -1, heads, size)
    parts = with_layout_constraint(parts, Layout((0, 1, 2, 3, 4)))
    out = jax.lax.optimization_barrier(parts.sum(2)).sum(1)
    return jnp.where(lengths[:, None, None] > 0, out, 0.0).astype(q.dtype)


def decode_attention_xla(
    q, k_pages, v_pages, page_table, lengths, *, scale, window=None, phi=None, early=False
):
    """Sums over the pages with a key for each query head, else gathers and dots."""
    del phi, early  # the softmax here takes the maximum of every row; XLA orders its kernels
    if q.shape[1] == k_pages.shape[2]:
        return DecodeAttention(
            _multi_head_decode(q, k_pages, v_pages, page_table, lengths, scale=scale, window=window)
        )
    out = _paged_attention(
        q[:, None],
        k_pages,
        v_pages,
        page_table,
        lengths[:, None] - 1,
        scale=scale,
        window=window,
    )
    return DecodeAttention(out[:, 0])


def prefill_attention_xla(
    q, k_pages, v_pages, page_table, starts, counts, contexts, *, scale, window=None
):
    """Cuts the chunks into tiles of queries of one sequence and gathers the pages of each tile."""
    tokens, sequences = q.shape[0], page_table.shape[0]
    tile = min(_TILE, tokens)
    tiles_of = -(-counts // tile)
    ends = jnp.cumsum(tiles_of)
    tile_ids = jnp.arange(tokens // tile + sequences)  # no packing of the chunks needs more tiles
    owner = jnp.searchsorted(ends, tile_ids, side="right")
    used = owner < sequences
    owner = jnp.minimum(owner, sequences - 1)
    offset = (tile_ids - (ends - tiles_of)[owner]) * tile
    inside = offset[:, None] + jnp.arange(tile)
    valid = used[:, None] & (inside < counts[owner, None])
    index = jnp.where(valid, starts[owner, None] + inside, tokens)
    positions = jnp.where(valid, (contexts - counts)[owner, None] + inside, -1)
    out = _paged_attention(
        q.at[index].get(mode="fill", fill_value=0),
        k_pages,
        v_pages,
        page_table[owner],
        positions,
        scale=scale,
        window=window,
    )
    flat = out.reshape(-1, *q.shape[1:])
    return jnp.zeros_like(q).at[index.reshape(-1)].set(flat, mode="drop")


register("decode_attention", "xla", decode_attention_xla)
register("prefill_attention", "xla", prefill_attention_xla)
