"""GEMM that signals groups of finished tiles, for collectives that run beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.products import checked_shape
from pallas_kernels.signal_gemm import kernel, layout, schedule
from pallas_kernels.signal_gemm.config import TILE_K, SignalConfig, candidates, default
from pallas_kernels.signal_gemm.layout import group_spans, pack, packed_shape, tile_count, unpack
from pallas_kernels.signal_gemm.schedule import groups_of_waves, partitions, waves_of

__all__ = [
    "SignalConfig",
    "candidates",
    "default",
    "group_spans",
    "groups_of_waves",
    "pack",
    "packed_shape",
    "partitions",
    "signal_gemm",
    "tile_count",
    "unpack",
    "waves_of",
]


def signal_gemm(
    x: jax.Array,
    w: jax.Array,
    counters: Any,
    *,
    groups: Sequence[int],
    config: SignalConfig,
    sms: int | None = None,
    ranks: int = 1,
    packed: Any = None,
    interpret: Any = None,
) -> jax.Array | None:
    """y = x w^T in tiles, group after group, each group announced by its counter.

    The GEMM of FlashOverlap (arXiv 2504.19519, sections 3.2 and 3.3): one persistent, warp-
    specialised wgmma kernel on `sms` SMs, that stores its tiles in the order in which it computes
    them and adds 1 to a group's counter for each of its tiles, with release at system scope and
    only when the tile's stores are complete. Whoever sees a counter reach the group's number of
    tiles (`cuStreamWaitValue32`, say) may send the group, a contiguous range of the buffer, while
    the kernel computes the next. Tile t is computed by block t mod sms: `schedule` has the order.
    Sums are float32 and rounded once.

    Args:
      x: `[M, K]` bf16 or fp16, any M > 0, K a multiple of 64. M / ranks that is not a multiple of
        8 costs a padded copy of x.
      w: `[N, K]`, N a multiple of 8. It may be read before the kernels ahead of this one are
        complete, so it must not be one of their results.
      counters: a `jax.Ref` of `[len(groups)]` int32 zeros; the caller zeroes them before each call.
      groups: tiles of each group, in the order of completion; the sum is `tile_count`.
        `groups_of_waves` makes them of whole waves, which finish together.
      config: how to cut the work up, e.g. `default(m, n, k, sms, ranks=ranks)`.
      sms: blocks to run, one an SM; None: all that this process may use. Leave some to the
        collective: with none it starts when this kernel has ended. Results do not depend on it.
      ranks: 1 for an all-reduce; the number of receivers (2, 4 or 8) for a reduce-scatter or an
        all-to-all over rows: M is then a multiple of it. See `layout`.
      packed: a `jax.Ref` of `packed_shape(...)` to write to, of x's dtype; None: a new array.
      interpret: None, or `plgpu.InterpretGPUParams` to run on a CPU. Signals are then plain
        additions: blocks run one after another.

    Returns:
      `[tiles * ranks, tile_m / ranks, tile_n]` of x's dtype, which `unpack` turns into `[M, N]`;
      padding (rows and columns past the edge) is zero. None where `packed` was given.

    Raises:
      ValueError: shapes, dtypes or groups that do not fit together.
      NotImplementedError: a dtype, a shape or a number of ranks that the kernel does not support.
    """
    m, n, k = checked_shape(x, w, None, None, False, "nk")
    if k % TILE_K or n % 8:
        raise NotImplementedError(
            f"M, N, K = {m}, {n}, {k}: K must be a multiple of {TILE_K}, N of 8"
        )
    groups = tuple(int(size) for size in groups)
    schedule.check_groups(groups, layout.tile_count(m, n, config, ranks))
    sms = mosaic.sm_count() if sms is None else sms
    if sms < 1:
        raise ValueError(f"sms is {sms}; at least 1 is needed")
    _check_ref("counters", counters, (len(groups),), jnp.int32)
    if packed is not None:
        _check_ref("packed", packed, packed_shape(m, n, config, ranks), x.dtype)
    return kernel.run(
        x,
        w,
        counters,
        packed,
        groups=groups,
        config=config,
        ranks=ranks,
        sms=sms,
        interpret=interpret,
    )


def _check_ref(name: str, ref: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises ValueError unless `ref` is a mutable array of this shape and dtype."""
    if not isinstance(jax.typeof(ref), jax.ref.AbstractRef):
        raise ValueError(f"{name} must be a jax.Ref, not {jax.typeof(ref)}")
    if ref.shape != shape or ref.dtype != dtype:
        raise ValueError(f"{name} is {ref.dtype}{list(ref.shape)}, not {dtype}{list(shape)}")
