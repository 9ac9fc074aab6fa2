"""An executor without a model: a token's "KV" is a hash of everything that its row shows.

The hash at a position is computed from the hash that the row's page table shows at the position
before, as a real KV depends on all tokens before it. So a wrong page, a page reused too early or a
wrong token changes every hash after it, and the tokens, which are taken from the hashes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from jpd.engine import batch as batches
from jpd.engine.plan import StepPlan, StepResult
from jpd.engine.sequence import Sequence
from jpd.engine.shapes import ShapeTable

VOCAB = 8
_PRIME = 2**31 - 1
GARBAGE = -12_345
"""The "token" of a chunk that does not end its prompt: nobody may use it."""


def extend(chain: int, token: int) -> int:
    """The hash of a sequence from that of all but its last token."""
    return (int(chain) * 48_271 + int(token) + 1) % _PRIME


def next_token(chain: int) -> int:
    """What the "model" says after a sequence with this hash."""
    return (int(chain) >> 7) % VOCAB


@cache
def run_alone(prompt: tuple[int, ...], length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens and hashes `[length]` of a prompt and its continuation, without pages or batches."""
    tokens, chains, chain = list(prompt), [], 0
    for position in range(length):
        chain = extend(chain, tokens[position])
        chains.append(chain)
        if position + 1 == len(tokens):
            tokens.append(next_token(chain))
    return tuple(tokens[:length]), tuple(chains)


def output_alone(prompt: tuple[int, ...], length: int, stop_ids: tuple[int, ...]) -> list[int]:
    """What a sequence that runs alone generates."""
    output = []
    for token in run_alone(prompt, length)[0][len(prompt) :]:
        output.append(token)
        if token in stop_ids:
            break
    return output


@dataclass(slots=True)
class FakeStep:
    """A launched step; it has run already, since the device runs steps in the order of launch."""

    plan: StepPlan
    tokens: np.ndarray

    def result(self) -> StepResult:
        """As of `jpd.engine.executor.InFlight`."""
        return StepResult(self.tokens, None)


@dataclass(slots=True)
class FakeDevice:
    """Runs packed plans and checks all that each row sees."""

    num_pages: int
    page_size: int
    rows: int
    max_model_len: int
    max_chunks: int
    shapes: ShapeTable
    params_version: int = 0
    """Counts up when the parameters are swapped; each KV remembers by which it was made."""
    recompiles: int = 0
    chains: np.ndarray = field(init=False)
    versions: np.ndarray = field(init=False)
    history: np.ndarray = field(init=False)
    admitted_at: dict[Sequence, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chains = np.full(self.num_pages * self.page_size, GARBAGE, np.int64)
        self.versions = np.full(self.num_pages * self.page_size, -1, np.int64)
        self.history = np.full((self.rows + 1, self.max_model_len + 1), GARBAGE, np.int32)

    def launch(self, plan: StepPlan) -> FakeStep:
        """Runs the step from its packed form."""
        self.remember(plan)
        batch, work = self.unpack(plan)
        self.write(work)
        return FakeStep(plan, self.sample(plan, batch, work))

    def remember(self, plan: StepPlan) -> None:
        """Remembers by which parameters the KV of a new row is made."""
        for sequence in plan.admitted:
            self.admitted_at[sequence] = self.params_version

    def unpack(self, plan: StepPlan) -> tuple[batches.Batch, list]:
        """The step by its packed form; page table, first position and tokens of each row."""
        counts = [len(c.tokens) for c in plan.chunks]
        shape = self.shapes.pick(len(plan.rows), sum(counts), plan.context_tokens, False)
        packed = batches.pack(
            plan,
            shape,
            chunks=self.max_chunks,
            page_size=self.page_size,
            unowned_row=self.rows,
        )
        batch = batches.unpack(packed, shape, self.max_chunks, self.page_size)
        work = []  # (sequence, page table row, first position, tokens) of each row and chunk
        for i, sequence in enumerate(plan.sequences):
            position, token = int(batch.positions[i]), int(batch.tokens[i])
            if token < 0:
                token = int(self.history[batch.rows[i], position])
            work.append((sequence, batch.page_table[i], position, [token]))
        for n, chunk in enumerate(plan.chunks):
            start, count = int(batch.chunk_starts[n]), int(batch.chunk_counts[n])
            assert (batch.chunk_of_token[start : start + count] == n).all()
            positions = batch.chunk_positions[start : start + count]
            first = int(batch.chunk_contexts[n]) - count
            np.testing.assert_array_equal(positions, np.arange(first, first + count))
            tokens = batch.chunk_tokens[start : start + count].tolist()
            work.append((chunk.sequence, batch.chunk_page_table[n], first, tokens))
        assert (batch.positions[len(plan.rows) :] == -1).all()
        if plan.chunks:
            assert (batch.chunk_positions[sum(counts) :] == -1).all()
        return batch, work

    def write(self, work: list) -> None:
        """Stores the "KV" of all rows."""
        written: list[int] = []
        for _, table, first, tokens in work:
            written += self._write(table, first, tokens)
        assert len(written) == len(set(written)), "two rows write to the same place"
        assert min(written) >= self.page_size, "page 0 belongs to the padding"

    def _slots(self, table: np.ndarray, stop: int) -> np.ndarray:
        at = np.arange(stop)
        return table[at // self.page_size] * self.page_size + at % self.page_size

    def _write(self, table: np.ndarray, first: int, tokens: list[int]) -> list[int]:
        slots = self._slots(table, first + len(tokens)).tolist()
        for position, token in enumerate(tokens, start=first):
            before = self.chains[slots[position - 1]] if position else 0
            self.chains[slots[position]] = extend(before, token)
            self.versions[slots[position]] = self.params_version
        return slots[first:]

    def sample(self, plan: StepPlan, batch: batches.Batch, work: list) -> np.ndarray:
        """Looks at all that each row sees, after all of them have written."""
        sampled = []
        for i, (sequence, table, first, tokens) in enumerate(work):
            end = first + len(tokens)
            slots = self._slots(table, end)
            prompt = tuple(sequence_prompt(sequence))
            _, want = run_alone(prompt, self.max_model_len)
            np.testing.assert_array_equal(self.chains[slots], want[:end], "a wrong page or token")
            made_by = self.versions[slots].min()
            assert made_by >= self.admitted_at[sequence], "KV of parameters that were replaced"
            token, row = next_token(self.chains[slots[-1]]), sequence_row(plan, batch, i)
            ends_prompt = i < len(plan.rows) or plan.chunks[i - len(plan.rows)].last
            assert ends_prompt == (row != self.rows)
            self.history[row, end] = token
            sampled.append(token if ends_prompt else GARBAGE)
        return np.array(sampled, np.int32)


def sequence_prompt(sequence: Sequence) -> list[int]:
    """The prompt, which is the beginning of `tokens` in every state."""
    return sequence.tokens[: sequence.prompt_length].tolist()


def sequence_row(plan: StepPlan, batch: batches.Batch, i: int) -> int:
    """Row of the history that result `i` is stored in."""
    if i < len(plan.rows):
        return int(batch.rows[i])
    return int(batch.chunk_rows[i - len(plan.rows)])
