"""Shapes that steps are compiled for. A step is padded to the smallest shape that holds it.

No jax here, so that a process without a device can pad.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from jpd.config import EngineConfig

_SMALLEST_CONTEXT = 512
_SMALLEST_CHUNK = 64
_SMALLEST_MIXED_BATCH = 8
_HALVES_FROM = 32
"""Batches from which on there is one between two powers of two: padded rows cost most where a
decode step has few SMs, since its products are then bound by arithmetic."""


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


def _batches(most: int) -> tuple[int, ...]:
    """Decoding rows that steps are compiled for."""
    whole = powers(1, most, 2)
    halves = (3 * rows // 2 for rows in whole if rows >= _HALVES_FROM)
    return tuple(sorted({*whole, *(rows for rows in halves if rows < most)}))


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
      max_num_batched_tokens: most rows and prompt tokens of a step together, padded rows too unless
        these are more than half of it.
      max_num_mixed_tokens: the same of a step that has both; as many when None.
      max_model_len: longest context.
      page_size: contexts are rounded up to whole pages.
      batch_buckets: replaces the defaults: powers of two and, above 32, what is halfway between.
        Of these mixed steps have only what holds 8, 32, 128 and so on, and the largest.
      token_buckets, context_buckets: replace the defaults. Of a mixed step the bucket is for its
        rows and prompt tokens together, so that products have no more rows than of a prompt alone:
        a few more begin another row of tiles, with which products take up to a sixth longer. Those
        of mixed steps end at `max_num_mixed_tokens`.
      sampled: steps may have rows that are not greedy as a rule.
      prefill, decode: the phases that steps hold as a rule; shapes of others are not in `all`.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        page_size: int,
        max_num_mixed_tokens: int | None = None,
        batch_buckets: tuple[int, ...] | None = None,
        token_buckets: tuple[int, ...] | None = None,
        context_buckets: tuple[int, ...] | None = None,
        sampled: bool = True,
        prefill: bool = True,
        decode: bool = True,
    ) -> None:
        longest = -(-max_model_len // page_size) * page_size
        contexts = context_buckets or powers(min(_SMALLEST_CONTEXT, longest), longest, 4)
        self.contexts = tuple(sorted({-(-c // page_size) * page_size for c in contexts}))
        self.batches = batch_buckets or _batches(max_num_seqs)
        most = max_num_batched_tokens
        self.tokens = token_buckets or powers(min(_SMALLEST_CHUNK, most), most, 4)
        most_mixed = max_num_mixed_tokens or most
        self._mixed_tokens = self.tokens
        if most_mixed < self.tokens[-1]:
            self._mixed_tokens = (*(t for t in self.tokens if t < most_mixed), most_mixed)
        few = min(_SMALLEST_MIXED_BATCH, max_num_seqs)
        mixed = {self._batch(rows) for rows in powers(few, max_num_seqs, 4)} | {self.batches[-1]}
        # Prompts alone need no rows.
        self.mixed_batches = (0, *sorted(mixed))
        self._page_size, self._most, self._most_mixed = page_size, most, most_mixed
        self._kinds = (True, False) if sampled else (True,)  # `StepShape.greedy`
        self._prefill, self._decode = prefill, decode

    @property
    def most_rows(self) -> int:
        """Rows of the products in the largest step, padding included."""
        return max(batch + self._tokens_beside(batch)[-1] for batch in self.mixed_batches)

    def _batch(self, rows: int) -> int:
        return _round_up(rows, self.batches, 1)

    def pick(self, rows: int, tokens: int, context: int, greedy: bool) -> StepShape:
        """The shape of a step with this many decoding rows and prompt tokens."""
        context = _round_up(context, self.contexts, self._page_size)
        if tokens == 0:
            return StepShape(self._batch(rows), 0, context, greedy)
        batch = self._mixed_batch(rows)
        tokens = _round_up(tokens, self._tokens_beside(batch), 1)
        return StepShape(batch, tokens, context, greedy and batch > 0)

    def most_tokens(self, rows: int) -> int:
        """Prompt tokens that a step with so many decoding rows may hold."""
        most = self._most_mixed if rows else self._most
        batch = self._mixed_batch(rows)
        return most - (batch if 2 * batch <= most else rows)

    def _mixed_batch(self, rows: int) -> int:
        return _round_up(rows, self.mixed_batches, 1)

    def _tokens_beside(self, batch: int) -> tuple[int, ...]:
        """Buckets of prompt tokens in a step with so many padded rows."""
        tokens = self._mixed_tokens if batch else self.tokens
        return tuple(sorted({t - batch if t >= 2 * batch else t for t in tokens}))

    def all(self) -> list[StepShape]:
        """Every shape that `pick` gives within the buckets, the largest first."""
        decode = itertools.product(self.batches, (0,), self.contexts, self._kinds)
        prefill = [
            (batch, tokens, context, greedy)
            for batch in (self.mixed_batches if self._decode else (0,))
            for tokens in self._tokens_beside(batch)
            for context in self.contexts
            # Without rows the sampler has only those of prompts that end: it is short.
            for greedy in (self._kinds if batch else (False,))
        ]
        shapes = [*(decode if self._decode else ()), *(prefill if self._prefill else ())]
        return sorted((StepShape(*s) for s in shapes), reverse=True)


def shape_table(config: EngineConfig, *, prefill: bool = True, decode: bool = True) -> ShapeTable:
    """The step shapes of a resolved configuration, for executors of one phase or of both."""
    return ShapeTable(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_mixed_tokens=config.max_num_mixed_tokens,
        max_model_len=config.max_model_len,
        page_size=config.page_size,
        batch_buckets=config.batch_buckets,
        token_buckets=config.token_buckets,
        context_buckets=config.context_buckets,
        sampled=config.compile_sampled_steps,
        prefill=prefill,
        decode=decode,
    )
