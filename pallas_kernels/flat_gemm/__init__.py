"""Flat GEMM: y = x w^T for the few rows of a decode step (FlashDecoding++, section 4)."""

from __future__ import annotations

import functools
from typing import Any

import jax

from pallas_kernels.flat_gemm import kernel
from pallas_kernels.flat_gemm.config import MAX_ROWS, FlatConfig, candidates, default
from pallas_kernels.flat_gemm.schedule import schedule_of
from pallas_kernels.products import checked_shape, pad_rows
from pallas_kernels.workspace import counters

__all__ = ["MAX_ROWS", "FlatConfig", "candidates", "default", "flat_gemm"]


@functools.partial(jax.jit, static_argnames=("config", "gated", "k_major", "interpret"))
def _run(x, w, bias, residual, counts, **static):
    return kernel.run(x, w, bias, residual, counts, **static)


def flat_gemm(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    w_layout: str = "nk",
    config: FlatConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """y = x w^T (+ bias) (+ residual), or y = silu(x gate^T) * (x up^T) (+ residual).

    For few rows the product is one read of the weights (FlashDecoding++, arXiv 2311.01282, section
    4). The operands are swapped, so that the rows of x are wgmma's N and padded to 8, not to 64;
    all pipeline steps of all tiles are shared out evenly over the SMs. Where the paper keeps K in
    one block, a tile here may be cut between blocks; its parts are added in a fixed order, so that
    results repeat. Sums are float32 and rounded once, after bias, activation and residual.

    Args:
      x: `[M, K]` bf16 or fp16, M from 1 to 128, K a multiple of 64. An M above 8 that is no
        multiple of 8 costs a padded copy of x and residual, and one of y.
      w: `[N, K]` (`w_layout="nk"`) or `[K, N]` ("kn"), N a multiple of 64. Gated: N = 2F, first the
        gate's F, then the up projection's; F a multiple of 64. It may be read before the kernels
        ahead of this one are complete, so it must not be one of their results.
      bias: `[N]` or None.
      residual: `[M, N]` (gated: `[M, F]`) or None, added last.
      gated: whether w holds a gate and an up projection.
      w_layout: see `w`.
      config: how to cut the work up; `config.default` when not given.
      interpret: None, or `plgpu.InterpretGPUParams` to run on a CPU.

    Returns:
      `[M, N]` (gated: `[M, F]`) of x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or a layout that is neither.
      NotImplementedError: a dtype, a shape or a configuration that the kernel does not support.
    """
    m, n, k = checked_shape(x, w, bias, residual, gated, w_layout)
    if m > MAX_ROWS or k % 64 or n % (128 if gated else 64):
        raise NotImplementedError(
            f"M, N, K = {m}, {n}, {k}: M is at most {MAX_ROWS}, K a multiple of 64, N of 64 "
            f"(gated: 128)"
        )
    outputs = n // 2 if gated else n
    config = config or default(m, outputs, gated)
    if bias is not None and outputs % config.part_n:
        raise NotImplementedError(
            f"with a bias, a consumer's outputs must divide the {outputs} outputs: {config}"
        )
    if m > 8 and m % 8:
        x, residual = pad_rows(x), None if residual is None else pad_rows(residual)
    cut = schedule_of(config, outputs, k).most_shares > 1
    y = _run(
        x,
        w,
        bias,
        residual,
        counters(-(-outputs // config.tile_n) * config.consumers) if cut else None,
        config=config,
        gated=gated,
        k_major=w_layout == "nk",
        interpret=interpret,
    )
    return y[:m]
