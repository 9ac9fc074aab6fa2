"""Tunables of prefill attention."""

from __future__ import annotations

import dataclasses

from pallas_kernels import checks
from pallas_kernels.mosaic import SMEM_BYTES

ROWS = 64
"""Query rows of one warpgroup: the M of one wgmma."""
_REGISTERS = {1: (240, 40), 2: (232, 40), 3: (160, 32)}
"""By warpgroups, registers a thread of those that compute and of the one that loads."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a block works on one query tile.

    Attributes:
      warpgroups: compute warpgroups a block, each with 64 query rows; a tile has 64 times as many.
      keys: tokens of one key/value tile, a multiple of 64 and of the page size.
      stages: key/value tiles in shared memory, at least 2.
      turns: the warpgroups take turns at issuing their products, so that one's softmax runs under
        the other's products (FlashAttention-3's ping-pong).
      persistent: one block an SM works on tile after tile, with the next tile's queries and keys
        on their way during the last one's epilogue; else a block a tile and head.
      separate_output: outputs leave through shared memory of their own, else through the queries'.
      heads_together: query heads that are worked on at the same time, to keep their keys in L2;
        None for all. A divisor of the number of heads.
    """

    warpgroups: int = 2
    keys: int = 128
    stages: int = 2
    turns: bool = True
    persistent: bool = True
    separate_output: bool = True
    heads_together: int | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for what fits no shape."""
        checks.whole(2, stages=self.stages)
        checks.whole(ROWS, ROWS, keys=self.keys)
        if self.warpgroups not in _REGISTERS:
            allowed = ", ".join(map(str, _REGISTERS))
            raise ValueError(f"warpgroups is {self.warpgroups}, expected one of {allowed}")
        if self.heads_together is not None:
            checks.whole(1, heads_together=self.heads_together)

    @property
    def rows(self) -> int:
        """Query tokens of one tile."""
        return self.warpgroups * ROWS

    def registers(self, head_dim: int) -> tuple[int, int]:
        """Registers a thread of the compute warpgroups and of the one that loads."""
        if self.warpgroups == 2 and head_dim > 128:
            return 240, 24
        return _REGISTERS[self.warpgroups]

    def shared_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Shared memory of a block without its barriers."""
        query = self.rows * head_dim * (2 if self.separate_output else 1)
        return (query + 2 * self.stages * self.keys * head_dim) * itemsize

    def fits(self, head_dim: int, page_size: int, heads: int) -> bool:
        """Whether a block of this configuration fits an SM and the shapes."""
        return (
            self.shared_bytes(head_dim) <= SMEM_BYTES - 2048
            and self.keys % page_size == 0
            and heads % (self.heads_together or heads) == 0
        )


def default(head_dim: int) -> Config:
    """The configuration for heads of size `head_dim`, as FlashAttention-3 picks its tiles."""
    if head_dim <= 128:
        return Config()
    return Config(keys=64, separate_output=False)


def candidates(head_dim: int, page_size: int, heads: int) -> list[Config]:
    """Configurations worth timing on a GPU, the default first."""
    first = default(head_dim)
    found = [first]
    for warpgroups, keys, stages in (
        (2, 128, 2),
        (2, 64, 4),
        (2, 64, 3),
        (2, 64, 2),
        (2, 192, 2),
        (3, 64, 2),
        (3, 64, 3),
        (3, 128, 2),
    ):
        if keys == 192 and head_dim > 64:
            continue  # too many registers
        if warpgroups == 3 and (head_dim > 128 or (keys == 128 and head_dim > 64)):
            continue
        for turns in (True, False):
            for persistent in (True, False):
                found.append(
                    dataclasses.replace(
                        first,
                        warpgroups=warpgroups,
                        keys=keys,
                        stages=stages,
                        turns=turns,
                        persistent=persistent,
                    )
                )
    return [c for c in dict.fromkeys(found) if c.fits(head_dim, page_size, heads)]
