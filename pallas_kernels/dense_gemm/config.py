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
      tail_n: columns of the smaller tiles, of at most 128 rows, that the tiles of the last wave are
        cut into if there are SMs for all of them at once; 0 for none. No sum changes by it.
    """

    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    wg_dimension: Literal["m", "n"] = "m"
    grid_minor: Literal["m", "n"] = "m"
    grid_tile_width: int = 16
    split_k: int = 1
    cluster: Literal["", "m", "n"] = ""
    tail_n: int = 0

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
        if self.tail_n:
            if self.split_k > 1 or self.cluster:
                raise ValueError(f"tail_n needs split_k = 1 and no cluster: {self}")
            piece = self.piece
            if self.tile_m % piece.tile_m or self.tile_n % piece.tile_n or self.pieces == 1:
                raise ValueError(f"{piece.tile_m}x{piece.tile_n} does not cut up a tile of {self}")

    @property
    def wg_shape(self) -> tuple[int, int]:
        """Rows and columns of the accumulators of one warpgroup."""
        if self.wg_dimension == "m":
            return self.tile_m // 2, self.tile_n
        return self.tile_m, self.tile_n // 2

    @property
    def piece(self) -> DenseConfig:
        """How a smaller tile of the last wave is computed, in the same shared memory.

        Raises:
          ValueError: two warpgroups cannot compute it.
        """
        return dataclasses.replace(
            self, tile_m=_piece_rows(self.tile_m), tile_n=self.tail_n, tail_n=0
        )

    @property
    def pieces(self) -> int:
        """Smaller tiles that a tile of the last wave is cut into."""
        return self.tile_m // _piece_rows(self.tile_m) * (self.tile_n // self.tail_n)

    def cut(self, tiles: int, sms: int) -> int:
        """How many of a GEMM's `tiles` are cut into pieces: those of its last wave, or none."""
        last = tiles % sms
        return last if self.tail_n and last * self.pieces <= sms else 0

    @property
    def smem_bytes(self) -> int:
        """Shared memory of the operand stages and the epilogue."""
        return self.stages * _stage_bytes(self.tile_m, self.tile_n) + EPILOGUE_BYTES


def _piece_rows(tile_m: int) -> int:
    return min(tile_m, 128)


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
_TAIL_GAIN = 0.98
"""A tail that saves less is not worth its code: nearly that of a second kernel."""
_SPLITS = (1, 2, 3, 4, 6, 8)
_MOST_TO_SPLIT = 64 * 256
"""Accumulators of a warpgroup that can be split along K: more leave no registers to load parts with
(256x192 in two parts, 256 rows of 12288x4096 on an H200: 65 us, 28 of them for that)."""


def _item_cycles(config: DenseConfig, k: int) -> float:
    """Estimated SM cycles of one tile, or of one part of its K: bound by wgmma or by L2."""
    steps = -(-k // (TILE_K * config.split_k))
    rows, columns = config.tile_m, config.tile_n
    math = rows * columns * TILE_K / _MACS_PER_CYCLE
    loaded = rows / (2 if config.cluster == "n" else 1) + columns / (
        2 if config.cluster == "m" else 1
    )
    load = loaded * TILE_K * 2 / _L2_BYTES_PER_CYCLE
    return steps * (max(math, load) + _STEP_CYCLES) + _TILE_CYCLES


def cycles(config: DenseConfig, m: int, n: int, k: int, sms: int) -> float:
    """Estimated SM cycles of a GEMM: waves of equal work items, and one of pieces."""
    tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
    cut = config.cut(tiles, sms)
    waves = -(-(tiles - cut) * config.split_k // sms)
    total = waves * _item_cycles(config, k) + (_item_cycles(config.piece, k) if cut else 0)
    if config.split_k > 1:  # float32 parts, each written by its block, all read by the last one
        read = 1 if config.split_k == 2 else config.split_k
        part_bytes = config.tile_m * config.tile_n * 4
        total += _REDUCE_CYCLES + (waves + read) * part_bytes / _REDUCE_BYTES_PER_CYCLE
    return max(total, 2 * n * k / _HBM_BYTES_PER_CYCLE)


def _order(m: int, n: int, tile_m: int, tile_n: int, sms: int) -> tuple[Literal["m", "n"], int]:
    """Walk blocks so that those at work together cover about as many rows as columns."""
    rows = -(-m // tile_m)
    width = 1
    while width * 2 <= rows and (width * 2 * tile_m) ** 2 <= sms * tile_m * tile_n * 2:
        width *= 2
    return "m", width


def _tail(
    config: DenseConfig, tiles: int, sms: int, gated: bool, w_layout: str
) -> DenseConfig | None:
    """`config` with the tiles of its last wave cut as small as there are SMs for; None if never."""
    found = None
    if tiles < sms or config.split_k > 1:
        return found
    for tile_m, tile_n, dimension in _TILES:
        fits = (tile_m, dimension) == (_piece_rows(config.tile_m), config.wg_dimension)
        smaller = (tile_m, tile_n) != (config.tile_m, config.tile_n)
        if not fits or not smaller or config.tile_n % tile_n:
            continue
        tail = dataclasses.replace(config, tail_n=tile_n)
        if tail.cut(tiles, sms) and not unsuited(tail, gated=gated, w_layout=w_layout):
            found = tail
    return found


def _ranked(m: int, n: int, k: int, sms: int, gated: bool, w_layout: str) -> list[DenseConfig]:
    """Every tile and split that suits the shape, with and without a tail, cheapest first."""

    def cost(config):
        return cycles(config, m, n, k, sms)

    found = []
    shapes = [tile for tile in _TILES if _fits_gate(*tile[1:]) or not gated]
    least = min(tile_m for tile_m, *_ in shapes)
    for tile_m, tile_n, dimension in shapes:
        if tile_m > least and tile_m > 2 * m:
            continue
        minor, width = _order(m, n, tile_m, tile_n, sms)
        tiles = -(-m // tile_m) * -(-n // tile_n)
        for split in _SPLITS if tile_m * tile_n // 2 <= _MOST_TO_SPLIT else (1,):
            if split > 1 and (tiles * split > sms or k // TILE_K < 4 * split):
                continue
            config = DenseConfig(
                tile_m=tile_m,
                tile_n=tile_n,
                stages=_stages(tile_m, tile_n),
                wg_dimension=dimension,
                grid_minor=minor,
                grid_tile_width=width,
                split_k=split,
            )
            found.append(config)
            tail = _tail(config, tiles, sms, gated, w_layout)
            if tail and cost(tail) <= _TAIL_GAIN * cost(config):
                found.append(tail)
    return sorted(found, key=cost)


def default(
    m: int, n: int, k: int, sms: int, *, gated: bool = False, w_layout: str = "nk"
) -> DenseConfig:
    """The configuration where none was tuned.

    Args:
      m: rows of x.
      n: rows of w (`w_layout="nk"`); gated: both halves together.
      k: columns of x and w.
      sms: SMs to fill.
      gated: whether w holds a gate and an up projection.
      w_layout: "nk" or "kn".
    """
    return _ranked(m, n, k, sms, gated, w_layout)[0]


def _fits_gate(tile_n: int, wg_dimension: str) -> bool:
    return wg_dimension == "m" and tile_n % 128 == 0


def unsuited(config: DenseConfig, *, gated: bool, w_layout: str) -> str:
    """Why `config` cannot run with such weights; empty if it can."""
    least = config.tail_n or config.tile_n
    # Gate and up columns must meet in one warpgroup's registers.
    if gated and not _fits_gate(least, config.wg_dimension):
        return "gated needs wg_dimension 'm', and tile_n and tail_n multiples of 128"
    # Some columns of a [K, N] tile in shared memory are no contiguous target for TMA.
    if w_layout == "kn" and least < config.tile_n:
        return "w_layout 'kn' needs a tail_n of 0 or tile_n"
    return ""


def candidates(
    m: int,
    n: int,
    k: int,
    sms: int = 132,
    *,
    gated: bool = False,
    w_layout: str = "nk",
    clusters: bool = True,
) -> list[DenseConfig]:
    """At most 16 configurations worth timing for a shape, the default first.

    The five cheapest tiles, splits and tails by the rule, then the best two of them again with
    pairs of blocks (`clusters`, which know no tail) and with other walking orders.
    """
    ranked = _ranked(m, n, k, sms, gated, w_layout)
    tried = ranked[:5]
    pairs = ("m", "n") if clusters else ()
    for base in ranked[:2]:
        tried += [dataclasses.replace(base, cluster=axis, tail_n=0) for axis in pairs]
        widths = {max(base.grid_tile_width // 2, 1), base.grid_tile_width * 2}
        tried += [dataclasses.replace(base, grid_tile_width=width) for width in sorted(widths)]
        tried += [
            dataclasses.replace(base, grid_tile_width=width, cluster="m", tail_n=0)
            for width in sorted(widths)
            if clusters
        ]
    return list(dict.fromkeys(tried))[:16]
