"""Tunables of the flat GEMM, and the rule that picks them where no table does."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pallas_kernels import checks, mosaic

MAX_ROWS = 128
_LEAST_WEIGHTS = 48 * 1024
"""Bytes of weights that a block should have in flight."""
_X_BYTES = 48 * 1024
"""Weights that a block takes while rows of x come from L2."""
_RESERVED = 2048


@dataclass(frozen=True, order=True)
class FlatConfig:
    """How a flat GEMM is cut."""

    tile_n: int = 64
    """Outputs of a tile; for each consumer a multiple of 64, wgmma's M."""
    tile_k: int = 128
    """Inputs of one pipeline step; a multiple of 64."""
    stages: int = 6
    """Steps whose weights are in flight, at least 2."""
    split: int | None = None
    """Blocks for each tile; None gives all blocks equal shares of all steps."""
    consumers: int = 1
    """Warpgroups that multiply, each with its part of the tile's outputs; one more loads."""
    waves: int = 1
    """Blocks an SM where `split` is None."""
    x_stages: int = 4
    """Steps whose rows of x are in flight, at least 2, at most `stages`; they come from L2, so few
    will do."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for what fits no shape."""
        checks.whole(1, consumers=self.consumers, waves=self.waves)
        checks.whole(64 * self.consumers, 64 * self.consumers, tile_n=self.tile_n)
        checks.whole(64, 64, tile_k=self.tile_k)
        checks.whole(2, stages=self.stages, x_stages=self.x_stages)
        if self.split is not None:
            checks.whole(1, split=self.split)

    @property
    def held_x(self) -> int:
        """Steps of x that shared memory holds."""
        return min(self.x_stages, self.stages)

    @property
    def part_n(self) -> int:
        """Outputs of a tile for each consumer; a multiple of 64, wgmma's M."""
        return self.tile_n // self.consumers


def padded_rows(rows: int) -> int:
    """Rows of a tile: wgmma's N is a multiple of 8."""
    return -(-rows // 8) * 8


def smem_bytes(config: FlatConfig, rows: int, gated: bool, itemsize: int = 2) -> int:
    """Shared memory that a block takes."""
    weights = config.stages * config.tile_n * config.tile_k * (1 + gated)
    activations = padded_rows(rows) * (config.held_x * config.tile_k + config.tile_n)
    return (weights + activations) * itemsize + _RESERVED


def _deepest(
    rows: int, gated: bool, tile_n: int, tile_k: int, consumers: int = 1, blocks_per_sm: int = 1
) -> FlatConfig | None:
    """Stages that fill the block's part of the SM; None if few weights would be in flight."""
    step_bytes = tile_n * tile_k * (1 + gated) * 2
    x_stages = 1 + -(-_X_BYTES // (step_bytes * blocks_per_sm))
    for stages in range(13, 1, -1):
        config = FlatConfig(tile_n, tile_k, stages, None, consumers, x_stages=x_stages)
        fits = smem_bytes(config, rows, gated) <= mosaic.SMEM_BYTES // blocks_per_sm
        if fits and stages * step_bytes >= _LEAST_WEIGHTS:
            return config
    return None


def _splits(tiles: int) -> tuple[int, ...]:
    """Whole parts of tiles: the fewest that fill the SMs, one more."""
    sms = mosaic.sm_count()
    fewest = max(1, round(sms / tiles))
    return tuple(s for s in (fewest, fewest + 1) if 0.9 * sms <= s * tiles <= 4 * sms)


@functools.cache
def candidates(rows: int, outputs: int, gated: bool = False) -> tuple[FlatConfig, ...]:
    """Configurations worth timing, the rule's choice first.

    A block that has the SM alone loads deep: the next kernel's block takes its place when it ends
    and fills the SM while this kernel's last blocks add up. Or two fit an SM, of which the second
    is the next kernel's, or (`waves`) this one's. For many rows a tile has several consumers, so
    that the rows, which every block reads again from L2, weigh less beside the weights; and more
    may be lost by adding up than by uneven shares, so that whole tiles are tried.
    """
    found: dict[FlatConfig, None] = {}

    def add(*shape: int, waves: int = 1, split: int | None = None) -> None:
        config = _deepest(rows, gated, *shape)
        if config is not None:
            found[replace(config, waves=waves, split=split)] = None

    narrow, wide = (_splits(-(-outputs // tile_n)) for tile_n in (64, 128))
    if rows <= 16:
        if gated:
            add(64, 128)
        add(64, 256)
        add(128, 128, 2)
        for split in narrow:
            add(64, 128, 1, 2, split=split)
        add(64, 128)
        add(64, 128, 1, 2)
        add(64, 128, 1, 2, waves=2)
    elif rows <= 32:
        add(64, 128)
        add(128, 64 if gated else 128, 2)
        for split in narrow:
            add(64, 128, 1, 2, split=split)
        add(64, 128, 1, 2)
        if not gated:
            add(256, 64, 2)
    elif gated and rows > 64:  # so many sums leave room for one consumer only
        add(64, 64)
        for split in narrow[:1]:
            add(64, 64, split=split)
    else:
        beside = 1 if gated else 2  # the registers of one block's sums leave no room for another
        add(64, 128)
        if not gated:
            add(128, 128, 2)
        add(128, 64, 2)
        for split in wide[:1]:
            add(128, 64, 2, split=split)
        for split in narrow[:1]:
            add(64, 64, 1, beside, split=split)
        add(64, 64, 1, beside)
        if not gated:
            add(192, 64, 3)
            if rows <= 64:  # more sums than the registers of three warpgroups hold
                add(256, 64, 2)
    return tuple(found)


def default(rows: int, outputs: int, gated: bool = False) -> FlatConfig:
    """The rule: one deep block an SM, equal shares of all steps."""
    return candidates(rows, outputs, gated)[0]
