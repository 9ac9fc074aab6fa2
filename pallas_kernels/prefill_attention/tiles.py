"""Which query tile belongs to which sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SEQUENCE, ROW, FIRST, LAST, POSITION = range(5)
"""Columns of the map: the page table's row, the tile's first token, which of the tile's rows are
its own (`FIRST <= row < LAST`), and the position in the sequence of row 0."""
ALIGNMENT = 8
"""Tiles begin at multiples of this, as tiled TMA wants: the first tile of a chunk may begin with
rows of the chunk before, which it leaves alone."""


def tile_slots(tokens: int, sequences: int, rows: int) -> int:
    """Tiles of `rows` tokens that any packing of `tokens` into `sequences` chunks may need.

    The tokens of no sequence at the end count as one more chunk.
    """
    return (tokens + (sequences + 1) * (rows + ALIGNMENT - 2)) // rows


def tile_map(
    starts: jax.Array,
    counts: jax.Array,
    contexts: jax.Array,
    *,
    tokens: int,
    rows: int,
    window: int | None = None,
) -> jax.Array:
    """Cuts every chunk into tiles of `rows` tokens, those that see most keys first.

    All layers of a model share the map: XLA finds it equal (common subexpressions) as long as it
    is outside the kernel's own jit. Tiles of tokens of no sequence have position `-LAST`, so that
    they see no key; slots that no tile needs are all zeros and come last.

    Returns:
      `[tile_slots + 1, 5]` int32: SEQUENCE, ROW, FIRST, LAST, POSITION of each tile, and in the
      last row the number of tiles.
    """
    sequences = starts.shape[0]
    end = jnp.sum(counts, dtype=jnp.int32)
    starts = jnp.append(starts.astype(jnp.int32), end)
    counts = jnp.append(counts.astype(jnp.int32), tokens - end)
    prefixes = jnp.append(contexts.astype(jnp.int32), 0) - counts

    lead = starts % ALIGNMENT
    needed = jnp.where(counts > 0, -(-(lead + counts) // rows), 0)
    ends = jnp.cumsum(needed)
    slot = jnp.arange(tile_slots(tokens, sequences, rows), dtype=jnp.int32)
    owner = jnp.sum(slot[:, None] >= ends, axis=1, dtype=jnp.int32)  # past the end: sequences + 1
    used = owner <= sequences
    owner = jnp.minimum(owner, sequences)
    offset = (slot - (ends - needed)[owner]) * rows
    first = jnp.maximum(lead[owner] - offset, 0)
    last = jnp.minimum(lead[owner] + counts[owner] - offset, rows)
    padded = owner == sequences
    position = jnp.where(padded, -last, prefixes[owner] - lead[owner] + offset)
    row = starts[owner] - lead[owner] + offset
    columns = jnp.stack([jnp.where(padded, 0, owner), row, first, last, position], axis=1)
    columns = jnp.where(used[:, None], columns, 0)

    # Ranks by counting: one small fusion, where a sort would be several kernels.
    cost = position + last
    if window is not None:
        cost = jnp.minimum(cost, window + rows)
    cost = jnp.where(used, cost, -1)
    ahead = (cost > cost[:, None]) | ((cost == cost[:, None]) & (slot < slot[:, None]))
    rank = jnp.sum(ahead, axis=1, dtype=jnp.int32)
    chosen = rank == slot[:, None]  # [place, tile]
    ordered = jnp.sum(jnp.where(chosen[:, :, None], columns, 0), axis=1, dtype=jnp.int32)
    return jnp.concatenate([ordered, jnp.broadcast_to(ends[-1], (1, columns.shape[1]))])
