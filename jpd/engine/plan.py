"""What one step computes, and what came of it: NumPy arrays that travel between processes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from jpd.engine.sequence import Sequence
from jpd.types import SamplingParams


@dataclass(eq=False, slots=True)
class Admission:
    """What an executor must know of a row before its first step there."""

    row: int
    serial: int
    params: SamplingParams
    key: np.ndarray | None
    """`[2]` uint32, seed of its random stream."""
    prompt_length: int
    tokens: np.ndarray | None
    """`[n]` int32, all that is known; None where the sampler does not look at them."""


@dataclass(eq=False, slots=True)
class Chunk:
    """Consecutive prompt tokens of one sequence."""

    sequence: Sequence | None
    """None in an executor's process."""
    row: int
    serial: int
    start: int
    """Position of the first token."""
    tokens: np.ndarray
    """`[n]` int32."""
    last: bool
    """The prompt ends with this chunk, so its next token is sampled."""
    named: list[int] = field(default_factory=list)
    """Pages that it fills and that the prefix cache found worth a name when it was planned."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass(eq=False, slots=True)
class PageCopy:
    """Keys and values of a chunk that go from a prefill device to a decode device."""

    source: list[int]
    """Pages of the prefill pool."""
    target: list[int]
    """Pages of the decode pool, as many."""


@dataclass(eq=False, slots=True)
class StepPlan:
    """`B` decoding rows and up to `N` prompt chunks."""

    rows: np.ndarray
    """`[B]` int32 rows of the sequence table."""
    serials: np.ndarray
    """`[B]` int64; a row that meanwhile belongs to another sequence has another serial."""
    sequences: list[Sequence]
    """The B decoding sequences; empty in an executor's process."""
    tokens: np.ndarray
    """`[B]` int32 newest token of each row; -1 while it is still on the device."""
    positions: np.ndarray
    """`[B]` int32 position of that token."""
    page_table: np.ndarray
    """`[B, W]` int32 pages of each row."""
    chunks: list[Chunk]
    chunk_page_table: np.ndarray
    """`[len(chunks), W]` int32."""
    admitted: list[Sequence]
    """Sequences that begin with this step; empty in an executor's process."""
    context_tokens: int
    """Longest context in the step."""
    plain_greedy: bool
    """Every sampled row takes the argmax and nothing else is asked."""
    decodes_on: bool = False
    """Who runs it also runs the next decode step: rows may decode there right after their last
    chunk, with their token still on the device. Else another may decode them once it is known."""
    copies: list[PageCopy] = field(default_factory=list)
    """What the step sends to another device, layer by layer; it has run when all is there."""
    admissions: list[Admission] = field(default_factory=list)
    """Rows that are new to the executor that the step goes to."""
    ticket: int = 0
    """Of the page fence; 0 without one."""
    generations: np.ndarray | None = None
    """`[B, W]` int64: for each entry of the page table, how often that page had been handed out.
    While the step runs nobody else gets the page, so it must stay. Only for checks."""
    chunk_generations: np.ndarray | None = None
    """`[len(chunks), W]` int64."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.rows) + sum(len(c.tokens) for c in self.chunks)

    def without_sequences(self) -> StepPlan:
        """What an executor in another process needs."""
        chunks = [replace(chunk, sequence=None, named=[]) for chunk in self.chunks]
        return replace(self, sequences=[], admitted=[], chunks=chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of R sampled tokens; see `jpd.engine.sampler.Sampled`."""

    logprobs: np.ndarray
    """`[R]` float32."""
    ranks: np.ndarray
    """`[R]` int32."""
    top_tokens: np.ndarray
    """`[R, 20]` int32."""
    top_logprobs: np.ndarray
    """`[R, 20]` float32."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled; one row for each decoding row, then for each chunk."""

    tokens: np.ndarray
    """`[R]` int32."""
    logprobs: TokenLogprobs | None
    """None after a greedy step."""
    softmax_recomputed_rows: int = 0
    """Rows of asynchronous softmax that left its range and were computed again."""


@dataclass(eq=False, slots=True)
class Committed:
    """Tokens that became known: `tokens[i]` of `sequences[i]`, from row `result_rows[i]`."""

    sequences: list[Sequence]
    tokens: list[int]
    result_rows: list[int]
