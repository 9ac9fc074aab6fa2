"""Which pipeline steps of a flat GEMM each block takes (stream-K)."""

from __future__ import annotations

import functools

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.flat_gemm.config import FlatConfig


def divide(number, by: int):
    """Quotient of numbers that are not negative; `//` of a traced one also tests the sign."""
    return number // by if isinstance(number, int) else lax.div(number, jnp.int32(by))


class Schedule:
    """Which steps each block takes; `first` and `owner` also work on traced numbers.

    A block takes its steps from the last to the first. So it begins with the beginning of a tile
    whose rest falls to the next block, and ends with the rest of one whose beginning the block
    before it, as a rule, has long put down.
    """

    def __init__(self, tiles: int, steps: int, blocks: int) -> None:
        self.steps = steps
        """Pipeline steps of a tile."""
        self.total = tiles * steps
        self.blocks = min(blocks, self.total)

    def first(self, block):
        """First step of a block."""
        return divide(block * self.total, self.blocks)

    def owner(self, step):
        """The block that a step belongs to."""
        return divide((step + 1) * self.blocks - 1, self.total)

    @functools.cached_property
    def most_shares(self) -> int:
        """Most blocks that one tile is cut between."""
        starts = range(0, self.total, self.steps)
        return max(self.owner(s + self.steps - 1) - self.owner(s) + 1 for s in starts)

    def sees(self, block, tile, done):
        """Whether the one other part of a tile that ends in `block` is there after `done` steps.

        If all blocks began at once and take equally long for a step: the part is the beginning of
        the tile, and what the block before began with.
        """
        begin, end = self.first(block), self.first(block + 1)
        low, high = tile * self.steps, (tile + 1) * self.steps
        two = (self.first(block - 1) <= low) & (low < begin) & (high <= end)
        return two & (begin - low <= done)

    def ever_sees(self, look_steps: int, write_steps: int) -> bool:
        """Whether any block sees it `look_steps` before its end, `write_steps` after it is done."""

        def sees(block: int) -> bool:
            begin, tile = self.first(block), self.first(block) // self.steps
            last = self.first(block + 1) - begin
            first = max(0, self.first(block + 1) - (tile + 1) * self.steps)
            return self.sees(block, tile, max(first, last - look_steps) - write_steps)

        return any(sees(block) for block in range(1, self.blocks))


def schedule_of(config: FlatConfig, outputs: int, inputs: int) -> Schedule:
    """How the blocks share the work of a product."""
    tiles, steps = pl.cdiv(outputs, config.tile_n), pl.cdiv(inputs, config.tile_k)
    blocks = tiles * config.split if config.split else config.waves * mosaic.sm_count()
    return Schedule(tiles, steps, blocks)
