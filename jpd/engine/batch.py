"""A step plan as one padded int32 array: one transfer to the device for each step.

`pack` fills it on the host, `unpack` cuts it up again inside the compiled step. No jax here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from jpd.engine.plan import StepPlan
from jpd.engine.shapes import StepShape


class Batch(NamedTuple):
    """Arrays of a step with `B` decoding rows, `T` prompt tokens, `N` chunks, `W` pages a row.

    Padded decoding rows and tokens have position -1; padded chunks have count 0.
    """

    tokens: Any
    """`[B]` newest token, -1 to take it from the history on the device."""
    positions: Any
    """`[B]`"""
    rows: Any
    """`[B]` row in the history; padded rows have the last one, which nobody owns."""
    page_table: Any
    """`[B, W]`"""
    chunk_tokens: Any
    """`[T]`"""
    chunk_positions: Any
    """`[T]`"""
    chunk_of_token: Any
    """`[T]` which chunk a token belongs to."""
    chunk_starts: Any
    """`[N]` first token of each chunk."""
    chunk_counts: Any
    """`[N]`"""
    chunk_contexts: Any
    """`[N]` tokens of the sequence up to the chunk's end."""
    chunk_rows: Any
    """`[N]` row in the history; the unowned one unless the chunk ends its prompt."""
    chunk_page_table: Any
    """`[N, W]`"""


def _layout(shape: StepShape, chunks: int, page_size: int) -> list[tuple[int, ...]]:
    batch, tokens = shape.batch, shape.tokens
    chunks = chunks if tokens else 0
    width = shape.context // page_size
    return [
        *[(batch,)] * 3,
        (batch, width),
        *[(tokens,)] * 3,
        *[(chunks,)] * 4,
        (chunks, width),
    ]


_ALIGNMENT = 64
"""Every part starts at a multiple of so many numbers: 256 bytes. XLA may hand a kernel a slice
without a copy, and Mosaic's kernels take no address that is not a multiple of that."""


def _padded(numbers: int) -> int:
    return -(-numbers // _ALIGNMENT) * _ALIGNMENT


def packed_size(shape: StepShape, chunks: int, page_size: int) -> int:
    """Numbers in the packed array."""
    return sum(_padded(math.prod(s)) for s in _layout(shape, chunks, page_size))


def unpack(flat: Any, shape: StepShape, chunks: int, page_size: int) -> Batch:
    """Views of the packed array (of NumPy or jax), in the order of `Batch`."""
    parts, start = [], 0
    for part in _layout(shape, chunks, page_size):
        numbers = math.prod(part)
        parts.append(flat[start : start + numbers].reshape(part))
        start += _padded(numbers)
    return Batch(*parts)


def pack(
    plan: StepPlan, shape: StepShape, *, chunks: int, page_size: int, unowned_row: int
) -> np.ndarray:
    """The packed array `[packed_size]` int32 of a plan that fits the shape."""
    flat = np.zeros(packed_size(shape, chunks, page_size), np.int32)
    out = unpack(flat, shape, chunks, page_size)
    count, width = plan.page_table.shape
    out.tokens[:count] = plan.tokens
    out.positions[:count] = plan.positions
    out.positions[count:] = -1
    out.rows[:count] = plan.rows
    out.rows[count:] = unowned_row
    out.page_table[:count, :width] = plan.page_table
    out.chunk_positions[:] = -1
    out.chunk_rows[:] = unowned_row
    start = 0
    for n, chunk in enumerate(plan.chunks):
        stop = start + len(chunk.tokens)
        out.chunk_tokens[start:stop] = chunk.tokens
        out.chunk_positions[start:stop] = np.arange(chunk.start, chunk.end)
        out.chunk_of_token[start:stop] = n
        out.chunk_starts[n] = start
        out.chunk_counts[n] = len(chunk.tokens)
        out.chunk_contexts[n] = chunk.end
        if chunk.last:
            out.chunk_rows[n] = chunk.row
        start = stop
    out.chunk_page_table[: len(plan.chunks), :width] = plan.chunk_page_table
    out.chunk_starts[len(plan.chunks) :] = start
    return flat
