"""Shapes that steps are compiled for. A step is padded to the smallest shape that holds it.

No jax here, so that a process without a device can pad.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

_SMALLEST_CONTEXT = 512
_SMALLEST_CHUNK = 64
_SMALLEST_MIXED_BATCH = 8


@dataclass(frozen=True, order=True, slots=True)
class StepShape:
    """Padded size of a step; `tokens == 0` is a pure decode step."""

    batch: int
    """Decoding rows."""
    tokens: int
    """Prompt tokens."""
    context: int
    """Tokens that a page table row covers."""
    greedy: bool
    """The step takes the argmax only; otherwise it runs the whole sampler."""


def powers(low: int, high: int, factor: int) -> tuple[int, ...]:
    """low, low * factor, ... and high itself."""
    values = []
    while low < high:
        values.append(low)
        low *= factor
    return (*values, high)


def _round_up(value: int, choices: tuple[int, ...], unit: int) -> int:
    """The smallest choice that holds value; beyond the last, the next power of two."""
    for choice in choices:
        if value <= choice:
            return choice
    return max(unit, 1 << (value - 1).bit_length())


class ShapeTable:
    """The shapes to compile ahead, and the one that a step takes.

    Args:
      max_num_seqs: largest batch.
      max_num_batched_tokens: largest number of prompt tokens.
      max_model_len: longest context.
      page_size: contexts are rounded up to whole pages.
      batch_buckets: replaces the defaults. Mixed steps have those of 8 rows and more; by default
        they know two sizes.
      token_buckets, context_buckets: replace the defaults.
      prefill, decode: the phases that steps hold as a rule; shapes of others are not in `all`.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        page_size: int,
        batch_buckets: tuple[int, ...] | None = None,
        token_buckets: tuple[int, ...] | None = None,
        context_buckets: tuple[int, ...] | None = None,
        prefill: bool = True,
        decode: bool = True,
    ) -> None:
        longest = -(-max_model_len // page_size) * page_size
        contexts = context_buckets or powers(min(_SMALLEST_CONTEXT, longest), longest, 4)
        self.contexts = tuple(sorted({-(-c // page_size) * page_size for c in contexts}))
        self.batches = batch_buckets or powers(1, max_num_seqs, 2)
        most = max_num_batched_tokens
        self.tokens = token_buckets or powers(min(_SMALLEST_CHUNK, most), most, 4)
        some = self._batch(min(_SMALLEST_MIXED_BATCH, max_num_seqs))
        mixed = {some, self.batches[-1]}
        if batch_buckets is not None:
            mixed |= {batch for batch in batch_buckets if batch > some}
        # Prompts alone need no rows, where that is the rule.
        self.mixed_batches = (0,) * (not decode) + tuple(sorted(mixed))
        self._page_size = page_size
        self._prefill, self._decode = prefill, decode

    def _batch(self, rows: int) -> int:
        return _round_up(rows, self.batches, 1)

    def pick(self, rows: int, tokens: int, context: int, greedy: bool) -> StepShape:
        """The shape of a step with this many decoding rows and prompt tokens."""
        context = _round_up(context, self.contexts, self._page_size)
        if tokens == 0:
            return StepShape(self._batch(rows), 0, context, greedy)
        tokens = _round_up(tokens, self.tokens, 1)
        batch = _round_up(rows, self.mixed_batches, 1)
        return StepShape(batch, tokens, context, greedy and batch > 0)

    def all(self) -> list[StepShape]:
        """Every shape that `pick` gives within the buckets, the largest first."""
        decode = itertools.product(self.batches, (0,), self.contexts, (True, False))
        # The sampler of a step without rows is short: it has those of the prompts that end only.
        batches = self.mixed_batches if self._decode else (0,)
        greedy = (True, False) if self._decode else (False,)
        mixed = itertools.product(batches, self.tokens, self.contexts, greedy)
        shapes = [*(decode if self._decode else ()), *(mixed if self._prefill else ())]
        return sorted((StepShape(*s) for s in shapes), reverse=True)
