"""Attention over paged keys and values, and the store into pages.

Shapes: `B` decoding sequences, `N` sequences with a prompt chunk, `T` chunk tokens in all, `P`
pages of `S` tokens, `W` entries of a page table row, `Hq`/`Hkv` heads of size `D`.
Entries of a page table past a sequence's length must be valid page ids; what those pages hold is
masked, and must be finite.
"""

import math

import jax
import jax.numpy as jnp

from jpd.ops.registry import Op, register

decode_attention = Op("decode_attention")
"""decode_attention(q, k_pages, v_pages, page_table, lengths, *, scale, window=None).

Attends one new token per sequence over its paged KV: q `[B, Hq, D]`, pages `[P, S, Hkv, D]`,
page_table `[B, W]` int32, lengths `[B]` int32 tokens in the cache with the new one (0 marks a
padded row, whose output is zero). `window`: only the last `window` tokens are seen.
Returns `[B, Hq, D]`.
"""

prefill_attention = Op("prefill_attention")
"""prefill_attention(q, k_pages, v_pages, page_table, starts, counts, contexts, *, scale, window).

Causal attention of prompt chunks over their paged prefix and themselves (already in the pages):
q `[T, Hq, D]`; sequence n owns tokens `starts[n] : starts[n] + counts[n]`, which are the last of
its `contexts[n]` tokens. Starts ascend. Tokens of no sequence give zeros. Returns `[T, Hq, D]`.
"""

write_kv = Op("write_kv")
"""write_kv(k_pages, v_pages, k, v, slots) -> (k_pages, v_pages).

Stores k and v `[T, Hkv, D]` at flat positions `slots` `[T]` = page * S + offset, in place when the
pages are donated.
"""

_NEG_INF = -1e30
BLOCK_BYTES = 1 << 30
"""Most that the gathered pages or the scores of one block may take."""
_TILE = 64


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

    def block(table, first_page):
        """Unnormalised output, row sum and row maximum over the pages of `table`."""
        keys = k_pages[table].reshape(rows, -1, kv_heads, size)
        values = v_pages[table].reshape(rows, -1, kv_heads, size)
        at = first_page * page_size + jnp.arange(keys.shape[1])
        seen = at <= positions[:, :, None]
        if window is not None:
            seen &= at > positions[:, :, None] - window
        seen = seen[:, None, None]  # [R, 1, 1, Q, tokens]
        scores = jnp.einsum(
            "rqhgd,rthd->rhgqt", q, keys, precision=precision, preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen, scores * scale, _NEG_INF)
        peak = scores.max(-1)
        weights = jnp.where(seen, jnp.exp(scores - peak[..., None]), 0.0)
        out = jnp.einsum(
            "rhgqt,rthd->rhgqd",
            weights.astype(values.dtype),
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return out, weights.sum(-1), peak

    pages_in_table = page_table.shape[1]
    # With one query for each key XLA's products are sums that read the pages where they are.
    gathers = group * queries > 1
    gathered_bytes = gathers * 2 * rows * kv_heads * size * k_pages.dtype.itemsize
    per_page = page_size * max(gathered_bytes, 4 * rows * queries * heads)
    blocks = math.ceil(pages_in_table / max(1, BLOCK_BYTES // per_page))
    width = math.ceil(pages_in_table / blocks)
    if blocks == 1:
        out, total, _ = block(page_table, 0)
    else:
        table = jnp.pad(page_table, ((0, 0), (0, blocks * width - pages_in_table)))
        table = table.reshape(rows, blocks, width).swapaxes(0, 1)

        def step(carry, xs):
            out, total, peak = carry
            new_out, new_total, new_peak = block(*xs)
            top = jnp.maximum(peak, new_peak)
            old, new = jnp.exp(peak - top), jnp.exp(new_peak - top)
            return (
                out * old[..., None] + new_out * new[..., None],
                total * old + new_total * new,
                top,
            ), None

        shape = (rows, kv_heads, group, queries)
        zero = (
            jnp.zeros((*shape, size), jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.full(shape, _NEG_INF, jnp.float32),
        )
        (out, total, _), _ = jax.lax.scan(step, zero, (table, jnp.arange(blocks) * width))
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(rows, queries, heads, size).astype(q.dtype)


def decode_attention_xla(q, k_pages, v_pages, page_table, lengths, *, scale, window=None):
    """Gathers each row's pages and attends with XLA's dots."""
    out = _paged_attention(
        q[:, None],
        k_pages,
        v_pages,
        page_table,
        lengths[:, None] - 1,
        scale=scale,
        window=window,
    )
    return out[:, 0]


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


def write_kv_xla(k_pages, v_pages, k, v, slots):
    """A scatter of rows; one row is an update of a slice, which XLA runs in one kernel."""

    def store(pages, rows):
        flat, rows = pages.reshape(-1, *pages.shape[2:]), rows.astype(pages.dtype)
        if len(rows) == 1:
            flat = jax.lax.dynamic_update_slice(flat, rows, (slots[0], 0, 0))
        else:
            flat = flat.at[slots].set(rows)
        return flat.reshape(pages.shape)

    return store(k_pages, k), store(v_pages, v)


register("decode_attention", "xla", decode_attention_xla)
register("prefill_attention", "xla", prefill_attention_xla)
register("write_kv", "xla", write_kv_xla)
