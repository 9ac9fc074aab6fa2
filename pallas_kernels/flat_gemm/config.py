"""Tunables of the flat GEMM, and the rule that picks them where no table does."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pallas_kernels import mosaic
from pallas_kernels.rms_norm.config import MAX_WIDTH

MAX_ROWS = 128
NORM_ROWS = 8
"""Most rows whose norm can be part of the product."""
_LEAST_WEIGHTS = 48 * 1024
"""Bytes of weights that a block should have in flight."""
_RESERVED = 2048


@dataclass(frozen=True, order=True)
class FlatConfig:
    """How a flat GEMM is cut."""

    tile_n: int = 64
    """Outputs of a tile; a multiple of 64, wgmma's M."""
    tile_k: int = 128
    """Inputs of one pipeline step."""
    stages: int = 6
    """Steps whose weights are in flight."""
    x_stages: int = 6
    """Steps whose activations are in flight; at most `stages`."""
    split: int | None = None
    """Blocks for each tile; None gives every SM one block with an equal share of all steps."""


def padded_rows(rows: int) -> int:
    """Rows of a tile: wgmma's N is a multiple of 8."""
    return -(-rows // 8) * 8


def norm_refusal(rows: int, inputs: int, config: FlatConfig) -> str | None:
    """Why a product cannot norm its rows; None if it can."""
    if rows > NORM_ROWS:
        return f"M = {rows}: the rows of a product with a norm are at most {NORM_ROWS}"
    if inputs % 128 or inputs > MAX_WIDTH:
        return f"K = {inputs}: with a norm, multiples of 128 up to {MAX_WIDTH} are supported"
    if inputs % config.tile_k:
        return f"K = {inputs}: with a norm it must be a multiple of tile_k = {config.tile_k}"
    return None


def smem_bytes(config: FlatConfig, rows: int, gated: bool, itemsize: int = 2) -> int:
    """Shared memory that a block takes."""
    weights = config.stages * config.tile_n * config.tile_k * (1 + gated)
    activations = padded_rows(rows) * (config.x_stages * config.tile_k + config.tile_n)
    return (weights + activations) * itemsize + _RESERVED


def _deepest(tile_n: int, tile_k: int, rows: int, gated: bool, blocks_per_sm: int):
    """Stages that fill the block's part of the SM; None if few weights would be in flight."""
    for x_stages in (6, 4, 3, 2):
        for stages in range(12, x_stages - 1, -1):
            config = FlatConfig(tile_n, tile_k, stages, x_stages)
            fits = smem_bytes(config, rows, gated) <= mosaic.SMEM_BYTES // blocks_per_sm
            if fits and stages * tile_n * tile_k * (1 + gated) * 2 >= _LEAST_WEIGHTS:
                return config
    return None


def _splits(tiles: int) -> tuple[int | None, ...]:
    """Equal shares for all SMs, or whole parts of tiles: the fewest that fill the SMs, one more."""
    sms = mosaic.sm_count()
    fewest = max(1, round(sms / tiles))
    fitting = [s for s in (fewest, fewest + 1) if 0.9 * sms <= s * tiles <= 4 * sms]
    return (None, *fitting)


@functools.cache
def candidates(rows: int, outputs: int, gated: bool = False) -> tuple[FlatConfig, ...]:
    """Configurations worth timing, the rule's choice first.

    Two blocks fit an SM, one of them the next kernel's, which loads its first weights while this
    one runs; with many rows there are also deeper ones that take the SM alone.
    """
    if rows <= 8:
        tiles = ((64, 128), (64, 256))
    elif rows <= 32:
        tiles = ((64, 128), (64, 64))
    else:
        tiles = ((64, 64), (128, 64) if rows <= 64 else (64, 128))
    found: dict[FlatConfig, None] = {}
    for blocks_per_sm in (2, 1) if rows > 16 else (2,):
        for tile_n, tile_k in tiles:
            config = _deepest(tile_n, tile_k, rows, gated, blocks_per_sm)
            if config is not None and not (gated and tile_n > 64 and rows > 32):
                splits = _splits(-(-outputs // tile_n)) if blocks_per_sm == 2 else (None,)
                for split in splits:
                    found[replace(config, split=split)] = None
    return tuple(found)


def default(rows: int, outputs: int, gated: bool = False) -> FlatConfig:
    """The rule: tiles as narrow as they can be, equal shares of all steps for every SM."""
    return candidates(rows, outputs, gated)[0]
