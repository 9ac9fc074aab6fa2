"""What layers that are split over ranks do beside their own products.

The layers of a model are written once. Under tensor parallelism each rank runs them on fewer heads
and channels, and these ops make up for what the other ranks have (Megatron-LM, arXiv 1909.08053,
section 3). Outside of `over_ranks`, and for logical axes that are not cut, they are the plain op.
The names of axes are those of `jpd.parallel.rules`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpd.ops.linear import linear
from jpd.ops.normed import Unnormed
from jpd.ops.overlap import Packed, matmul_all_reduce, rms_norm_residual


@dataclass(frozen=True)
class Ranks:
    """What the program that is being traced is split over."""

    axis: str
    """Of the mesh of the `shard_map` around."""
    cut: Set[str]
    """Logical axes of which a rank has a part only."""
    overlap: bool
    """Sums hide behind the products that make them, where a kernel and a plan for it are."""


_RANKS: ContextVar[Ranks | None] = ContextVar("jpd_ranks", default=None)


@contextlib.contextmanager
def over_ranks(ranks: Ranks) -> Iterator[None]:
    """The programs traced inside the block are one rank's."""
    token = _RANKS.set(ranks)
    try:
        yield
    finally:
        _RANKS.reset(token)


def _of(name: str) -> Ranks | None:
    """The ranks that a logical axis is cut over."""
    ranks = _RANKS.get()
    return ranks if ranks is not None and name in ranks.cut else None


class Unadded(NamedTuple):
    """A residual stream to which a sum over ranks is still to be added, by the next norm."""

    stream: jax.Array
    """`[M, N]`."""
    output: jax.Array | Packed


Stream = jax.Array | Unadded
"""A residual stream `[M, N]`, for `normed_stream`."""


def summed_linear(
    x: jax.Array,
    weight: jax.Array,
    *,
    over: str,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> Stream:
    """A row-parallel layer: `linear` whose inputs are cut, summed over the ranks.

    Args:
      x: `[M, K]`, this rank's inputs.
      weight: `[N, K]`, this rank's columns; like every layer's, it is not computed by the program.
      over: logical axis of the inputs.
      bias: `[N]`, whole on every rank; added once, after the sum.
      residual: `[M, N]`, whole on every rank; likewise.

    Returns:
      `[M, N]`, whole on every rank. With a residual it is a stream, which is not added up yet where
      ranks are summed over.
    """
    ranks = _of(over)
    if ranks is None:
        return linear(x, weight, bias=bias, residual=residual)
    if ranks.overlap:
        last = bias is None and residual is not None  # the next to read it is a norm
        y = matmul_all_reduce(x, weight, ranks.axis, packed=last, resident=True)
    else:
        y = lax.psum(linear(x, weight), ranks.axis)
    y = y if bias is None else y + bias
    return y if residual is None else Unadded(residual, y)


def normed_stream(
    x: Stream, weight: jax.Array, eps: float
) -> tuple[jax.Array | Unnormed, jax.Array]:
    """The RMS norm of a residual stream, or the stream for a product to normalise, and the stream.

    Args:
      x: what a layer left to be added to it is added first.
      weight: `[N]` of the norm.
      eps: added to the mean square.

    Returns:
      Both `[M, N]`.
    """
    if isinstance(x, Unadded):
        return rms_norm_residual(x.output, x.stream, weight, eps)
    return Unnormed(x, weight, eps), x


def embedding(tokens: jax.Array, weight: jax.Array) -> jax.Array:
    """Vectors `[T, E]` of token ids `[T]`; weight `[V, E]`, or this rank's tokens of it.

    Each token is on one rank, so that the sum over ranks adds zeros to it and rounds nothing.
    """
    ranks = _of("vocab")
    if ranks is None:
        return weight[tokens]
    here = tokens - lax.axis_index(ranks.axis) * weight.shape[0]
    found = weight.at[here].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return lax.psum(found, ranks.axis)


def gathered_logits(y: jax.Array) -> jax.Array:
    """Logits `[M, V]` of all tokens, of this rank's `[M, V / ranks]`.

    The same bits on all ranks, as each number was computed on one: all sample the same tokens.
    """
    ranks = _of("vocab")
    return y if ranks is None else lax.all_gather(y, ranks.axis, axis=1, tiled=True)


def summed_count(count: jax.Array | None) -> jax.Array | None:
    """A rank's count of events in its heads, over all ranks."""
    ranks = _of("heads")
    return count if ranks is None or count is None else lax.psum(count, ranks.axis)


def own_heads(table: jax.Array | None) -> jax.Array | None:
    """This rank's columns of a table `[L, Hq]` with one number for each query head."""
    ranks = _of("heads")
    if ranks is None or table is None:
        return table
    heads = table.shape[1] // lax.axis_size(ranks.axis)
    start = lax.axis_index(ranks.axis) * heads
    return lax.dynamic_slice_in_dim(jnp.asarray(table), start, heads, axis=1)
