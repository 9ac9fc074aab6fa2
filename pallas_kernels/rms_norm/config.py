"""How the work of the norm is cut: one block of one warpgroup a row.

A row of 8192 bf16 values is 64 a thread, loaded in 8 vectors of 16 bytes that are all under way at
once. By its registers, 111 to 142 a thread at that width, three or four blocks fit on an SM.
"""

from __future__ import annotations

import dataclasses

WARPGROUP_THREADS = 128
MAX_WIDTH = 16_384


@dataclasses.dataclass(frozen=True)
class RmsNormConfig:
    """Tunables of one call."""

    vector: int
    """Neighbouring elements that a thread loads at once."""


def default_config(width: int, itemsize: int = 2) -> RmsNormConfig:
    """The widest loads that split a row evenly.

    Args:
      width: elements of a row.
      itemsize: bytes of an element.

    Raises:
      NotImplementedError: the width is no multiple of 128 up to 16384.
    """
    if width % WARPGROUP_THREADS or not 0 < width <= MAX_WIDTH:
        raise NotImplementedError(
            f"width={width}: multiples of 128 up to {MAX_WIDTH} are supported"
        )
    per_thread, vector = width // WARPGROUP_THREADS, 16 // itemsize
    while per_thread % vector:
        vector //= 2
    return RmsNormConfig(vector)
