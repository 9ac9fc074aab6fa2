"""Decides what each step computes. Pure NumPy and Python: no jax, no clock, no text.

Every step holds one token of each decoding sequence, then prompt chunks while `most_tokens` lasts
(of `max_num_mixed_tokens`; without decoding sequences, of `max_num_batched_tokens`): chunks of
sequences already admitted, then new ones in order. A sequence is admitted when all pages of its
prompt are free. A decoding sequence that needs a page when none is free preempts the sequence that
is served last; that one is computed again later.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jpd.engine.fence import PageFence
from jpd.engine.pages import PagePool
from jpd.engine.plan import Admission, Chunk, Committed, PageCopy, StepPlan
from jpd.engine.prefix_cache import PrefixCache, extend_hashes
from jpd.engine.sequence import Sequence, SequenceTable, State
from jpd.engine.suspects import Suspects
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
    requeued: int = 0
    """Sequences to compute again because an executor ended while it had a chunk of them."""


class Scheduler:
    """Owns the pages, the queue and the rows of running sequences.

    Args:
      max_num_seqs: rows.
      max_model_len: tokens a row can hold.
      most_tokens: prompt tokens that a step with so many decoding rows may hold; see `ShapeTable`.
        May be assigned: another one holds from the next step on.
      max_prefills_per_step: chunks of one step.
      num_pages: pages of the pool, page 0 included.
      page_size: tokens a page holds.
      max_stop_ids: stop token ids a sequence may have.
      enable_prefix_caching: share pages between equal beginnings.
      tag_pages: plans say how often each of their pages was handed out.
      one_executor: all steps run in one order. Then freed pages are free at once.
      two_pools: prefill and decode executors have `num_pages` each, on devices of their own. A
        prompt is sent from one pool to the other while it is computed, so a sequence is admitted
        when both have room for it.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        most_tokens: Callable[[int], int],
        max_prefills_per_step: int,
        num_pages: int,
        page_size: int,
        max_stop_ids: int,
        enable_prefix_caching: bool,
        one_executor: bool = True,
        two_pools: bool = False,
        tag_pages: bool = False,
    ) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.decode_pool = PagePool(num_pages) if two_pools else self.pool
        self._two_pools = two_pools
        self._fence = None if one_executor else PageFence()
        self.cache = PrefixCache(self.pool) if enable_prefix_caching else None
        self.table = SequenceTable(max_num_seqs, max_model_len, page_size, max_stop_ids)
        self.stats = SchedulerStats()
        self.most_tokens = most_tokens
        self._max_chunks = max_prefills_per_step
        self._waiting: list[tuple[tuple[int, float, int], Sequence]] = []
        self._prefilling: list[Sequence] = []
        self._suspects = Suspects()
        self._tag_pages = tag_pages
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

    @property
    def num_decoding(self) -> int:
        """Sequences that decode and have a token on the host to show for it."""
        table = self.table
        return int((table.decoding & (table.known > table.begun)).sum())

    @property
    def num_without_token(self) -> int:
        """Sequences without a next token on the host: in the queue or in prefill."""
        return self.num_waiting + int(self._awaits_token().sum())

    def _awaits_token(self) -> np.ndarray:
        """Rows `[n]` of sequences that got no token since they were admitted."""
        return (self.table.serial > 0) & (self.table.known == self.table.begun)

    def prefill_tokens(self) -> int:
        """Tokens still to be computed of sequences without a next token."""
        rows = np.flatnonzero(self._awaits_token())
        # Where the first token is still on the device, more may have been launched than is known.
        left = np.maximum(self.table.known[rows] - self.table.computed[rows], 0)
        waiting = (s for _, s in self._waiting if s.state is State.WAITING)
        return sum(len(s.tokens) for s in waiting) + int(left.sum())

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
        """Ends a sequence in any state.

        A launched step may still write to its pages. Where all steps run in one order they are free
        at once, since a step that reuses them runs after it; else they are free when it has run.
        """
        if sequence.state is State.RUNNING:
            self._remove(sequence)
        elif sequence.state is State.WAITING:
            self.num_waiting -= 1  # its entry in the heap is skipped later
        else:
            return
        self._suspects.clear(sequence)
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

    def plan(
        self, *, prefill: bool = True, decode: bool = True, decodes_on: bool = False
    ) -> StepPlan | None:
        """The next step, or None if nothing can be computed now.

        Args:
          prefill: the step may hold prompt chunks. Chunks find each other's pages as soon as they
            are planned, so steps that hold chunks must run in the order of their plans.
          decode: the step may hold decoding rows; so must steps that hold them.
          decodes_on: see `StepPlan`; True with `one_executor`.
        """
        for alone in self._suspects.turns(prefill, decode):
            plan = self._plan(prefill, decode, decodes_on or self._fence is None, alone)
            if plan is not None:
                return plan
        return None

    def _plan(self, prefill: bool, decode: bool, decodes_on: bool, alone: bool) -> StepPlan | None:
        """The next step of one suspect alone, or of all others."""
        table = self.table
        preemptions = self.stats.preemptions
        rows = self._decode_rows(alone) if decode else np.zeros(0, np.int32)
        chunks, admitted = [], []
        # What was just preempted must not come back in the same step.
        if prefill and not (alone and len(rows)):
            chunks, admitted = self._chunks(
                self.most_tokens(len(rows)),
                1 if alone else self._max_chunks,
                decodes_on=decodes_on,
                alone=alone,
                admit=self.stats.preemptions == preemptions,
            )
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
            decodes_on=decodes_on,
            copies=[self._send(chunk) for chunk in chunks] if self._two_pools else [],
            ticket=0 if self._fence is None else self._fence.begin(),
        )
        table.computed[rows] += 1
        if self._tag_pages:
            plan.generations = self.pool.generations[plan.page_table]
            plan.chunk_generations = self.pool.generations[plan.chunk_page_table]
        return plan

    def admission(self, row: int) -> Admission:
        """What an executor must know of a running row."""
        table, sequence = self.table, self.table.sequences[row]
        tokens = None
        if sequence.params.uses_penalties:
            tokens = table.tokens[row, : table.known[row]].copy()
        return Admission(
            row,
            int(table.serial[row]),
            sequence.params,
            sequence.key,
            sequence.prompt_length,
            tokens,
        )

    def _send(self, chunk: Chunk) -> PageCopy:
        """Pages that a chunk writes to; with the first, also those that the prefix cache had.

        A page that a chunk fills in part is sent again with the rest of it.
        """
        sequence = chunk.sequence
        sent = slice(sequence.num_sent, -(-chunk.end // self.page_size))
        sequence.num_sent = chunk.end // self.page_size
        return PageCopy(sequence.pages[sent], sequence.target_pages[sent])

    def _move(self, sequence: Sequence) -> None:
        """To the decode pool, where all of its prompt has arrived."""
        self._release(self.pool, sequence.pages[::-1])
        self.table.replace_pages(sequence.row, sequence.target_pages)
        sequence.target_pages, sequence.moved = [], True

    def _decode_rows(self, alone: bool) -> np.ndarray:
        """Rows that decode a token, each with a page for it; preempts where pages run out."""
        table = self.table
        rows = np.flatnonzero(table.decoding & (table.computed + 1 < table.max_length))
        needy = rows[table.computed[rows] >= table.capacity[rows]]
        if len(needy):
            for sequence in sorted(
                (table.sequences[row] for row in needy.tolist()), key=lambda s: s.order
            ):
                self._grow(sequence)
            rows = rows[table.decoding[rows] & (table.computed[rows] < table.capacity[rows])]
        if self._suspects:
            allowed = [self._suspects.allows(table.sequences[row], alone) for row in rows.tolist()]
            rows = rows[np.array(allowed, bool)][: 1 if alone else None]
        return rows.astype(np.int32)

    def _grow(self, sequence: Sequence) -> None:
        """Gives a running sequence one more page, or preempts it when it is the last in order.

        While freed pages wait for a step to end, so does the sequence.
        """
        while sequence.state is State.RUNNING:
            pool = self._pool_of(sequence)
            if pool.num_free:
                self.table.add_page(sequence.row, pool.allocate(1)[0])
                return
            if self._fence is not None and self._fence.holds(pool):
                return
            running = (s for s in self.table.sequences if s is not None)
            holders = (s for s in running if self._pool_of(s) is pool or s.target_pages)
            self._preempt(max(holders, key=lambda s: s.order))

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
        self._release(self._pool_of(sequence), sequence.pages[::-1])
        self._release(self.decode_pool, sequence.target_pages[::-1])
        sequence.pages, sequence.target_pages = [], []
        sequence.moved, sequence.num_sent = False, 0

    def _release(self, pool: PagePool, pages: list[int]) -> None:
        if self._fence is None:
            pool.release(pages)
        elif pages:
            self._fence.release(pool, pages)

    def _pool_of(self, sequence: Sequence) -> PagePool:
        return self.decode_pool if sequence.moved else self.pool

    def _enqueue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.place, sequence))
        self.num_waiting += 1

    def _admit(self, alone: bool) -> Sequence | None:
        """Moves the first waiting sequence to a row, if a row and its pages are free."""
        while self._waiting and self._waiting[0][1].state is not State.WAITING:
            heapq.heappop(self._waiting)
        if not self._waiting or not self.table.num_free_rows:
            return None
        sequence = self._waiting[0][1]
        if sequence.token_in_flight or not self._suspects.allows(sequence, alone):
            return None
        count, cached = len(sequence.tokens), []
        if self.cache is not None:
            extend_hashes(sequence.page_names, sequence.tokens, self.page_size)
            # At least one token is computed, since its logits are needed.
            cached = self.cache.match(sequence.page_names[: (count - 1) // self.page_size])
        new_pages = -(-count // self.page_size) - len(cached)
        taken = new_pages + sum(self.pool.references(page) == 0 for page in cached)
        if taken + self._reserve(self.pool) > self.pool.num_free:
            return None
        if self._two_pools:
            targets = len(cached) + new_pages
            if targets + self._reserve(self.decode_pool) > self.decode_pool.num_free:
                return None
            sequence.target_pages = self.decode_pool.allocate(targets)
        for page in cached:
            self.pool.share(page)
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        sequence.pages = cached + self.pool.allocate(new_pages)
        computed = len(cached) * self.page_size
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = computed
            self.stats.prompt_tokens += count
            self.stats.cached_tokens += computed
        self.table.admit(sequence, computed)
        self._prefilling.append(sequence)
        return sequence

    def _reserve(self, pool: PagePool) -> int:
        """Pages that a sequence that begins must leave: some, and one for each row that waits."""
        if not self.num_running:
            return 0
        if pool is not self.decode_pool:
            return self._watermark
        table = self.table
        waits = table.decoding & (table.computed >= table.capacity)
        waits &= table.computed + 1 < table.max_length
        return max(self._watermark, int(waits.sum()))

    def _chunks(
        self, budget: int, most: int, *, decodes_on: bool, alone: bool, admit: bool
    ) -> tuple[list[Chunk], list[Sequence]]:
        """At most `most` prompt chunks of at most `budget` tokens in all, and whom they begin."""
        chunks: list[Chunk] = []
        admitted: list[Sequence] = []
        for sequence in [s for s in self._prefilling if self._suspects.allows(s, alone)]:
            if budget == 0 or len(chunks) == most:
                break
            chunks.append(self._chunk(sequence, budget, decodes_on))
            budget -= len(chunks[-1].tokens)
        while admit and budget > 0 and len(chunks) < most:
            sequence = self._admit(alone)
            if sequence is None:
                break
            admitted.append(sequence)
            chunks.append(self._chunk(sequence, budget, decodes_on))
            budget -= len(chunks[-1].tokens)
        return chunks, admitted

    def _chunk(self, sequence: Sequence, budget: int, decodes_on: bool) -> Chunk:
        """The next prompt tokens of an admitted sequence."""
        table, row = self.table, sequence.row
        start, known = int(table.computed[row]), int(table.known[row])
        end = min(start + budget, known)
        table.computed[row] = end
        last = end == known
        if last:
            self._prefilling.remove(sequence)
            table.decoding[row] = decodes_on
        return Chunk(
            sequence,
            row,
            int(table.serial[row]),
            start,
            table.tokens[row, start:end].copy(),
            last,
            self._name_pages(sequence, start, end),
        )

    def _name_pages(self, sequence: Sequence, start: int, end: int) -> list[int]:
        """Makes the pages that a planned chunk fills findable, for later chunks of this step too.

        Steps with chunks run in order, and each stores its keys and values before it reads any.
        """
        if self.cache is None or not sequence.findable:
            return []
        filled = range(start // self.page_size, end // self.page_size)
        return [
            sequence.pages[i]
            for i in filled
            if self.cache.insert(sequence.page_names[i], sequence.pages[i])
        ]

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
        if self._fence is not None:
            self._fence.end(plan.ticket)
        alive = table.serial[plan.rows] == plan.serials
        if self._fence is not None:
            for sequence in [*plan.sequences, *(chunk.sequence for chunk in plan.chunks)]:
                if sequence.num_losses:
                    self._suspects.clear(sequence)
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
                if self._two_pools:
                    self._move(chunk.sequence)
                table.decoding[chunk.row] = True
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
                if not sequence.findable or sequence.moved:
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

    # ---- loss

    def lost(self, plan: StepPlan, *, ran: bool) -> list[Sequence]:
        """Takes back a step whose executor ended before its tokens were known.

        Decoding rows decode the same token again. Sequences that had a chunk in the step wait to be
        computed again: nobody knows which of their pages were filled. Steps that were in flight
        together are taken back in the order of their launch, when the executor is really gone.

        Args:
          plan: the step.
          ran: it may be what ended the executor: at most the first of those in flight.

        Returns:
          Sequences that bring down whoever computes them; they are finished.
        """
        assert self._fence is not None, "an executor that is the only one cannot be lost"
        table = self.table
        alive = table.serial[plan.rows] == plan.serials
        table.computed[plan.rows[alive]] -= 1
        gone = [plan.sequences[i] for i in np.flatnonzero(~alive).tolist()]
        for chunk in plan.chunks:
            for page in chunk.named:
                self.cache.remove(page)
            if table.serial[chunk.row] == chunk.serial:
                self._remove(chunk.sequence)
                chunk.sequence.state = State.WAITING
                self.stats.requeued += 1
                self._enqueue(chunk.sequence)
            if chunk.last:
                gone.append(chunk.sequence)
        for sequence in gone:
            sequence.token_in_flight = False
        self._fence.end(plan.ticket)
        if not ran:
            return []
        involved = [*plan.sequences, *(chunk.sequence for chunk in plan.chunks)]
        given_up = self._suspects.blame(s for s in involved if s.state is not State.FINISHED)
        for sequence in given_up:
            self.finish(sequence, FinishReason.ERROR)
        return given_up

    def start_over(self) -> None:
        """Everything that is in the pages is lost: all sequences wait to be computed again."""
        for sequence in [s for s in self.table.sequences if s is not None]:
            self._remove(sequence)
            sequence.state = State.WAITING
            sequence.token_in_flight = False
            self.stats.requeued += 1
            self._enqueue(sequence)
        if self.cache is not None:
            self.cache.clear()

    def check_integrity(self) -> None:
        """Asserts that pages are conserved and that no page still to be written to is shared."""
        running = [s for s in self.table.sequences if s is not None]
        for pool in {self.pool, self.decode_pool}:
            holders = [s.pages for s in running if self._pool_of(s) is pool]
            if self._fence is not None:
                holders += self._fence.held(pool)
            targets = [s.target_pages for s in running] if pool is self.decode_pool else []
            holders += targets
            pool.check_integrity(holders)
            writable = [
                page
                for s in running
                if self._pool_of(s) is pool
                for page in s.pages[int(self.table.computed[s.row]) // self.page_size :]
            ]
            writable += [page for pages in targets for page in pages]
            assert len(writable) == len(set(writable)), "a page has two writers"
            for page in writable:
                assert pool.references(page) == 1, "a page that is written to is shared"
