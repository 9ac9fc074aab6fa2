"""What is static about a decode attention launch."""

from __future__ import annotations

import dataclasses

from pallas_kernels.decode_attention.config import (
    DecodeConfig,
    padded_group,
    padded_head_size,
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a launch.

    Attributes:
      group: query heads of a kv head.
      head_size: D.
      page_size: tokens of a page.
      dtype: of q, k, v and the output, as a string.
      scale: of the scores.
      window: visible tokens, or None.
      soft_cap: bound of the scaled scores, or None.
      phi: the unified value where it is one number, else None (an array operand).
      softmax: "async", "sync" or "lazy".
      return_lse: whether lse is an output.
      blocks: blocks per kv head.
      early: what the kernel ahead does not write is read before it has ended.
      config: tunables.
    """

    group: int
    head_size: int
    page_size: int
    dtype: str
    scale: float
    window: int | None
    soft_cap: float | None
    phi: float | None
    softmax: str
    return_lse: bool
    blocks: int
    early: bool
    config: DecodeConfig

    @property
    def rows(self) -> int:
        """Query heads, padded."""
        return padded_group(self.group)

    @property
    def columns(self) -> int:
        """Head size, padded."""
        return padded_head_size(self.head_size)

    @property
    def least(self) -> tuple[float, bool]:
        """Least safe denominator, and whether that is for each visible token."""
        return (2.0**-14, True) if self.dtype == "float16" else (2.0**-64, False)
