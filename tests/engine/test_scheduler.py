"""The scheduler as a state machine, and the order in which it serves and preempts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jpd.engine.plan import Committed, StepPlan
from jpd.engine.scheduler import Scheduler
from jpd.engine.sequence import Sequence, State
from jpd.engine.shapes import ShapeTable
from jpd.types import FinishReason, SamplingParams
from tests.engine.fake_device import FakeDevice, FakeStep, output_alone, run_alone

MAX_LEN = 32
COMMON = run_alone((1, 2, 3), MAX_LEN)[0]
"""Prompts begin with some of these, so that they share pages."""


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
        self.scheduler = Scheduler(
            max_num_seqs=self.rows,
            max_model_len=MAX_LEN,
            max_num_batched_tokens=self.max_tokens,
            max_prefills_per_step=self.max_chunks,
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_stop_ids=3,
            enable_prefix_caching=self.caching,
        )
        shapes = ShapeTable(
            max_num_seqs=self.rows,
            max_num_batched_tokens=self.max_tokens,
            max_model_len=MAX_LEN,
            page_size=self.page_size,
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
            assert max(s.order for _, s in plan.admitted) < min(waiting), "served out of order"
        return plan

    def step(self) -> Committed | None:
        """plan(n + 1), launch(n + 1), commit(n); or all of one step at once."""
        plan = self.plan()
        launched = None if plan is None else self.device.launch(plan)
        finished = self.in_flight if self.one_in_flight else launched
        self.in_flight = launched if self.one_in_flight else None
        if finished is None:
            return None
        done = self.scheduler.commit(finished.plan, finished.result().tokens)
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
        assert not self.scheduler.stats.preemptions or self.rows > 1


def alone_output(sequence: Sequence) -> list[int]:
    prompt = tuple(sequence.tokens[: sequence.prompt_length].tolist())
    return output_alone(prompt, sequence.max_length, sequence.stop_ids)


def stage(world: World, sequence: Sequence) -> str:
    """Finer than `State`: where an abort can hit a sequence."""
    if sequence.state is State.WAITING:
        if sequence.token_in_flight:
            return "preempted, token in flight"
        return "preempted" if sequence.num_preemptions else "waiting"
    decoding = world.scheduler.table.decoding[sequence.row]
    launched = world.in_flight is not None and (
        sequence in world.in_flight.plan.sequences
        or any(c.sequence is sequence for c in world.in_flight.plan.chunks)
    )
    return ("decoding" if decoding else "prefilling") + (", in flight" if launched else "")


seen: Counter[str] = Counter()
"""What the machine below did, over all its runs."""


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, share pages, run out of pages, stop and are given up, in any order."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 8]),
        pages=st.integers(4, 20),
        rows=st.integers(1, 5),
        extra_tokens=st.integers(0, 12),
        max_chunks=st.integers(1, 4),
        caching=st.integers(0, 3),
        one_in_flight=st.integers(0, 3),
    )
    def start(
        self,
        page_size: int,
        pages: int,
        rows: int,
        extra_tokens: int,
        max_chunks: int,
        caching: int,
        one_in_flight: int,
    ) -> None:
        self.world = World(
            page_size,
            1 + pages,
            rows,
            rows + extra_tokens,
            max_chunks,
            caching=caching > 0,
            one_in_flight=one_in_flight > 0,
        )

    @rule(
        common=st.integers(0, 24),
        own=st.lists(st.integers(0, 2), min_size=0, max_size=6),
        new_tokens=st.integers(1, 16),
        stop_ids=st.sampled_from([(), (), (5,), (0, 3, 7)]),
        priority=st.integers(0, 1),
    )
    def add(
        self,
        common: int,
        own: list[int],
        new_tokens: int,
        stop_ids: tuple[int, ...],
        priority: int,
    ) -> None:
        prompt = [*COMMON[:common], *own] or [0]
        self.world.add(prompt, new_tokens, stop_ids=stop_ids, priority=priority)
        seen["added"] += 1

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            done = self.world.step()
            self.world.scheduler.check_integrity()
            seen["steps"] += 1
            seen["appended"] += len(done.tokens) if done else 0

    @precondition(lambda self: self.world.in_state(State.WAITING, State.RUNNING))
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT]))
    def abort(self, data: st.DataObject, reason: FinishReason) -> None:
        unfinished = self.world.in_state(State.WAITING, State.RUNNING)
        sequence = data.draw(st.sampled_from(unfinished))
        seen["abort: " + stage(self.world, sequence)] += 1
        self.world.abort(sequence)

    @rule()
    def swap_params(self) -> None:
        self.world.device.params_version += 1
        self.world.scheduler.forget_prefixes()

    @invariant()
    def pages_are_conserved(self) -> None:
        seen["rules"] += 1
        scheduler = self.world.scheduler
        scheduler.check_integrity()
        assert scheduler.num_running == len(self.world.in_state(State.RUNNING))
        assert scheduler.num_waiting == len(self.world.in_state(State.WAITING))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.drain()
        stats = self.world.scheduler.stats
        seen["preempted"] += stats.preemptions
        seen["cached tokens"] += stats.cached_tokens


def test_any_order_of_events_keeps_pages_and_tokens_right() -> None:
    seen.clear()
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=300,
            stateful_step_count=60,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(seen))
    assert seen["rules"] >= 10_000
