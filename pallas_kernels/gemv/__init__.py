"""GEMV: y = x w^T for one row or very few (FlashDecoding++, section 5, below M1)."""

from __future__ import annotations

import functools
from typing import Any

import jax

from pallas_kernels import checks
from pallas_kernels.gemv import kernel
from pallas_kernels.gemv.config import (
    MAX_NORMED_ROWS,
    MAX_ROWS,
    GemvConfig,
    candidates,
    default,
    suits,
)
from pallas_kernels.products import checked_shape

__all__ = ["MAX_NORMED_ROWS", "MAX_ROWS", "GemvConfig", "candidates", "default", "gemv"]


@functools.partial(jax.jit, static_argnames=("eps", "config", "gated", "interpret"))
def _run(x, w, bias, residual, norm, **static):
    return kernel.run(x, w, bias, residual, norm, **static)


def gemv(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    norm: tuple[jax.Array, float] | None = None,
    config: GemvConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """y = x w^T (+ bias) (+ residual), or y = silu(x gate^T) * (x up^T) (+ residual).

    For one row a product is one read of the weights, with two operations for each: CUDA cores keep
    up with that, and no tile of wgmma has to be filled (FlashDecoding++, arXiv 2311.01282, section
    5). Every row of x adds operations, but no bytes. Sums are float32, in an order that only the
    shape and the configuration decide, and rounded once, after bias, activation and residual.

    Args:
      x: `[M, K]` bf16 or fp16, M from 1 to 4, K a multiple of 64.
      w: `[N, K]`. Gated: N = 2F, first the gate's F, then the up projection's. It may be read
        before the kernels ahead of this one are complete, so it must not be one of their results.
      bias: `[N]` or None.
      residual: `[M, N]` (gated: `[M, F]`) or None, added last.
      gated: whether w holds a gate and an up projection.
      norm: the weight `[K]` of an RMS norm of x that comes first, and what it adds to the mean
        square, or None; of at most 2 rows. Nothing is rounded between norm and product. The weight
        is read early, as w is.
      config: how to cut the work up; `config.default` when not given.
      interpret: None, or `plgpu.InterpretGPUParams` to run on a CPU.

    Returns:
      `[M, N]` (gated: `[M, F]`) of x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or a norm's number that is negative or
        not finite.
      NotImplementedError: a dtype, a shape or a configuration that the kernel does not support.
    """
    m, n, k = checked_shape(x, w, bias, residual, gated, "nk")
    if m > MAX_ROWS or k % 64:
        raise NotImplementedError(
            f"M, N, K = {m}, {n}, {k}: M is from 1 to {MAX_ROWS}, K a multiple of 64"
        )
    weight, eps = norm or (None, 0.0)
    if weight is not None:
        if weight.shape != (k,) or weight.dtype != x.dtype:
            raise ValueError(f"norm: {weight.dtype}{list(weight.shape)}, expected {x.dtype}[{k}]")
        checks.positive(eps=eps, or_zero=True)
        if m > MAX_NORMED_ROWS:
            raise NotImplementedError(f"norm: M is {m}, at most {MAX_NORMED_ROWS} is supported")
    outputs = n // 2 if gated else n
    config = config or default(m, outputs, k, gated)
    if config is None or not suits(config, outputs, k):
        raise NotImplementedError(
            f"M, N, K = {m}, {n}, {k}: the outputs of a block must divide the {outputs} outputs, "
            f"and the threads of a row need two inputs each: {config}"
        )
    static = {"eps": float(eps), "config": config, "gated": gated, "interpret": interpret}
    return _run(x, w, bias, residual, weight, **static)
