"""What the kernel computes, in float32, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pallas_kernels.signal_gemm.config import SignalConfig
from pallas_kernels.signal_gemm.layout import packed_shape, tile_position


def signal_gemm(
    x: np.ndarray,
    w: np.ndarray,
    *,
    groups: Sequence[int],
    config: SignalConfig,
    ranks: int = 1,
) -> np.ndarray:
    """The packed buffer, `[tiles * ranks, part_m, tile_n]` float32, rounded nowhere.

    The kernel's counters end at `groups`.
    """
    y = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    m, n = y.shape
    blocks = np.split(y, ranks)
    packed = np.zeros(packed_shape(m, n, config, ranks), np.float32)
    slot = first = 0
    for size in groups:
        for block in blocks:
            for tile in range(first, first + size):
                row, column = tile_position(tile, m, n, config, ranks)
                part = block[row : row + packed.shape[1], column : column + config.tile_n]
                packed[slot, : part.shape[0], : part.shape[1]] = part
                slot += 1
        first += size
    return packed
