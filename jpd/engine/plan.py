"""What one step computes: NumPy arrays that a process without the scheduler can execute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jpd.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class Chunk:
    """Consecutive prompt tokens of one sequence."""

    sequence: Sequence
    row: int
    serial: int
    start: int
    """Position of the first token."""
    tokens: np.ndarray
    """`[n]` int32."""
    last: bool
    """The prompt ends with this chunk, so its next token is sampled."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass(eq=False, slots=True)
class StepPlan:
    """`B` decoding rows and up to `N` prompt chunks."""

    rows: np.ndarray
    """`[B]` int32 rows of the sequence table."""
    serials: np.ndarray
    """`[B]` int64; a row that meanwhile belongs to another sequence has another serial."""
    sequences: list[Sequence]
    """The B decoding sequences."""
    tokens: np.ndarray
    """`[B]` int32 newest token of each row; -1 while it is still on the device."""
    positions: np.ndarray
    """`[B]` int32 position of that token."""
    page_table: np.ndarray
    """`[B, W]` int32 pages of each row."""
    chunks: list[Chunk]
    chunk_page_table: np.ndarray
    """`[len(chunks), W]` int32."""
    admitted: list[tuple[int, Sequence]]
    """Rows that begin with this step."""
    context_tokens: int
    """Longest context in the step."""
    plain_greedy: bool
    """Every sampled row takes the argmax and nothing else is asked."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.rows) + sum(len(c.tokens) for c in self.chunks)


@dataclass(eq=False, slots=True)
class Committed:
    """Tokens that became known: `tokens[i]` of `sequences[i]`, from row `result_rows[i]`."""

    sequences: list[Sequence]
    tokens: list[int]
    result_rows: list[int]
