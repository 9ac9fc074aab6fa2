"""The norm: a row in registers, a sum over the warpgroup, and the row written once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks, mosaic
from pallas_kernels.checks import DTYPES
from pallas_kernels.rms_norm.config import RmsNormConfig, default_config


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    config: RmsNormConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps)` of every row in float32, rounded, then times `weight`.

    Args:
      x: `[M, E]` bf16 or fp16, M > 0, E a multiple of 128 up to 16384.
      weight: `[E]` of x's dtype. It is read before earlier kernels end: it must be none's output.
      eps: added to the mean of the squares.
      config: tunables, those of `default_config` when not given.
      interpret: `plgpu.InterpretGPUParams` runs it on the CPU.

    Returns:
      `[M, E]` of x's dtype.

    Raises:
      NotImplementedError: the width or the dtype is not supported, or there are no rows.
      ValueError: the shapes do not fit together, or eps is negative or not finite.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x {x.shape} and weight {weight.shape}: [M, E] and [E] are expected")
    if x.dtype.name not in DTYPES or weight.dtype != x.dtype:
        raise NotImplementedError(
            f"x {x.dtype} and weight {weight.dtype}: both of one of {', '.join(DTYPES)}"
        )
    checks.not_empty(M=x.shape[0])
    checks.positive(eps=eps, or_zero=True)
    config = config or default_config(x.shape[1], x.dtype.itemsize)
    return _rms_norm(x, weight, eps=float(eps), config=config, interpret=interpret)


def normed(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """The norm of one row in registers, inside a kernel."""
    values = x.astype(jnp.float32)
    mean = jnp.sum(values * values) * (1 / x.size)
    rounded = (values * lax.rsqrt(mean + eps)).astype(x.dtype)
    # A product of two 16-bit floats is exact in float32: this rounds once, as theirs does.
    return (rounded.astype(jnp.float32) * weight.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("eps", "config", "interpret"))
def _rms_norm(x, weight, *, eps, config, interpret):
    rows, width = x.shape
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=config.vector)

    def body(x_ref, weight_ref, y_ref):
        row = lax.axis_index("row")
        mosaic.let_next_start(interpret)
        scale = plgpu.load(weight_ref, layout=layout, optimized=False)
        mosaic.wait_for_previous(interpret)
        values = plgpu.load(x_ref.at[row], layout=layout, optimized=False)
        y_ref[row] = normed(values, scale, eps)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(rows,),
        grid_names=("row",),
        compiler_params=mosaic.WARPGROUP,
        kernel_name="rms_norm",
        **({} if interpret is None else {"interpret": interpret}),
    )(x, weight)
