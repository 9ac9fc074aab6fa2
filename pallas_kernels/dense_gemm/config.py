"""Tunables of the dense GEMM and the rule that picks them from the shape and the SM count."""

from __future__ import annotations

import dataclasses
from typing import Literal

TILE_K = 64
"""Depth of one step: 128 bytes of bf16/fp16, the widest swizzle of TMA and wgmma."""
SMEM_BUDGET = 224 * 1024
"""Bytes for the operand stages and the epilogue's slots; the rest holds barriers."""
EPILOGUE_BYTES = 2 * 2 * 64 * 64 * 2
"""Two 64x64 slots for each of the two warpgroups that compute."""

# The machine as the rule sees it, in SM clock cycles (H100/H200; only ratios matter).
_MACS_PER_CYCLE = 2048  # dense bf16 multiply-adds of one SM
_L2_BYTES_PER_CYCLE = 40  # what one SM reads from L2 while all others read too
_STEP_CYCLES = 40  # barrier round of one step
_TILE_CYCLES = 2200  # filling the pipeline or emptying the accumulators of one tile
_HBM_BYTES_PER_CYCLE = 2300  # what all SMs read together
_REDUCE_CYCLES = 4000  # ticket and latency of a split-K reduction
_REDUCE_BYTES_PER_CYCLE = 15  # float32 parts, by one SM


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """How one dense GEMM is cut up.

    Attributes:
      tile_m: rows of x a block computes at a time, a multiple of 64.
      tile_n: columns of w^T a block computes at a time, a multiple of 64 up to 256 (gated: half of
        them gate, half up).
      stages: depth of the operand pipeline, in steps of TILE_K.
      wg_dimension: axis of the tile that the two computing warpgroups share out.
      grid_minor: axis along which consecutive blocks walk first.
      grid_tile_width: tiles walked along `grid_minor` before stepping along the other axis: blocks
        at work at one time then share rows and columns in L2.
      split_k: parts that K is cut into; the last block to finish a tile adds the parts up.
      cluster: axis along which two neighbouring blocks form a cluster and share the other operand
        by TMA multicast; "" for none (a pair must find two free SMs of one GPC).
    """

    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    wg_dimension: Literal["m", "n"] = "m"
    grid_minor: Literal["m", "n"] = "m"
    grid_tile_width: int = 16
    split_k: int = 1
    cluster: Literal["", "m", "n"] = ""

    def __post_init__(self) -> None:
        """Checks what every shape needs.

        Raises:
          ValueError: a tile that two warpgroups of wgmma cannot compute, or too much shared memory.
        """
        rows = self.tile_m // (2 if self.wg_dimension == "m" else 1)
        columns = self.tile_n // (2 if self.wg_dimension == "n" else 1)
        if rows % 64 or columns % 64 or not 0 < columns <= 256 or not 0 < self.tile_m <= 256:
            raise ValueError(f"a warpgroup cannot compute {rows}x{columns} of {self}")
        if rows * columns > 128 * 192:
            raise ValueError(f"accumulators of {rows}x{columns} do not fit in registers: {self}")
        if self.stages < 2 or self.split_k < 1 or self.grid_tile_width < 1:
            raise ValueError(f"stages >= 2, split_k >= 1 and grid_tile_width >= 1: {self}")
        if self.smem_bytes > SMEM_BUDGET:
            raise ValueError(f"{self.smem_bytes} bytes of shared memory > {SMEM_BUDGET}: {self}")

    @property
    def wg_shape(self) -> tuple[int, int]:
        """Rows and columns of the accumulators of one warpgroup."""
        if self.wg_dimension == "m":
            return self.tile_m // 2, self.tile_n
        return self.tile_m, self.tile_n // 2

    @property
    def smem_bytes(self) -> int:
        """Shared memory of the operand stages and the epilogue."""
        return self.stages * _stage_bytes(self.tile_m, self.tile_n) + EPILOGUE_BYTES


def _stage_bytes(tile_m: int, tile_n: int) -> int:
    return (tile_m + tile_n) * TILE_K * 2


def _stages(tile_m: int, tile_n: int) -> int:
    return min(8, (SMEM_BUDGET - EPILOGUE_BYTES) // _stage_bytes(tile_m, tile_n))


_TILES = (  # tile_m, tile_n, wg_dimension
    (256, 192, "m"),
    (128, 256, "m"),
    (256, 128, "m"),
    (128, 192, "m"),
    (128, 128, "m"),
    (256, 64, "m"),
    (128, 64, "m"),
    (64, 256, "n"),
    (64, 128, "n"),
)
_SPLITS = (1, 2, 3, 4, 6, 8)
_MOST_TO_SPLIT = 64 * 256
"""Accumulators of a warpgroup that can be split along K: more leave no registers to load parts with
(256x192 in two parts, 256 rows of 12288x4096 on an H200: 65 us, 28 of them for that)."""


def cycles(config: DenseConfig, m: int, n: int, k: int, sms: int) -> float:
    """Estimated SM cycles of a GEMM: waves of equal work items, each bound by wgmma or by L2."""
    tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
    steps = -(-k // (TILE_K * config.split_k))
    waves = -(-tiles * config.split_k // sms)
    rows, columns = config.tile_m, config.tile_n
    math = rows * columns * TILE_K / _MACS_PER_CYCLE
    loaded = rows / (2 if config.cluster == "n" else 1) + columns / (
        2 if config.cluster == "m" else 1
    )
    load = loaded * TILE_K * 2 / _L2_BYTES_PER_CYCLE
    total = waves * (steps * (max(math, load) + _STEP_CYCLES) + _TILE_CYCLES)
    if config.split_k > 1:  # float32 parts, each written by its block, all read by the last one
        read = 1 if config.split_k == 2 else config.split_k
        total += _REDUCE_CYCLES + (waves + read) * rows * columns * 4 / _REDUCE_BYTES_PER_CYCLE
    return max(total, 2 * n * k / _HBM_BYTES_PER_CYCLE)


def _order(m: int, n: int, tile_m: int, tile_n: int, sms: int) -> tuple[Literal["m", "n"], int]:
    """Walk blocks so that those at work together cover about as many rows as columns."""
    rows = -(-m // tile_m)
    width = 1
    while width * 2 <= rows and (width * 2 * tile_m) ** 2 <= sms * tile_m * tile_n * 2:
        width *= 2
    return "m", width


def _ranked(m: int, n: int, k: int, sms: int, gated: bool) -> list[DenseConfig]:
    """Every tile and split that suits the shape, cheapest by `cycles` first."""
    found = []
    tiles = [tile for tile in _TILES if _fits_gate(*tile[1:]) or not gated]
    least = min(tile_m for tile_m, *_ in tiles)
    for tile_m, tile_n, dimension in tiles:
        if tile_m > least and tile_m > 2 * m:
            continue
        minor, width = _order(m, n, tile_m, tile_n, sms)
        tiles = -(-m // tile_m) * -(-n // tile_n)
        for split in _SPLITS if tile_m * tile_n // 2 <= _MOST_TO_SPLIT else (1,):
            if split > 1 and (tiles * split > sms or k // TILE_K < 4 * split):
                continue
            found.append(
                DenseConfig(
                    tile_m=tile_m,
                    tile_n=tile_n,
                    stages=_stages(tile_m, tile_n),
                    wg_dimension=dimension,
                    grid_minor=minor,
                    grid_tile_width=width,
                    split_k=split,
                )
            )
    return sorted(found, key=lambda config: cycles(config, m, n, k, sms))


def default(m: int, n: int, k: int, sms: int, *, gated: bool = False) -> DenseConfig:
    """The configuration where none was tuned.

    Args:
      m: rows of x.
      n: rows of w (`w_layout="nk"`); gated: both halves together.
      k: columns of x and w.
      sms: SMs to fill.
      gated: whether w holds a gate and an up projection.
    """
    return _ranked(m, n, k, sms, gated)[0]


def _fits_gate(tile_n: int, wg_dimension: str) -> bool:
    return wg_dimension == "m" and tile_n % 128 == 0


def suits(config: DenseConfig, *, gated: bool) -> bool:
    """Whether `config` can run: gate and up columns must meet in one warpgroup's registers."""
    return not gated or _fits_gate(config.tile_n, config.wg_dimension)


def candidates(
    m: int, n: int, k: int, sms: int = 132, *, gated: bool = False, clusters: bool = True
) -> list[DenseConfig]:
    """At most 16 configurations worth timing for a shape, the default first.

    The five cheapest tiles and splits by the rule, then the best two of them again with pairs of
    blocks (`clusters`) and with other walking orders.
    """
    ranked = _ranked(m, n, k, sms, gated)
    tried = ranked[:5]
    pairs = ("m", "n") if clusters else ()
    for base in ranked[:2]:
        tried += [dataclasses.replace(base, cluster=axis) for axis in pairs]
        widths = {max(base.grid_tile_width // 2, 1), base.grid_tile_width * 2}
        tried += [dataclasses.replace(base, grid_tile_width=width) for width in sorted(widths)]
        tried += [
            dataclasses.replace(base, grid_tile_width=width, cluster="m")
            for width in sorted(widths)
            if clusters
        ]
    return list(dict.fromkeys(tried))[:16]
