"""Tunables of the GEMV, and the rule that picks them where nothing was measured."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pallas_kernels import checks, mosaic

MAX_ROWS = 4
MAX_NORMED_ROWS = 2
"""Rows whose norm the kernel takes: for more, ptxas spills."""
_WARPS, _LANES = 4, 32
"""Of a block, which is one warpgroup, and of a warp."""
_REGISTERS, _MOST_BLOCKS = 65536, 16
"""Registers of an SM, and the blocks that it can hold."""
_BYTES_PER_US = 4.28e6
"""Rate of a device copy on an H200."""
_LATENCY_US, _BLOCK_US = 0.8, 0.6
"""Until a load is there, and what else a block needs: to start, to add up, to end. Guesses."""
_OPS_PER_US = 0.7 * 128 * 1750
"""Operations of an SM's lanes: guessed to be 0.7 of what they could do."""
_BLOCK_OPS = 80
"""What a thread does beside the products."""
_MOST_HELD = 4
"""Rows of the weight that a thread has at once where x has several: more, and ptxas spills."""
_MOST_CANDIDATES = 8


@dataclass(frozen=True, order=True)
class GemvConfig:
    """How a GEMV is cut. A block is one warpgroup."""

    rows: int = 2
    """Rows of the weight that each group of warps has at once; gated: of each half."""
    warps: int = 4
    """Warps of a group, neighbours that share a row: 1, 2 or 4. Other groups have other rows."""
    depth: int = 4
    """Parts of a row in flight, a power of two; all of it if it has no more. In a part every thread
    of the group has 16 bytes."""
    in_order: bool = False
    """Whether ptxas has to finish a part's products before the load that takes its place, or that
    of its x. It would rather mix those of all parts, for twice the registers."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for what fits no shape."""
        checks.whole(1, rows=self.rows, warps=self.warps, depth=self.depth)
        if self.warps not in (1, 2, 4) or self.depth & (self.depth - 1):
            raise ValueError(f"warps must be 1, 2 or 4, depth a power of two: {self}")

    @property
    def block_n(self) -> int:
        """Outputs of a block."""
        return self.rows * (_WARPS // self.warps)

    @property
    def threads(self) -> int:
        """Threads of a group."""
        return self.warps * _LANES


def vector(config: GemvConfig, inputs: int) -> int | None:
    """Elements of a thread in a part: 8, fewer if the row is short; None if it is too short."""
    return next((v for v in (8, 4, 2) if config.threads * v <= inputs), None)


def parts_of(config: GemvConfig, inputs: int) -> int:
    """Parts of a row."""
    return -(-inputs // (config.threads * (vector(config, inputs) or 8)))


def suits(config: GemvConfig, outputs: int, inputs: int) -> bool:
    """Whether the configuration takes the shape."""
    return outputs % config.block_n == 0 and vector(config, inputs) is not None


def x_depth(rows: int, depth: int) -> int:
    """Parts of x in flight: few, as they come from the caches; a power of two if `depth` is one."""
    return min(depth, 4 if rows == 1 else 2)


def microseconds(config: GemvConfig, rows: int, outputs: int, inputs: int, gated: bool) -> float:
    """Time by a model, for ranking; its constants are guesses, and none was fitted.

    An SM has its share of the memory's rate, unless its blocks have too little in flight for that
    or their operations take longer. At the end SMs wait for half a block. That the next kernel
    begins meanwhile is left out.
    """
    sms, halves = mosaic.sm_count(), 1 + gated
    parts = parts_of(config, inputs)
    depth = min(config.depth, parts)
    held_rows, few = config.rows * halves, x_depth(rows, depth)
    loads = held_rows * depth
    # In flight, then a part in float32, and sums; near what ptxas takes for the common shapes.
    registers = 16 + 4 * (loads + few * rows) + 8 * (held_rows + rows) + held_rows * rows
    if parts > few and not config.in_order:
        registers = max(registers, 50 + 12 * loads)
    block_bytes = config.block_n * halves * inputs * 2
    blocks = outputs // config.block_n
    held = max(1, min(_MOST_BLOCKS, _REGISTERS // (_WARPS * _LANES * min(registers, 255))))
    resident = min(held, -(-blocks // sms))
    block_us = _BLOCK_US + _LATENCY_US * max(1.0, parts / depth)
    # For each weight: to float32 and multiplied, x to float32, and its part of all others.
    operations = 1.5 + 2 * rows + 1.5 * rows / held_rows
    operations += _BLOCK_OPS * _WARPS * _LANES * 2 / block_bytes
    limits = (
        _BYTES_PER_US / sms,
        resident * block_bytes / block_us,
        2 * _OPS_PER_US / operations,
    )
    rate = sum(limit**-4 for limit in limits) ** -0.25  # one that is near another costs, too
    return blocks * block_bytes / (sms * rate) + 0.5 * block_bytes / rate


@functools.cache
def candidates(rows: int, outputs: int, inputs: int, gated: bool = False) -> tuple[GemvConfig, ...]:
    """Configurations worth timing, the rule's choice first; none if no configuration fits."""
    halves = 1 + gated
    found = []
    for warps in (4, 2, 1):
        for each in (1, 2, 4):
            for depth in (2, 4, 8, 16):
                config = GemvConfig(each, warps, depth)
                parts = parts_of(config, inputs)
                # Half of `depth` would hold the same, or all there is.
                idle = depth > 2 and parts <= depth // 2
                many = rows > 1 and each * halves > _MOST_HELD
                if not suits(config, outputs, inputs) or idle or many:
                    continue
                if min(parts, 8) <= each * halves * min(depth, parts) <= 16:
                    reloads = parts > x_depth(rows, min(depth, parts))
                    found.append(replace(config, in_order=reloads))
    small = (GemvConfig(1, warps, 2, True) for warps in (4, 2, 1))
    found = found or [config for config in small if suits(config, outputs, inputs)]
    found.sort(key=lambda c: (microseconds(c, rows, outputs, inputs, gated), c))
    return tuple(found[:_MOST_CANDIDATES])


def default(rows: int, outputs: int, inputs: int, gated: bool = False) -> GemvConfig | None:
    """The rule: what the model says is fastest; None if no configuration fits."""
    return next(iter(candidates(rows, outputs, inputs, gated)), None)
