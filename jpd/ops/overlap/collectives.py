"""Product, then collective: the public ops and their gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from jpd.ops.linear import linear_xla
from jpd.ops.overlap import gpu, grouped, plain
from jpd.ops.overlap.op import OverlapOp
from jpd.ops.overlap.packed import Packed, unpack
from jpd.overlap import OPS, Plan

_MODULES = {"overlap": gpu, "xla": plain, "grouped": grouped}
"""In each a `matmul_collective` (op, x, w, axis_name, plan, resident) -> array or Packed."""
_TABLE = {
    op: OverlapOp(
        f"matmul_{op}",
        "implementation",
        {name: functools.partial(m.matmul_collective, op) for name, m in _MODULES.items()},
        on_request=("grouped",),
    )
    for op in OPS
}


@dataclass(frozen=True)
class _Call:
    """What is not differentiated."""

    op: str
    axis_name: Any
    plan: Plan | None
    implementation: str | None
    packed: bool
    resident: bool


def matmul_all_reduce(
    x: jax.Array,
    w: jax.Array,
    axis_name: Any,
    *,
    plan: Plan | None = None,
    packed: bool = False,
    implementation: str | None = None,
    resident: bool = False,
) -> jax.Array | Packed:
    """`lax.psum(x @ w.T, axis_name)`: a row-parallel linear layer, K is split over the ranks.

    FlashOverlap, arXiv 2504.19519, sections 3.2 and 3.3.

    Args:
      x: `[M, K]`, this rank's columns.
      w: `[N, K]`, this rank's columns.
      axis_name: mesh axis of the `shard_map` around; only a single one can be overlapped.
      plan: groups, SMs and tiles, for M, N and K as this rank has them; looked up when not given.
        It changes no result. Where one is given that cannot be followed here, XLA runs.
      packed: the result may be a `Packed`, for `rms_norm_residual` or `unpack`.
      implementation: of `Settings.implementation`.
      resident: w was complete before the program began, as a parameter is that nothing computes in
        it. Where the product does not overlap, a kernel may then read it early. With any other w it
        is XLA's product there, whatever `kernels.linear` names.

    Returns:
      `[M, N]` in x's dtype, equal on all ranks. Sums over K are float32, rounded once, and then
      summed over ranks in x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or a plan for another op, number of
        ranks or shape.
      ConfigError: only kernels may run, nothing overlaps, and w is not resident.
    """
    return _run(x, w, _Call("all_reduce", axis_name, plan, implementation, packed, resident))


def matmul_reduce_scatter(
    x: jax.Array,
    w: jax.Array,
    axis_name: Any,
    *,
    plan: Plan | None = None,
    packed: bool = False,
    implementation: str | None = None,
    resident: bool = False,
) -> jax.Array | Packed:
    """`lax.psum_scatter(x @ w.T, axis_name, tiled=True)`: row-parallel with sequence parallelism.

    Rank r gets the contiguous rows r M / ranks to (r + 1) M / ranks of the sum: every tile holds
    rows of every rank's block, so that a group is one plain reduce-scatter. The paper's rows are
    cyclic (section 3.3.4).

    Args:
      x: `[M, K]`, this rank's columns; M is a multiple of the number of ranks.
      w: `[N, K]`, this rank's columns.
      axis_name, plan, packed, implementation, resident: as for `matmul_all_reduce`.

    Returns:
      `[M / ranks, N]` in x's dtype.

    Raises:
      ValueError: as for `matmul_all_reduce`, or M is not a multiple of the number of ranks.
    """
    return _run(x, w, _Call("reduce_scatter", axis_name, plan, implementation, packed, resident))


def matmul_all_to_all(
    x: jax.Array,
    w: jax.Array,
    axis_name: Any,
    *,
    plan: Plan | None = None,
    packed: bool = False,
    implementation: str | None = None,
    resident: bool = False,
) -> jax.Array | Packed:
    """`lax.all_to_all(x @ w.T, axis_name, split_axis=0, concat_axis=0, tiled=True)`.

    Block r of M / ranks rows goes to rank r; the result is the blocks of all ranks in their order.
    All blocks have the same size (section 3.3.4 has unequal ones too).

    Args:
      x: `[M, K]`, rows for all ranks; M is a multiple of their number.
      w: `[N, K]`.
      axis_name, plan, packed, implementation, resident: as for `matmul_all_reduce`.

    Returns:
      `[M, N]` in x's dtype.

    Raises:
      ValueError: as for `matmul_reduce_scatter`.
    """
    return _run(x, w, _Call("all_to_all", axis_name, plan, implementation, packed, resident))


def _run(x: jax.Array, w: jax.Array, call: _Call) -> jax.Array | Packed:
    _check(x, w, call)
    return _product(call, x, w)


def _check(x: jax.Array, w: jax.Array, call: _Call) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.dtype != w.dtype:
        raise ValueError(
            f"x {x.dtype}{list(x.shape)} and w {w.dtype}{list(w.shape)}: [M, K] and [N, K] of one "
            "dtype are expected"
        )
    ranks = lax.axis_size(call.axis_name)
    if call.op != "all_reduce" and x.shape[0] % ranks:
        raise ValueError(f"M = {x.shape[0]} is not a multiple of {ranks} ranks")
    if call.plan is not None:
        own = (call.op, ranks, x.shape[0], w.shape[0], x.shape[1])
        theirs = (call.plan.op, call.plan.ranks, call.plan.m, call.plan.n, call.plan.k)
        if own != theirs:
            raise ValueError(f"the plan is for op, ranks, M, N, K = {theirs}, not {own}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(call: _Call, x: jax.Array, w: jax.Array) -> jax.Array | Packed:
    arguments = x, w, call.axis_name, call.plan, call.resident
    y = _TABLE[call.op](*arguments, implementation=call.implementation)
    return y if call.packed else unpack(y)


def _forward(call: _Call, x: jax.Array, w: jax.Array) -> Any:
    return _product(call, x, w), (x, w)


def _backward(call: _Call, saved: Any, g: Any) -> tuple[jax.Array, jax.Array]:
    """The gradient of the plain composition.

    Collective and product are linear in what is asked for, so that nothing of the forward pass is
    computed again: XLA drops it. The cotangent of a packed result is packed the same way.
    """
    x, w = saved

    def composed(x: jax.Array, w: jax.Array) -> jax.Array:
        return plain.collective(call.op, linear_xla(x, w), call.axis_name)

    return jax.vjp(composed, x, w)[1](unpack(g))


_product.defvjp(_forward, _backward)
