"""Dense GEMM for prefill and large decode batches: y = x w^T with a fused epilogue."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import mosaic
from pallas_kernels.dense_gemm import kernel
from pallas_kernels.dense_gemm.config import TILE_K, DenseConfig, candidates, default, suits
from pallas_kernels.products import checked_shape

__all__ = ["DenseConfig", "candidates", "default", "dense_gemm"]


def dense_gemm(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    w_layout: str = "nk",
    config: DenseConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """y = x w^T (+ bias) (+ residual), or y = silu(x gate^T) * (x up^T) (+ residual).

    A persistent, warp-specialised wgmma kernel for the batches that FlashDecoding++ (arXiv
    2311.01282, section 5) leaves to a library: above those of the flat GEMM. Sums are float32 and
    rounded once, after bias, activation and residual.

    Args:
      x: `[M, K]` bf16 or fp16, M from 65 to 16384 by design (any M > 0 works), K a multiple of 64.
        An M that is not a multiple of 8 costs a padded copy of x and residual, and one of y.
      w: `[N, K]` (`w_layout="nk"`) or `[K, N]` ("kn", not gated), N a multiple of 64. Gated:
        N = 2F, first the gate's F, then the up projection's; F a multiple of 64. It may be read
        before the kernels ahead of this one are complete, so it must not be one of their results.
      bias: `[N]` or None.
      residual: `[M, N]` (gated: `[M, F]`) or None, added last.
      gated: whether w holds a gate and an up projection.
      w_layout: see `w`.
      config: how to cut the work up; None: `config.default` for the shape and the SMs of this GPU.
      interpret: None, or `plgpu.InterpretGPUParams` to run on a CPU.

    Returns:
      `[M, N]` (gated: `[M, F]`) of x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or a layout that is neither.
      NotImplementedError: a dtype, a shape or a configuration that the kernel does not support.
    """
    m, n, k = checked_shape(x, w, bias, residual, gated, w_layout)
    if k % TILE_K or n % (128 if gated else 64):
        raise NotImplementedError(
            f"M, N, K = {m}, {n}, {k}: K must be a multiple of {TILE_K}, N of 64 (gated: 128)"
        )
    if gated and w_layout != "nk":
        # Gate and up columns of one [K, N] tile are no contiguous targets for TMA.
        raise NotImplementedError(f"gated with w_layout {w_layout!r}; supported is 'nk'")
    sms = mosaic.sm_count()
    if config is None:
        config = default(m, n, k, sms, gated=gated)
    if not suits(config, gated=gated):
        raise NotImplementedError(
            f"gated with {config}: needs wg_dimension 'm' and tile_n a multiple of 128"
        )
    if config.split_k > 1 and k < 2 * TILE_K * config.split_k:
        raise NotImplementedError(
            f"split_k = {config.split_k} of K = {k}: a part needs {2 * TILE_K} at least"
        )
    return kernel.run(
        x,
        w,
        bias,
        residual,
        gated=gated,
        w_layout=w_layout,
        config=config,
        sms=sms,
        interpret=interpret,
    )
