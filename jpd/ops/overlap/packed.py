"""Results in the order in which their tiles were sent, and what reads them.

A GEMM that signals stores its tiles group after group, not row after row (FlashOverlap, arXiv
2504.19519, section 3.3). Whoever reads the result puts it in order again: `rms_norm_residual` while
it reads it anyway (section 3.3.5 of the paper), `unpack` in a pass of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpd.ops import pallas, registry
from jpd.ops.norm import rms_norm, rms_norm_xla
from jpd.ops.overlap.op import OverlapOp


@dataclass(frozen=True)
class Layout:
    """Where the parts of a matrix `[m, n]` lie in a packed buffer; see
    `pallas_kernels.signal_gemm.layout`."""

    m: int
    """Rows of the matrix: of a reduce-scatter those that this rank got."""
    n: int
    part_m: int
    """Rows of a part, the unit that is sent to one rank."""
    config: Any
    """The `SignalConfig` that cut the product up."""
    groups: tuple[int, ...]
    """Tiles of each group."""
    ranks: int = 1
    """Blocks of rows in the buffer: the senders of an all-to-all, else 1."""

    def where(self) -> np.ndarray:
        """`[ranks, rows, columns]`: which slot of the buffer holds which part of the matrix."""
        from pallas_kernels.signal_gemm import layout, schedule

        rows, columns = -(-(self.m // self.ranks) // self.part_m), -(-self.n // self.config.tile_n)
        schedule.check_groups(self.groups, rows * columns)
        order = schedule.tile_order(
            rows, columns, self.config.grid_minor, self.config.grid_tile_width
        )
        where = np.empty((self.ranks, rows, columns), np.int32)
        where[:, order[:, 0], order[:, 1]] = layout.slots(self.groups, self.ranks).T
        return where


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["layout"])
@dataclass(frozen=True)
class Packed:
    """A matrix as it was sent. A pytree, so that it may leave a `jit`, not a `shard_map`."""

    data: jax.Array
    """`[parts, part_m, tile_n]`."""
    layout: Layout


def unpack(y: Packed | jax.Array) -> jax.Array:
    """The matrix `[M, N]` in the order of its rows; an array is returned as it is.

    A gather of runs of `tile_n` numbers, whose indices follow from a table of one number a tile.

    Raises:
      ValueError: the buffer has another shape than its layout says.
    """
    if not isinstance(y, Packed):
        return y
    layout, tile_n = y.layout, y.layout.config.tile_n
    where = layout.where()
    if y.data.shape != (where.size, layout.part_m, tile_n):
        raise ValueError(f"the buffer is {y.data.shape}, which is not {layout}")
    ranks, _, columns = where.shape
    within = jnp.arange(layout.part_m, dtype=jnp.int32)[:, None]
    rows = jnp.asarray(where)[:, :, None] * layout.part_m + within
    rows = rows.reshape(ranks, -1, columns)[:, : layout.m // ranks].reshape(layout.m, columns)
    runs = y.data.reshape(-1, tile_n).at[rows]
    found = runs.get(mode="promise_in_bounds", unique_indices=True, wrap_negative_indices=False)
    return found.reshape(layout.m, -1)[:, : layout.n]


def rms_norm_residual(
    y: Packed | jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Adds the residual stream and norms the sum; reads packed results where they lie.

    What follows an attention or an MLP whose output weight is split over ranks.
    `Settings.reorder` selects how.

    Args:
      y: `[M, N]`, packed or not.
      residual: `[M, N]`.
      weight: `[N]` of the norm.
      eps: added to the mean square.

    Returns:
      The normed sum and the sum, both `[M, N]`.

    Raises:
      ValueError: shapes that do not fit together.
    """
    shape = (y.layout.m, y.layout.n) if isinstance(y, Packed) else y.shape
    if residual.shape != shape or weight.shape != shape[1:]:
        raise ValueError(f"y {shape}, residual {residual.shape}, weight {weight.shape}")
    return _norm(y, residual, weight, eps)


def _check_selection(name: str) -> None:
    """Raises NotImplementedError if the op `rms_norm` is not to be computed by `name`, nor by a
    kernel that may as well be that."""
    selected = registry.selection()
    asked = rms_norm.candidates(selected.rms_norm, pallas_only=selected.pallas_only)
    if asked[0] not in (name, pallas.NAME) or name not in asked:
        raise NotImplementedError(f"rms_norm is to be computed by {' or '.join(asked)}")


def _by_kernel(
    y: Packed | jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """One launch, that reads and writes everything once.

    Raises:
      NotImplementedError: no kernel for this device, layout, dtype or width, or another one of the
        op `rms_norm` is asked for.
    """
    _check_selection(pallas.NAME)
    interpret = pallas.interpret_mode()
    from pallas_kernels.rms_norm import rms_norm_residual

    tiling = None
    if isinstance(y, Packed):
        if y.layout.ranks > 1:
            raise NotImplementedError(f"the kernel reads no blocks of {y.layout.ranks} senders")
        y, tiling = y.data, y.layout.config
    return rms_norm_residual(y, residual, weight, eps=eps, tiling=tiling, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _with_gradient(
    y: Packed | jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    return _by_kernel(y, residual, weight, eps)


def _with_gradient_forward(y: Any, residual: jax.Array, weight: jax.Array, eps: float) -> Any:
    return _by_kernel(y, residual, weight, eps), (y, residual, weight)


def _with_gradient_backward(eps: float, arrays: Any, g: Any) -> Any:
    return jax.vjp(functools.partial(_composed, eps=eps), *arrays)[1](g)


_with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)


def _composed(
    y: Packed | jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    total = residual + unpack(y)
    return rms_norm_xla(total, weight, eps), total


def _by_xla(
    y: Packed | jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The gather is part of the program that adds and norms, for XLA to fuse.

    Raises:
      NotImplementedError: another implementation of the op `rms_norm` is asked for.
    """
    _check_selection("xla")
    return _composed(y, residual, weight, eps)


def _alone(
    y: Packed | jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Put in order while it is added, before the norm, which is that of the op `rms_norm`."""
    total = residual + unpack(y)
    return rms_norm(total, weight, eps), total


_norm = OverlapOp(
    "rms_norm_residual",
    "reorder",
    {pallas.NAME: _with_gradient, "xla": _by_xla, "alone": _alone},
)
