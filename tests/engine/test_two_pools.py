"""Two pools of pages: what a prompt takes there, and which pages each of its steps sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jpd.engine.plan import StepPlan
from jpd.engine.scheduler import Scheduler
from jpd.engine.sequence import Sequence, State
from jpd.types import FinishReason, SamplingParams

PAGE, TOKENS = 4, 10


def make(num_pages: int = 20, **changes: Any) -> Scheduler:
    options = {
        "max_num_seqs": 4,
        "max_model_len": 64,
        "most_tokens": lambda rows: TOKENS - rows,
        "max_prefills_per_step": 3,
        "num_pages": num_pages,
        "page_size": PAGE,
        "max_stop_ids": 1,
        "enable_prefix_caching": True,
        "one_executor": False,
        "two_pools": True,
    }
    return Scheduler(**options | changes)


def add(scheduler: Scheduler, prompt: list[int], new_tokens: int = 8) -> Sequence:
    sequence = Sequence(
        request_id=str(prompt),
        index=0,
        tokens=np.array(prompt, np.int32),
        params=SamplingParams(temperature=0),
        order=(0, add.count),
        max_length=len(prompt) + new_tokens,
    )
    add.count += 1
    scheduler.add(sequence)
    return sequence


add.count = 0


def commit(scheduler: Scheduler, plan: StepPlan) -> None:
    scheduler.commit(plan, np.full(len(plan.rows) + len(plan.chunks), 9))
    scheduler.check_integrity()


def prefill(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan(decode=False)
    scheduler.check_integrity()
    return plan


def decode(scheduler: Scheduler) -> StepPlan | None:
    return scheduler.plan(prefill=False)


def test_each_chunk_sends_its_pages_and_a_page_filled_in_part_again() -> None:
    scheduler = make()
    sequence = add(scheduler, list(range(23)))
    sent = []
    for chunk, end in enumerate((10, 20, 23)):
        plan = prefill(scheduler)
        assert plan.chunks[0].end == end
        (copy,) = plan.copies
        first = [0, 2, 5][chunk]
        assert copy.source == sequence.pages[first : -(-end // PAGE)]
        assert copy.target == sequence.target_pages[first : -(-end // PAGE)]
        sent += copy.target
        source, target = list(sequence.pages), list(sequence.target_pages)
        assert decode(scheduler) is None
        commit(scheduler, plan)
    assert set(sent) == set(target)
    assert len(source) == len(target) == 6
    # It decodes from the pages that it was sent to; the others are free.
    plan = decode(scheduler)
    assert plan.page_table.tolist() == [target]
    assert plan.positions.tolist() == [23]
    assert plan.copies == []
    assert scheduler.decode_pool.num_free == 19 - 6
    # Whole pages of the prompt are kept for others.
    assert scheduler.pool.num_free == 19
    assert [scheduler.pool.references(page) for page in source] == [0] * 6


def test_what_the_prefix_cache_had_is_sent_with_the_first_chunk() -> None:
    scheduler = make()
    first = add(scheduler, list(range(9)))
    commit(scheduler, prefill(scheduler))
    second = add(scheduler, [*range(8), 50, 51])
    plan = prefill(scheduler)
    (chunk,), (copy,) = plan.chunks, plan.copies
    assert (chunk.start, chunk.end) == (8, 10)
    assert second.num_cached_tokens == 8
    assert copy.source == second.pages
    assert copy.target == second.target_pages
    assert len(copy.source) == 3
    assert not set(copy.target) & set(first.pages)


def test_a_sequence_begins_when_both_pools_have_room() -> None:
    scheduler = make(num_pages=9)
    first = add(scheduler, list(range(12)), new_tokens=20)
    commit(scheduler, prefill(scheduler))
    commit(scheduler, prefill(scheduler))
    assert first.moved
    while len(first.pages) < 6:  # of 8
        commit(scheduler, decode(scheduler))
    second = add(scheduler, list(range(100, 112)))
    assert prefill(scheduler) is None
    assert scheduler.pool.num_free == 8
    assert second.state is State.WAITING
    scheduler.finish(first, FinishReason.ABORT)
    assert prefill(scheduler).chunks[0].sequence is second
    assert len(second.pages) == len(second.target_pages) == 3


def test_a_decoding_row_that_needs_a_page_takes_one_that_a_later_prompt_is_sent_to() -> None:
    scheduler = make(num_pages=9)
    first = add(scheduler, list(range(8)), new_tokens=24)
    commit(scheduler, prefill(scheduler))
    commit(scheduler, decode(scheduler))  # which takes a third page
    second = add(scheduler, list(range(100, 120)))
    running = prefill(scheduler)
    assert scheduler.decode_pool.num_free == 0
    while second.state is State.RUNNING:
        plan = decode(scheduler)
        if plan is not None:
            commit(scheduler, plan)
    # Its pages go to nobody before the step that sends to them has run.
    assert second.num_preemptions == 1
    assert scheduler.decode_pool.num_free == 0
    assert decode(scheduler) is None
    commit(scheduler, running)
    plan = decode(scheduler)
    assert set(plan.page_table[0].tolist()) & set(running.copies[0].target)
    assert len(first.pages) == 4


@pytest.mark.parametrize("launched", [1, 2])
def test_a_lost_prefill_executor_leaves_no_page_behind(launched: int) -> None:
    scheduler = make(enable_prefix_caching=False)
    sequence = add(scheduler, list(range(23)))
    plans = [prefill(scheduler) for _ in range(launched)]
    for i, plan in enumerate(plans):
        scheduler.lost(plan, ran=i == 0)
        scheduler.check_integrity()
    assert sequence.state is State.WAITING
    assert scheduler.pool.num_free == scheduler.decode_pool.num_free == 19
    (copy,) = prefill(scheduler).copies
    assert copy.source == sequence.pages[:3]


def test_a_sequence_that_ends_with_its_first_token_never_moves() -> None:
    scheduler = make(num_pages=6)
    sequence = add(scheduler, list(range(20)), new_tokens=1)  # all five pages of either pool
    for _ in range(2):
        commit(scheduler, prefill(scheduler))
    assert sequence.finish_reason is FinishReason.LENGTH
    assert scheduler.pool.num_free == scheduler.decode_pool.num_free == 5
    assert decode(scheduler) is None
