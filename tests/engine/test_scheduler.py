"""The scheduler as a state machine, and the order in which it serves and preempts."""

from __future__ import annotations

from collections import Counter

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

from jpd.engine.sequence import Sequence, State
from jpd.types import FinishReason
from tests.engine.fake_device import run_alone
from tests.engine.world import MAX_LEN, World

COMMON = run_alone((1, 2, 3), MAX_LEN)[0]
"""Prompts begin with some of these, so that they share pages."""


def stage(world: World, sequence: Sequence) -> str:
    """Finer than `State`: where an abort can hit a sequence."""
    if sequence.state is State.WAITING:
        return "preempted" if sequence.num_preemptions else "waiting"
    return "decoding" if world.scheduler.table.decoding[sequence.row] else "prefilling"


STAGES = ("waiting", "preempted", "prefilling", "decoding")
seen: Counter[str] = Counter()
"""What the machine below did, over all its runs."""


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, share pages, run out of pages, stop and are given up, in any order."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        pages=st.integers(4, 12),
        rows=st.integers(1, 6),
        extra_tokens=st.integers(0, 8),
        max_chunks=st.integers(1, 4),
        caching=st.sampled_from([True, True, True, False]),
        one_in_flight=st.sampled_from([True, True, False]),
    )
    def start(
        self,
        page_size: int,
        pages: int,
        rows: int,
        extra_tokens: int,
        max_chunks: int,
        caching: bool,
        one_in_flight: bool,
    ) -> None:
        self.world = World(
            page_size, 1 + pages, rows, rows + extra_tokens, max_chunks, caching, one_in_flight
        )

    @rule(
        common=st.integers(0, 12),
        own=st.lists(st.integers(0, 2), max_size=4),
        new_tokens=st.integers(1, 24),
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

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.scheduler.check_integrity()
            seen["steps"] += 1

    @rule(count=st.integers(5, 8))
    def run_on(self, count: int) -> None:
        self.step(count)

    def unfinished(self, *stages: str) -> list[Sequence]:
        found = self.world.in_state(State.WAITING, State.RUNNING)
        return [s for s in found if stage(self.world, s) in stages]

    def abort_one_of(self, sequences: list[Sequence], data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sequences))
        seen["abort " + stage(self.world, sequence)] += 1
        seen["abort in flight"] += self.world.in_flight is not None
        self.world.abort(sequence)

    @precondition(lambda self: self.unfinished("waiting", "decoding"))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.abort_one_of(self.unfinished("waiting", "decoding"), data)

    # States that pass quickly have a rule of their own, so that they are hit often enough.
    @precondition(lambda self: self.unfinished("preempted"))
    @rule(data=st.data())
    def abort_preempted(self, data: st.DataObject) -> None:
        self.abort_one_of(self.unfinished("preempted"), data)

    @precondition(lambda self: self.unfinished("prefilling"))
    @rule(data=st.data())
    def abort_prefilling(self, data: st.DataObject) -> None:
        self.abort_one_of(self.unfinished("prefilling"), data)

    @precondition(lambda self: self.world.in_state(State.RUNNING))
    @rule()
    def swap_params(self) -> None:
        self.world.device.params_version += 1
        self.world.scheduler.forget_prefixes()
        seen["swapped"] += 1

    @invariant()
    def pages_are_conserved(self) -> None:
        seen["rules"] += 1
        scheduler = self.world.scheduler
        scheduler.check_integrity()
        assert scheduler.num_running == len(self.world.in_state(State.RUNNING))
        assert scheduler.num_waiting == len(self.world.in_state(State.WAITING))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()
            stats = self.world.scheduler.stats
            seen["preempted"] += stats.preemptions
            seen["cached tokens"] += stats.cached_tokens


def test_any_order_of_events_keeps_pages_and_tokens_right() -> None:
    seen.clear()
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=500,
            stateful_step_count=50,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert seen["rules"] >= 10_000
    rare = ["preempted", "cached tokens", "swapped", "abort in flight"]
    rare += ["abort " + name for name in STAGES]
    assert min(seen[name] for name in rare) >= 3, seen


def order_of_first_tokens(world: World, sequences: list[Sequence]) -> list[int]:
    """Indices of the sequences in the order in which they began."""
    began: list[int] = []
    for _ in range(200):
        world.step()
        began += [i for i, s in enumerate(sequences) if world.got[s] and i not in began]
    assert len(began) == len(sequences)
    return began


def test_requests_are_served_in_the_order_of_arrival() -> None:
    world = World(rows=1, max_tokens=8)
    sequences = [world.add([i, 1, 2], 3) for i in range(4)]
    assert order_of_first_tokens(world, sequences) == [0, 1, 2, 3]
    world.drain()


def test_lower_priority_numbers_are_served_first_and_ties_by_arrival() -> None:
    world = World(rows=1, max_tokens=8)
    sequences = [world.add([i, 1, 2], 3, priority=p) for i, p in enumerate([2, 0, 1, 0, -1])]
    assert order_of_first_tokens(world, sequences) == [4, 1, 3, 2, 0]
    world.drain()


def test_a_large_request_at_the_head_is_not_overtaken_by_small_ones() -> None:
    world = World(page_size=4, num_pages=9, rows=4)
    first = world.add(list(range(7)) * 2, 16)
    large = world.add([6, 5, 4, 3] * 6, 4)
    small = [world.add([i], 2) for i in range(3)]
    assert order_of_first_tokens(world, [first, large, *small])[:2] == [0, 1]
    world.drain()


@pytest.mark.parametrize("priorities", [(0, 0, 0), (0, 2, 1), (2, 1, 0)])
def test_the_last_in_order_is_preempted_and_computed_again(priorities: tuple[int, ...]) -> None:
    world = World(page_size=2, num_pages=13, rows=3, caching=False)
    sequences = [world.add([i, i, 0, i], 16, priority=p) for i, p in enumerate(priorities)]
    victims: list[int] = []
    for _ in range(60):
        world.step()
        victims += [i for i, s in enumerate(sequences) if s.num_preemptions and i not in victims]
    last_first = sorted(range(3), key=lambda i: sequences[i].order, reverse=True)
    assert victims, "nothing was preempted"
    assert victims == last_first[: len(victims)]
    assert sequences[last_first[-1]].num_preemptions == 0
    world.drain()
    assert [len(world.got[s]) for s in sequences] == [16, 16, 16]


def test_a_prompt_of_a_preempted_sequence_is_found_in_the_prefix_cache() -> None:
    world = World(page_size=2, num_pages=16, rows=2)
    first, second = world.add([1, 2, 3, 4], 20), world.add([4, 3, 2, 1], 20)
    world.drain()
    assert second.num_preemptions > 0
    assert first.num_preemptions == 0
    # What a sequence finds of its own is not counted as a cached prompt.
    assert world.scheduler.stats.cached_tokens == 0
    assert world.scheduler.stats.prompt_tokens == 8


def test_decoding_rows_come_before_prompts_and_prompts_take_what_is_left() -> None:
    world = World(rows=4, max_tokens=8, max_chunks=2)
    decoding = world.add([1], 10)
    world.step()
    long = world.add([2] * 20, 2)
    plan = world.plan()
    assert plan.sequences == [decoding]
    # Rows are padded to 4.
    assert [(c.sequence, c.start, c.end, c.last) for c in plan.chunks] == [(long, 0, 4, False)]


def test_a_prompt_chunk_follows_where_the_last_one_ended() -> None:
    world = World(rows=2, max_tokens=8)
    sequence = world.add(list(range(7)) * 3, 2)
    ends = []
    while not world.got[sequence]:
        plan = world.plan()
        if plan is not None:
            ends += [(c.start, c.end, c.last) for c in plan.chunks]
            step = world.device.launch(plan)
            done = world.scheduler.commit(step.plan, step.tokens)
            world.got[sequence] += done.tokens
    assert ends == [(0, 8, False), (8, 16, False), (16, 21, True)]
    world.drain()


def test_a_sequence_ends_at_its_length_and_no_step_is_spent_on_its_last_token() -> None:
    world = World(rows=1)
    sequence = world.add([1, 2, 3], 5)
    steps = 0
    while sequence.state is not State.FINISHED:
        world.step()
        steps += world.in_flight is not None
    assert sequence.finish_reason is FinishReason.LENGTH
    assert steps == 5


def test_finishing_twice_changes_nothing() -> None:
    world = World()
    sequence = world.add([1, 2, 3], 5)
    world.abort(sequence)
    world.scheduler.finish(sequence, FinishReason.STOP)
    assert sequence.finish_reason is FinishReason.ABORT
    assert world.scheduler.num_waiting == 0
    world.drain()


def test_pages_for_counts_all_but_the_last_token() -> None:
    scheduler = World(page_size=4).scheduler
    assert [scheduler.pages_for(n) for n in (1, 2, 5, 6, 9, 10)] == [1, 1, 1, 2, 2, 3]


def test_a_sequence_that_the_pages_can_never_hold_is_a_bug_of_the_caller() -> None:
    world = World(page_size=4, num_pages=3)
    sequence = world.add([1, 2, 3], 4)
    sequence.max_length = 10
    with pytest.raises(AssertionError, match="10"):
        world.scheduler.add(sequence)
