"""Which block computes which tile when, and how tiles form waves and groups: plain Python.

A persistent grid of `sms` blocks takes tile t at block t mod sms, so that tile t belongs to wave
t // sms and the order of completion is the order of t up to the spread within a wave. FlashOverlap
(arXiv 2504.19519, sections 3.2.2 to 3.2.4) measures that order; here it is known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise

import numpy as np


def waves_of(tiles: int, sms: int) -> int:
    """Waves in which `sms` blocks compute `tiles` tiles; the last may be partial."""
    return -(-tiles // sms)


def groups_of_waves(waves: Sequence[int], tiles: int, sms: int) -> tuple[int, ...]:
    """Tiles of each group, of groups given in whole waves.

    Args:
      waves: waves of each group, in order; the last wave may be partial.
      tiles: tiles of the product.
      sms: blocks that compute them.

    Raises:
      ValueError: a group without a wave, or a sum that is not the number of waves.
    """
    total = waves_of(tiles, sms)
    if any(count < 1 for count in waves) or sum(waves) != total:
        raise ValueError(f"groups of {tuple(waves)} waves: {tiles} tiles on {sms} SMs have {total}")
    ends = [min(end * sms, tiles) for end in accumulate(waves)]
    return tuple(end - start for start, end in pairwise((0, *ends)))


def partitions(waves: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut `waves` waves into groups in order: 2^(waves - 1) tuples, one group first.

    Raises:
      ValueError: no wave at all.
    """
    if waves < 1:
        raise ValueError(f"{waves} waves cannot be cut; at least 1 is needed")
    for cuts in range(waves):
        for inner in combinations(range(1, waves), cuts):
            ends = (0, *inner, waves)
            yield tuple(end - start for start, end in pairwise(ends))


def starts_of(groups: Sequence[int]) -> tuple[int, ...]:
    """First tile of each group."""
    return (0, *accumulate(groups[:-1]))


def check_groups(groups: Sequence[int], tiles: int) -> None:
    """Checks that `groups` is a partition of `tiles` tiles.

    Raises:
      ValueError: an empty group, or another sum.
    """
    if not groups or any(size < 1 for size in groups) or sum(groups) != tiles:
        raise ValueError(
            f"groups {tuple(groups)} do not cut {tiles} tiles into parts of at least 1"
        )


def last_waves(groups: Sequence[int], sms: int) -> tuple[int, ...]:
    """The wave at whose end each group is complete, counted from 0."""
    return tuple((end - 1) // sms for end in accumulate(groups))


def tile_order(tiles_m: int, tiles_n: int, grid_minor: str, grid_tile_width: int) -> np.ndarray:
    """`[tiles, 2]` int32: row and column of tile t in the matrix of tiles.

    Bands of `grid_tile_width` tiles along `grid_minor` are walked one after another, every other
    one backwards along the other axis, so that tiles of one wave share rows and columns in L2. The
    kernel computes the same with `plgpu.planar_snake`.
    """
    minors, majors = (tiles_m, tiles_n) if grid_minor == "m" else (tiles_n, tiles_m)
    order = []
    for band, first in enumerate(range(0, minors, grid_tile_width)):
        along = range(majors) if band % 2 == 0 else range(majors - 1, -1, -1)
        width = min(grid_tile_width, minors - first)
        order += [(first + i, major) for major in along for i in range(width)]
    found = np.array(order, np.int32).reshape(-1, 2)
    return found if grid_minor == "m" else found[:, ::-1]
