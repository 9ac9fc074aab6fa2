"""Tunables of the signalling GEMM and the rule that picks them from the shape and the SM count."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pallas_kernels.dense_gemm.config import EPILOGUE_BYTES, SMEM_BUDGET, DenseConfig

TILE_K = 64
"""Depth of one step: 128 bytes of bf16/fp16, the widest swizzle of TMA and wgmma."""
MAX_RANKS = 8
"""Receivers that a tile can be shared out to."""
_MOST_HELD = 64 * 256
"""Sums of a warpgroup that it can hold beside as many accumulators without spilling registers."""

# The machine as the rule sees it, in SM clock cycles; only ratios matter. Fitted to ten shapes with
# four large tiles each, on an H200 (benchmarks/FINDINGS.md).
_MACS_PER_CYCLE = 2048  # dense bf16 multiply-adds of one SM
_LOADED_BYTES_PER_CYCLE = 140  # what loads beside the products cost them
_STEP_CYCLES = 20  # barrier round of one step
_TILE_CYCLES = 3000  # storing the sums of one tile, where they are not held
_L2_BYTES_PER_CYCLE = 40  # what one SM reads from L2 while all others read too: bounds small tiles

_TILES: tuple[tuple[int, int, Literal["m", "n"]], ...] = (
    (256, 192, "m"),
    (128, 256, "m"),
    (256, 128, "m"),
    (128, 192, "m"),
    (128, 128, "m"),
    (128, 64, "m"),
    (64, 256, "n"),
    (64, 128, "n"),
)


@dataclasses.dataclass(frozen=True)
class SignalConfig:
    """How one signalling GEMM is cut up; each field as in `dense_gemm.DenseConfig`.

    The packed layout follows from tile_m, tile_n, grid_minor and grid_tile_width: whoever reads
    the buffer needs the configuration that wrote it.

    Attributes:
      tile_m: rows of x a block computes at a time, a multiple of 64.
      tile_n: columns of w^T a block computes at a time, a multiple of 64 up to 256.
      stages: depth of the operand pipeline, in steps of TILE_K.
      wg_dimension: axis of the tile that the two computing warpgroups share out.
      grid_minor: axis along which consecutive tiles walk first.
      grid_tile_width: tiles walked along `grid_minor` before stepping along the other axis.
    """

    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    wg_dimension: Literal["m", "n"] = "m"
    grid_minor: Literal["m", "n"] = "m"
    grid_tile_width: int = 16

    def __post_init__(self) -> None:
        """Checks what every shape needs.

        Raises:
          ValueError: a tile that two warpgroups of wgmma cannot compute, or too much shared memory.
        """
        _ = self.dense

    @property
    def dense(self) -> DenseConfig:
        """The dense GEMM that does the same work."""
        return DenseConfig(**dataclasses.asdict(self))

    @property
    def wg_shape(self) -> tuple[int, int]:
        """Rows and columns of the accumulators of one warpgroup."""
        return self.dense.wg_shape

    @property
    def holds_sums(self) -> bool:
        """Whether a warpgroup has registers for a tile's rounded sums beside those of the next one:
        then they are stored while the products of the next tile are computed.
        """
        rows, columns = self.wg_shape
        return rows * columns <= _MOST_HELD

    def part_m(self, ranks: int) -> int:
        """Rows of a tile that each of `ranks` receivers gets.

        Raises:
          NotImplementedError: another number of ranks than 1, 2, 4 or 8.
        """
        if ranks not in (1, 2, 4, MAX_RANKS):
            raise NotImplementedError(f"{ranks} ranks: 1, 2, 4 and {MAX_RANKS} are supported")
        return self.tile_m // ranks


def _stages(tile_m: int, tile_n: int) -> int:
    return min(8, (SMEM_BUDGET - EPILOGUE_BYTES) // ((tile_m + tile_n) * TILE_K * 2))


def _width(m: int, tile_m: int, tile_n: int, sms: int) -> int:
    """Tiles along M so that those of one wave cover about as many rows as columns."""
    width = 1
    while width * 2 <= -(-m // tile_m) and (width * 2 * tile_m) ** 2 <= sms * tile_m * tile_n * 2:
        width *= 2
    return width


def _cycles(config: SignalConfig, m: int, n: int, k: int, sms: int) -> float:
    """Estimated SM cycles: waves of tiles, the last as long as the others."""
    rows, columns = config.tile_m, config.tile_n
    waves = -(-(-(-m // rows) * -(-n // columns)) // sms)
    loaded = (rows + columns) * TILE_K * 2
    multiply = rows * columns * TILE_K / _MACS_PER_CYCLE + loaded / _LOADED_BYTES_PER_CYCLE
    step = max(multiply + _STEP_CYCLES, loaded / _L2_BYTES_PER_CYCLE)
    return waves * (-(-k // TILE_K) * step + (0 if config.holds_sums else _TILE_CYCLES))


def candidates(m: int, n: int, k: int, sms: int, *, ranks: int = 1) -> list[SignalConfig]:
    """Configurations worth timing for a shape, cheapest first by the rule.

    The rule: cycles on `sms` SMs, times what the padding of the last tiles adds to what is sent.

    Args:
      m: rows of x.
      n: rows of w.
      k: columns of both.
      sms: SMs that compute; the collective has the others.
      ranks: receivers that each tile is shared out to.
    """
    found = []
    for tile_m, tile_n, dimension in _TILES:
        config = SignalConfig(
            tile_m=tile_m,
            tile_n=tile_n,
            stages=_stages(tile_m, tile_n),
            wg_dimension=dimension,
            grid_tile_width=_width(m, tile_m, tile_n, sms),
        )
        rows = -(-m // (ranks * config.part_m(ranks))) * tile_m
        sent = rows * -(-n // tile_n) * tile_n / (m * n)
        found.append((_cycles(config, m, n, k, sms) * sent, config))
    return [config for _, config in sorted(found, key=lambda pair: pair[0])]


def default(m: int, n: int, k: int, sms: int, *, ranks: int = 1) -> SignalConfig:
    """The configuration where none was tuned: the first of `candidates`."""
    return candidates(m, n, k, sms, ranks=ranks)[0]
