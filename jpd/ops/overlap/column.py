"""Column-parallel products, whose gradients are the ops that overlap.

The transpose of a product and a collective is the collective's transpose and a product. So what
`matmul_reduce_scatter` is to a row-parallel layer's output, it is to the gradient of the input of
the column-parallel layer before it: backward passes overlap here, forward passes do not.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax

from jpd.ops.linear import linear, linear_xla
from jpd.ops.overlap.axes import names, summed_to, varying
from jpd.ops.overlap.collectives import matmul_all_reduce, matmul_reduce_scatter
from jpd.ops.overlap.weights import computed_weights, product


def all_gather_matmul(
    x: jax.Array, w: jax.Array, axis_name: Any, *, resident: bool = True
) -> jax.Array:
    """`lax.all_gather(x, axis_name, tiled=True) @ w.T`; the gradient of x is by
    `matmul_reduce_scatter`.

    Args:
      x: `[M / ranks, K]`, this rank's rows.
      w: `[N, K]`, this rank's rows of a larger weight.
      axis_name: mesh axis of the `shard_map` around.
      resident: see `matmul_all_reduce`. False is needed where the program computes w, such as by a
        conversion: a kernel may read it too early otherwise.

    Returns:
      `[M, N]`. The rows of other ranks are gathered again for the gradient of w, not kept.
    """
    return _gathered(axis_name, resident, x, w)


def replicated_matmul(
    x: jax.Array, w: jax.Array, axis_name: Any, *, resident: bool = True
) -> jax.Array:
    """`x @ w.T` with the same x on all ranks; the gradient of x is by `matmul_all_reduce`.

    Under `shard_map(..., check_vma=False)` JAX does not know that x is the same everywhere, and
    sums its gradient over the ranks where it leaves the `shard_map`: there is no sum here then.

    Args:
      x: `[M, K]`, equal on all ranks of the axis.
      w: `[N, K]`, this rank's rows of a larger weight.
      axis_name: mesh axis of the `shard_map` around.
      resident: see `matmul_all_reduce`. False is needed where the program computes w, such as by a
        conversion: a kernel may read it too early otherwise.

    Returns:
      `[M, N]`, this rank's columns.
    """
    return _replicated(axis_name, resident, x, w)


def _gather(x: jax.Array, axis_name: Any) -> jax.Array:
    return lax.all_gather(x, axis_name, axis=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(axis_name: Any, resident: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    return product(_gather(x, axis_name), w, resident=resident)


def _gathered_forward(axis_name: Any, resident: bool, x: jax.Array, w: jax.Array) -> Any:
    return _gathered(axis_name, resident, x, w), (x, w)


def _gathered_backward(
    axis_name: Any, resident: bool, saved: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del resident  # a transposed weight is not
    x, w = saved
    with computed_weights():
        dx = matmul_reduce_scatter(g, w.T, axis_name)
    whole = _gather(x, axis_name)
    (dw,) = jax.vjp(lambda w: linear_xla(whole, w), w)[1](g)
    return summed_to(x, dx), dw


_gathered.defvjp(_gathered_forward, _gathered_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _replicated(axis_name: Any, resident: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    del axis_name
    return product(x, w, resident=resident)


def _replicated_forward(axis_name: Any, resident: bool, x: jax.Array, w: jax.Array) -> Any:
    return _replicated(axis_name, resident, x, w), (x, w)


def _replicated_backward(
    axis_name: Any, resident: bool, saved: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del resident  # a transposed weight is not
    x, w = saved
    shared = names(axis_name) <= varying(g) - varying(x)
    with computed_weights():
        dx = matmul_all_reduce(g, w.T, axis_name) if shared else linear(g, w.T)
    (dw,) = jax.vjp(lambda w: linear_xla(x, w), w)[1](g)
    return summed_to(x, dx), dw


_replicated.defvjp(_replicated_forward, _replicated_backward)
