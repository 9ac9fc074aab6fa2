"""A scheduler with a device that checks all it is told: what the state machine plays with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jpd.engine.plan import Committed, StepPlan
from jpd.engine.scheduler import Scheduler
from jpd.engine.sequence import Sequence, State
from jpd.engine.shapes import ShapeTable
from jpd.types import FinishReason, SamplingParams
from tests.engine.fake_device import FakeDevice, FakeStep, output_alone

MAX_LEN = 32


@dataclass
class World:
    """A scheduler with a fake device and one step in flight; the loop is the coordinator's."""

    page_size: int = 4
    num_pages: int = 40
    rows: int = 4
    max_tokens: int = 16
    max_chunks: int = 3
    caching: bool = True
    one_in_flight: bool = True
    got: dict[Sequence, list[int]] = field(default_factory=dict)
    in_flight: FakeStep | None = None
    arrivals: int = 0

    def __post_init__(self) -> None:
        shapes = ShapeTable(
            max_num_seqs=self.rows,
            max_num_batched_tokens=self.max_tokens,
            max_model_len=MAX_LEN,
            page_size=self.page_size,
        )
        self.scheduler = Scheduler(
            max_num_seqs=self.rows,
            max_model_len=MAX_LEN,
            most_tokens=shapes.most_tokens,
            max_prefills_per_step=self.max_chunks,
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_stop_ids=3,
            enable_prefix_caching=self.caching,
        )
        self.device = FakeDevice(
            self.num_pages, self.page_size, self.rows, MAX_LEN, self.max_chunks, shapes
        )

    def add(
        self,
        prompt: list[int] | tuple[int, ...],
        new_tokens: int,
        *,
        stop_ids: tuple[int, ...] = (),
        priority: int = 0,
    ) -> Sequence:
        """Queues a sequence, shorter than asked where the pages could never hold it."""
        longest = min(MAX_LEN, self.scheduler.pool.num_usable * self.page_size + 1)
        prompt = prompt[: longest - 1]
        sequence = Sequence(
            request_id=str(self.arrivals),
            index=0,
            tokens=np.array(prompt, np.int32),
            params=SamplingParams(temperature=0),
            order=(priority, self.arrivals),
            max_length=min(longest, len(prompt) + new_tokens),
            stop_ids=stop_ids,
        )
        self.arrivals += 1
        self.got[sequence] = []
        self.scheduler.add(sequence)
        return sequence

    def in_state(self, *states: State) -> list[Sequence]:
        return [s for s in self.got if s.state in states]

    def plan(self) -> StepPlan | None:
        """Plans a step and checks what holds for every plan."""
        before = self.in_state(State.RUNNING)
        plan = self.scheduler.plan()
        victims = [s.order for s in before if s.state is State.WAITING]
        kept = [s.order for s in before if s.state is State.RUNNING]
        if victims:
            assert plan is None or not plan.admitted, "one preempted, another admitted"
            assert not kept or max(kept) < min(victims), "not the last in order was preempted"
        if plan is None:
            return None
        assert 0 < plan.num_tokens <= self.max_tokens
        assert len(plan.chunks) <= self.max_chunks
        rows = [*plan.rows.tolist(), *(c.row for c in plan.chunks)]
        assert len(rows) == len(set(rows)) <= self.rows
        waiting = [s.order for s in self.in_state(State.WAITING)]
        if plan.admitted and waiting:
            assert max(s.order for s in plan.admitted) < min(waiting), "served out of order"
        return plan

    def step(self) -> Committed | None:
        """plan(n + 1), launch(n + 1), commit(n); or all of one step at once."""
        plan = self.plan()
        launched = None if plan is None else self.device.launch(plan)
        finished = self.in_flight if self.one_in_flight else launched
        self.in_flight = launched if self.one_in_flight else None
        if finished is None:
            return None
        plan = finished.plan
        due = [*plan.sequences, *(c.sequence for c in plan.chunks if c.last)]
        due = [s for s in due if s.state is not State.FINISHED]
        done = self.scheduler.commit(plan, finished.result().tokens)
        assert set(done.sequences) == set(due), "a token was lost"
        assert len(done.sequences) == len(due)
        for sequence, token in zip(done.sequences, done.tokens, strict=True):
            self.got[sequence].append(token)
            self.check_output(sequence)
        return done

    def check_output(self, sequence: Sequence) -> None:
        got, alone = self.got[sequence], alone_output(sequence)
        assert got == alone[: len(got)]
        if sequence.finish_reason is FinishReason.ABORT:
            return
        assert (sequence.finish_reason is not None) == (len(got) == len(alone))
        if sequence.finish_reason is not None:
            stopped = got[-1] in sequence.stop_ids
            assert sequence.finish_reason == (FinishReason.STOP if stopped else "length")

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence, FinishReason.ABORT)

    def drain(self) -> None:
        """Runs until nothing is left; every page is free then, and every output complete."""
        for _ in range(100 + 40 * len(self.got)):
            if not self.scheduler.has_work and self.in_flight is None:
                break
            self.step()
            self.scheduler.check_integrity()
        assert not self.scheduler.has_work, "the scheduler hangs"
        for sequence in self.got:
            assert sequence.state is State.FINISHED
            self.check_output(sequence)
        pool = self.scheduler.pool
        assert pool.num_free == pool.num_usable, "a page leaked"
        assert self.scheduler.table.num_free_rows == self.rows


def alone_output(sequence: Sequence) -> list[int]:
    prompt = tuple(sequence.tokens[: sequence.prompt_length].tolist())
    return output_alone(prompt, sequence.max_length, sequence.stop_ids)
