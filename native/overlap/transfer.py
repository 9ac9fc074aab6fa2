"""What one overlapped collective moves: static, an argument of the trace and not of the program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

Collective = Literal["all_reduce", "reduce_scatter", "all_to_all"]
Side = Literal["start", "done"]

DTYPES = ("bfloat16", "float16", "float32", "float64", "int32")


class Group(NamedTuple):
    """A contiguous range of the packed buffer that is sent at once."""

    offset: int
    """Elements before it."""
    count: int
    """Elements in it."""
    tiles: int
    """What its counter reaches when it is complete."""


@dataclass(frozen=True)
class Transfer:
    """One collective in groups, of a packed buffer that a GEMM fills group after group.

    Attributes:
      collective: "all_reduce" sums in place. In the others each group is `ranks` equal shares, in
        the order of ranks: "reduce_scatter" gives rank r the sum of all r-th shares, group after
        group; "all_to_all" puts what rank s sent at the place of the s-th share.
      groups: in the order in which they are complete, and in that of their offsets.
      shape: of the packed buffer; a reduce-scatter divides the first dimension by `ranks`.
      dtype: of the packed buffer, one of `DTYPES`.
      enqueue: who puts waits and collectives on the private stream. "done" does so once the GEMM
        is launched; "start" does so before, as a program for CUDA alone would. See `Communicator`.
      trace: record the times of each group, for `Communicator.trace`.

    Raises:
      ValueError: groups that do not lie in the buffer one after another, or another wrong field.
    """

    collective: Collective
    groups: tuple[Group, ...]
    shape: tuple[int, ...]
    dtype: Any
    enqueue: Side = "done"
    trace: bool = False

    def __post_init__(self) -> None:
        """Checks all that does not depend on the number of ranks."""
        object.__setattr__(self, "groups", tuple(Group(*map(int, g)) for g in self.groups))
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.collective not in get_args(Collective):
            raise ValueError(f"collective={self.collective!r}: one of {get_args(Collective)}")
        if self.enqueue not in get_args(Side):
            raise ValueError(f"enqueue={self.enqueue!r}: one of {get_args(Side)}")
        if self.dtype.name not in DTYPES:
            raise ValueError(f"dtype={self.dtype.name}: one of {DTYPES}")
        if not self.groups:
            raise ValueError("groups is empty; at least one is needed")
        end = 0
        for group in self.groups:
            if group.offset < end or group.count < 1 or group.tiles < 1:
                raise ValueError(f"{group} does not follow the groups before it, {self.groups}")
            end = group.offset + group.count
        if end > math.prod(self.shape):
            raise ValueError(f"groups end at {end}, the buffer of shape {self.shape} before")

    def result_shape(self, ranks: int) -> tuple[int, ...]:
        """Shape of what each rank gets.

        Raises:
          ValueError: groups or buffer cannot be shared out to so many ranks.
        """
        if self.collective == "all_reduce":
            return self.shape
        if self.shape[0] % ranks or any(g.count % ranks or g.offset % ranks for g in self.groups):
            raise ValueError(f"{self.shape} in {self.groups} cannot be shared out to {ranks} ranks")
        if self.collective == "all_to_all":
            return self.shape
        return (self.shape[0] // ranks, *self.shape[1:])

    def attributes(self, side: Side) -> dict[str, Any]:
        """Attributes of the FFI call `side`."""
        offsets, counts, tiles = np.array(self.groups, np.int64).T.copy()
        return {
            "collective": self.collective,
            "offsets": offsets,
            "counts": counts,
            "targets": tiles,
            "enqueue": self.enqueue == side,
            "trace": self.trace,
        }


def groups_of(spans: Sequence[tuple[int, int]], tiles: Sequence[int]) -> tuple[Group, ...]:
    """Groups from (offset, count) ranges and the tiles of each."""
    return tuple(Group(o, c, t) for (o, c), t in zip(spans, tiles, strict=True))
