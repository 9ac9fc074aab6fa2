"""What the GEMM kernels have in common: which arguments fit together, and what they compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.checks import DTYPES, not_empty, supported


def checked_shape(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    gated: bool,
    w_layout: str,
) -> tuple[int, int, int]:
    """M, N and K of y = x w^T; N counts the rows of w, gate and up projection both.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or a layout that is neither.
      NotImplementedError: a dtype that wgmma kernels of this package do not take, or an empty axis.
    """
    if w_layout not in ("nk", "kn"):
        raise ValueError(f"w_layout is {w_layout!r}, not 'nk' or 'kn'")
    if x.ndim != 2 or w.ndim != 2:
        raise ValueError(f"x and w must be matrices: {x.shape}, {w.shape}")
    m, k = x.shape
    n, depth = w.shape if w_layout == "nk" else w.shape[::-1]
    if depth != k:
        raise ValueError(f"x has K = {k}, w {w.shape} ({w_layout}) has K = {depth}")
    if gated and n % 2:
        raise ValueError(f"gated: w has N = {n}, which is not two halves")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {bias.shape}, not {(n,)}")
    outputs = n // 2 if gated else n
    if residual is not None and residual.shape != (m, outputs):
        raise ValueError(f"residual has shape {residual.shape}, not {(m, outputs)}")
    for name, operand in (("w", w), ("bias", bias), ("residual", residual)):
        if operand is not None and operand.dtype != x.dtype:
            raise ValueError(f"{name} is {operand.dtype}, x is {x.dtype}")
    supported("dtype", x.dtype.name, DTYPES)
    not_empty(M=m, N=n, K=k)
    return m, n, k


def reference(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    w_layout: str = "nk",
) -> jax.Array:
    """y = x w^T (+ bias), or silu(gate) * up of its halves, (+ residual), all in float32.

    Row by row, as sums: a library's products may be wrong under an MPS share.
    """
    w = (w if w_layout == "nk" else w.T).astype(jnp.float32)
    y = jax.lax.map(lambda row: (w * row).sum(-1), x.astype(jnp.float32))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if gated:
        gate, up = jnp.split(y, 2, axis=1)
        y = jax.nn.silu(gate) * up
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y


def pad_rows(x: jax.Array) -> jax.Array:
    """x with rows of zeros up to a multiple of 8, which a TMA descriptor of more than 8 needs."""
    return jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
