"""A sequence: one stream of tokens that grows from a prompt. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from jpd.types import FinishReason, SamplingParams


class State(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    """In the queue: new, or preempted and to be computed again."""
    RUNNING = "running"
    """Has a row and pages."""
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One of the `n` sequences of a request.

    While it runs, its tokens and counts are in its row of `SequenceTable`; in the queue `tokens`
    holds everything known of it.
    """

    request_id: str
    index: int
    tokens: np.ndarray
    """`[n]` int32, the prompt and, after a preemption, what was generated."""
    params: SamplingParams
    order: tuple[int, int]
    """Lower is preempted last, and served first but for `overtaken_s`: (priority, arrival
    number)."""
    max_length: int
    """Tokens, prompt counted, at which it ends."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end it: end of sequence unless ignored, and the request's own."""
    key: np.ndarray | None = None
    """`[2]` uint32, seed of its random stream."""
    arrival_s: float = 0.0
    """By the coordinator's clock."""
    overtaken_s: float = 0.0
    """Its place in the queue is that of one that comes this much later, until it has given a
    token."""
    prompt_length: int = field(init=False)
    state: State = State.WAITING
    finish_reason: FinishReason | None = None
    row: int = -1
    pages: list[int] = field(default_factory=list)
    moved: bool = False
    """Its pages are in the pool of the decode executors."""
    target_pages: list[int] = field(default_factory=list)
    """There, for the pages of its prompt, which are sent while it is computed; until it moves."""
    num_sent: int = 0
    """Pages that were sent in full by the steps launched so far."""
    page_names: list[bytes] = field(default_factory=list)
    """Names of its full pages, for the prefix cache."""
    findable: bool = True
    """Its pages may enter the prefix cache: the parameters were not swapped since its admission."""
    token_in_flight: bool = False
    """Preempted while a step that samples its next token was running."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    was_admitted: bool = False
    num_losses: int = 0
    """Executors that were lost in a step of its, since one ran."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def place(self) -> tuple[int, float, int]:
        """In the queue; lower is served first."""
        priority, number = self.order
        overtaken_s = self.overtaken_s if len(self.tokens) == self.prompt_length else 0.0
        return priority, self.arrival_s + overtaken_s, number


class SequenceTable:
    """Rows of the running sequences as arrays, so that a step costs little Python.

    For a row: `known` tokens are on the host, `begun` of them when it was admitted; `computed` have
    their KV in the pages or in a launched step. A decoding row has `known == computed + 1`, or
    `known == computed` while its newest token is still on the device. A row neither decodes nor has
    prompt left while its first token is on the way from an executor that does not decode.
    """

    def __init__(self, rows: int, max_model_len: int, page_size: int, max_stop_ids: int) -> None:
        self.page_size = page_size
        self.pages_per_row = -(-max_model_len // page_size)
        self.sequences: list[Sequence | None] = [None] * rows
        self.serial = np.zeros(rows, np.int64)
        self.tokens = np.zeros((rows, max_model_len + 1), np.int32)
        self.begun = np.zeros(rows, np.int32)
        self.known = np.zeros(rows, np.int32)
        self.computed = np.zeros(rows, np.int32)
        self.max_length = np.zeros(rows, np.int32)
        self.capacity = np.zeros(rows, np.int32)
        self.decoding = np.zeros(rows, bool)
        self.plain_greedy = np.zeros(rows, bool)
        self.stop_ids = np.full((rows, max_stop_ids), -1, np.int32)
        self.page_table = np.zeros((rows, self.pages_per_row), np.int32)
        self._free_rows = list(range(rows - 1, -1, -1))
        self._serials = 0

    @property
    def num_free_rows(self) -> int:
        """Sequences that can still be admitted."""
        return len(self._free_rows)

    def admit(self, sequence: Sequence, computed: int) -> None:
        """Gives a waiting sequence, whose pages are set, a row."""
        row = self._free_rows.pop()
        self._serials += 1
        count = len(sequence.tokens)
        self.sequences[row] = sequence
        self.serial[row] = self._serials
        self.tokens[row, :count] = sequence.tokens
        self.begun[row] = self.known[row] = count
        self.computed[row] = computed
        self.max_length[row] = sequence.max_length
        self.decoding[row] = False
        self.plain_greedy[row] = sequence.params.is_plain_greedy
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(sequence.stop_ids)] = sequence.stop_ids
        self.page_table[row] = 0
        self.page_table[row, : len(sequence.pages)] = sequence.pages
        self.capacity[row] = len(sequence.pages) * self.page_size
        sequence.row = row
        sequence.findable = True
        sequence.state = State.RUNNING

    def add_page(self, row: int, page: int) -> None:
        """Appends a page to a running sequence."""
        pages = self.sequences[row].pages
        self.page_table[row, len(pages)] = page
        pages.append(page)
        self.capacity[row] += self.page_size

    def replace_pages(self, row: int, pages: list[int]) -> None:
        """Gives a running sequence other pages with the same content."""
        self.sequences[row].pages = pages
        self.page_table[row] = 0
        self.page_table[row, : len(pages)] = pages
        self.capacity[row] = len(pages) * self.page_size

    def remove(self, sequence: Sequence) -> None:
        """Takes the row back; `sequence.tokens` then holds everything known."""
        row = sequence.row
        sequence.tokens = self.tokens[row, : self.known[row]].copy()
        sequence.token_in_flight = bool(self.known[row] <= self.computed[row])
        sequence.row = -1
        self.sequences[row] = None
        self.serial[row] = 0
        self.decoding[row] = False
        self._free_rows.append(row)
