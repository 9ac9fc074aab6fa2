"""Decides what each step computes. Pure NumPy and Python: no jax, no clock, no text.

Every step holds one token of each decoding sequence, then prompt chunks while
`max_num_batched_tokens` lasts: chunks of sequences already admitted, then new ones in order. A
sequence is admitted when all pages of its prompt are free. A decoding sequence that needs a page
when none is free preempts the sequence that is served last; that one is computed again later.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from jpd.engine.pages import PagePool
from jpd.engine.plan import Chunk, Committed, StepPlan
from jpd.engine.prefix_cache import PrefixCache, extend_hashes
from jpd.engine.sequence import Sequence, SequenceTable, State
from jpd.types import FinishReason

_FREE_SHARE_ON_ADMISSION = 0.01


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start."""

    preemptions: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of admitted sequences, computed or found in the prefix cache."""
    cached_tokens: int = 0
    """Those found in the prefix cache."""


class Scheduler:
    """Owns the pages, the queue and the rows of running sequences.

    Args:
      max_num_seqs: rows.
      max_model_len: tokens a row can hold.
      max_num_batched_tokens: tokens of one step, at least `max_num_seqs`.
      max_prefills_per_step: chunks of one step.
      num_pages: pages of the pool, page 0 included.
      page_size: tokens a page holds.
      max_stop_ids: stop token ids a sequence may have.
      enable_prefix_caching: share pages between equal beginnings.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_prefills_per_step: int,
        num_pages: int,
        page_size: int,
        max_stop_ids: int,
        enable_prefix_caching: bool,
    ) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool) if enable_prefix_caching else None
        self.table = SequenceTable(max_num_seqs, max_model_len, page_size, max_stop_ids)
        self.stats = SchedulerStats()
        self._max_tokens = max_num_batched_tokens
        self._max_chunks = max_prefills_per_step
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._prefilling: list[Sequence] = []
        self._watermark = int(num_pages * _FREE_SHARE_ON_ADMISSION)
        self.num_waiting = 0

    @property
    def num_running(self) -> int:
        """Sequences that have a row."""
        return len(self.table.sequences) - self.table.num_free_rows

    @property
    def has_work(self) -> bool:
        """Some sequence is not finished."""
        return self.num_waiting > 0 or self.num_running > 0

    def pages_for(self, length: int) -> int:
        """Pages that a sequence of `length` tokens needs; its last token is never stored."""
        return -(-max(length - 1, 1) // self.page_size)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that fits the pool when it runs alone."""
        assert self.pages_for(sequence.max_length) <= self.pool.num_usable, sequence.max_length
        if self.cache is not None:
            extend_hashes(sequence.page_names, sequence.tokens, self.page_size)
        self._enqueue(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in any state; its pages are free at once.

        A launched step may still write to them; a step that reuses them runs after it.
        """
        if sequence.state is State.RUNNING:
            self._remove(sequence)
        elif sequence.state is State.WAITING:
            self.num_waiting -= 1  # its entry in the heap is skipped later
        else:
            return
        sequence.state = State.FINISHED
        sequence.finish_reason = reason

    def forget_prefixes(self) -> None:
        """Makes nothing that is in the pages now findable by sequences to come.

        Nor what running sequences will store: their KV depends on what they have stored before.
        """
        if self.cache is not None:
            self.cache.clear()
            for sequence in self.table.sequences:
                if sequence is not None:
                    sequence.findable = False

    # ---- plan

    def plan(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed now."""
        table = self.table
        preemptions = self.stats.preemptions
        rows = self._decode_rows()
        budget = self._max_tokens - len(rows)
        chunks: list[Chunk] = []
        for sequence in list(self._prefilling):
            if budget == 0 or len(chunks) == self._max_chunks:
                break
            chunks.append(self._chunk(sequence, budget))
            budget -= len(chunks[-1].tokens)
        admitted: list[tuple[int, Sequence]] = []
        if self.stats.preemptions == preemptions:
            while budget > 0 and len(chunks) < self._max_chunks:
                sequence = self._admit()
                if sequence is None:
                    break
                admitted.append((sequence.row, sequence))
                chunks.append(self._chunk(sequence, budget))
                budget -= len(chunks[-1].tokens)
        if len(rows) == 0 and not chunks:
            return None

        positions = table.computed[rows]
        tokens = np.where(table.known[rows] > positions, table.tokens[rows, positions], -1)
        context = max(int(positions.max(initial=-1)) + 1, max((c.end for c in chunks), default=0))
        width = -(-context // self.page_size)
        chunk_rows = [c.row for c in chunks]
        plan = StepPlan(
            rows=rows,
            serials=table.serial[rows],
            sequences=[table.sequences[row] for row in rows.tolist()],
            tokens=tokens.astype(np.int32),
            positions=positions,
            page_table=table.page_table[rows, :width],
            chunks=chunks,
            chunk_page_table=table.page_table[chunk_rows, :width],
            admitted=admitted,
            context_tokens=context,
            plain_greedy=bool(
                table.plain_greedy[rows].all()
                and all(table.plain_greedy[c.row] for c in chunks if c.last)
            ),
        )
        table.computed[rows] += 1
        return plan

    def _decode_rows(self) -> np.ndarray:
        """Rows that decode a token, each with a page for it; preempts where pages run out."""
        table = self.table
        rows = np.flatnonzero(table.decoding & (table.computed + 1 < table.max_length))
        needy = rows[table.computed[rows] >= table.capacity[rows]]
        if len(needy):
            for sequence in sorted(
                (table.sequences[row] for row in needy.tolist()), key=lambda s: s.order
            ):
                self._grow(sequence)
            rows = rows[table.decoding[rows]]
        return rows.astype(np.int32)

    def _grow(self, sequence: Sequence) -> None:
        """Gives a running sequence one more page, or preempts it when it is the last in order."""
        while sequence.state is State.RUNNING:
            if self.pool.num_free:
                self.table.add_page(sequence.row, self.pool.allocate(1)[0])
                return
            running = (s for s in self.table.sequences if s is not None)
            self._preempt(max(running, key=lambda s: s.order))

    def _preempt(self, sequence: Sequence) -> None:
        self._remove(sequence)
        sequence.state = State.WAITING
        sequence.num_preemptions += 1
        self.stats.preemptions += 1
        self._enqueue(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self.table.remove(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        # The end of a sequence is the least likely to be shared, so it is given up first.
        self.pool.release(reversed(sequence.pages))
        sequence.pages = []

    def _enqueue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.order, sequence))
        self.num_waiting += 1

    def _admit(self) -> Sequence | None:
        """Moves the first waiting sequence to a row, if a row and its pages are free."""
        while self._waiting and self._waiting[0][1].state is not State.WAITING:
            heapq.heappop(self._waiting)
        if not self._waiting or not self.table.num_free_rows:
            return None
        sequence = self._waiting[0][1]
        if sequence.token_in_flight:
            return None
        count, cached = len(sequence.tokens), []
        if self.cache is not None:
            extend_hashes(sequence.page_names, sequence.tokens, self.page_size)
            # At least one token is computed, since its logits are needed.
            cached = self.cache.match(sequence.page_names[: (count - 1) // self.page_size])
        new_pages = -(-count // self.page_size) - len(cached)
        taken = new_pages + sum(self.pool.references(page) == 0 for page in cached)
        reserve = self._watermark if self.num_running else 0
        if taken + reserve > self.pool.num_free:
            return None
        for page in cached:
            self.pool.share(page)
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        sequence.pages = cached + self.pool.allocate(new_pages)
        computed = len(cached) * self.page_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = computed
            self.stats.prompt_tokens += count
            self.stats.cached_tokens += computed
        self.table.admit(sequence, computed)
        self._prefilling.append(sequence)
        return sequence

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """The next prompt tokens of an admitted sequence."""
        table, row = self.table, sequence.row
        start, known = int(table.computed[row]), int(table.known[row])
        end = min(start + budget, known)
        table.computed[row] = end
        last = end == known
        if last:
            self._prefilling.remove(sequence)
            table.decoding[row] = True
        self._name_pages(sequence, start, end)
        return Chunk(
            sequence, row, int(table.serial[row]), start, table.tokens[row, start:end].copy(), last
        )

    def _name_pages(self, sequence: Sequence, start: int, end: int) -> None:
        """Makes the pages that a planned chunk fills findable, for later chunks of this step too.

        Steps run in order, and each stores its keys and values before it reads any.
        """
        if self.cache is None or not sequence.findable:
            return
        for page in range(start // self.page_size, end // self.page_size):
            self.cache.insert(sequence.page_names[page], sequence.pages[page])

    # ---- commit

    def commit(self, plan: StepPlan, tokens: np.ndarray) -> Committed:
        """Takes the sampled tokens of a step that has run.

        Args:
          plan: the step.
          tokens: `[B + len(plan.chunks)]`, decoding rows first.

        Returns:
          The tokens of sequences that still exist; `finish_reason` of those is up to date.
        """
        table, batch = self.table, len(plan.rows)
        alive = table.serial[plan.rows] == plan.serials
        done = Committed([], [], [])
        if alive.all():
            rows, decoded = plan.rows, tokens[:batch]
            done.sequences, done.result_rows = list(plan.sequences), list(range(batch))
        else:
            index = np.flatnonzero(alive)
            rows, decoded = plan.rows[index], tokens[index]
            done.result_rows = index.tolist()
            done.sequences = [plan.sequences[i] for i in done.result_rows]
        done.tokens = decoded.tolist()
        self._append(rows, decoded, done.sequences)
        for i in np.flatnonzero(~alive).tolist():
            self._late(plan.sequences[i], i, tokens, done)
        for i, chunk in enumerate(plan.chunks, start=batch):
            if not chunk.last:
                continue
            if table.serial[chunk.row] == chunk.serial:
                self._append(np.array([chunk.row], np.int32), tokens[i : i + 1], [chunk.sequence])
                done.sequences.append(chunk.sequence)
                done.tokens.append(int(tokens[i]))
                done.result_rows.append(i)
            else:
                self._late(chunk.sequence, i, tokens, done)
        return done

    def _append(self, rows: np.ndarray, tokens: np.ndarray, sequences: list[Sequence]) -> None:
        """Stores the new token of each row, names full pages, ends what is at its end."""
        table = self.table
        known = table.known[rows]
        table.tokens[rows, known] = tokens
        table.known[rows] = known + 1
        if self.cache is not None:
            # The token's own KV comes with the next step; what is before it is in the pages.
            for i in np.flatnonzero(known % self.page_size == 0).tolist():
                sequence, count = sequences[i], int(known[i])
                if not sequence.findable:
                    continue
                extend_hashes(sequence.page_names, table.tokens[rows[i], :count], self.page_size)
                page = count // self.page_size - 1
                self.cache.insert(sequence.page_names[page], sequence.pages[page])
        stopped = (table.stop_ids[rows] == tokens[:, None]).any(1)
        full = known + 1 >= table.max_length[rows]
        for i in np.flatnonzero(stopped | full).tolist():
            self.finish(sequences[i], FinishReason.STOP if stopped[i] else FinishReason.LENGTH)

    def _late(self, sequence: Sequence, i: int, tokens: np.ndarray, done: Committed) -> None:
        """A token of a sequence that lost its row while the step ran: kept if it was preempted."""
        if sequence.state is not State.WAITING or not sequence.token_in_flight:
            return
        token = int(tokens[i])
        sequence.token_in_flight = False
        sequence.tokens = np.append(sequence.tokens, np.int32(token))
        done.sequences.append(sequence)
        done.tokens.append(token)
        done.result_rows.append(i)
        if token in sequence.stop_ids:
            self.finish(sequence, FinishReason.STOP)
        elif len(sequence.tokens) >= sequence.max_length:
            self.finish(sequence, FinishReason.LENGTH)

    def check_integrity(self) -> None:
        """Asserts that pages are conserved and that no page still to be written to is shared."""
        running = [s for s in self.table.sequences if s is not None]
        self.pool.check_integrity(s.pages for s in running)
        writable = [
            page
            for s in running
            for page in s.pages[int(self.table.computed[s.row]) // self.page_size :]
        ]
        assert len(writable) == len(set(writable)), "a page has two writers"
        for page in writable:
            assert self.pool.references(page) == 1, "a page that is written to is shared"
