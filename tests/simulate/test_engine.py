"""The real coordinator in virtual time, against times computed by hand."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpd.bench import workload
from jpd.bench.slo import RequestRecord
from jpd.bench.traces import fixed
from jpd.errors import ConfigError, EngineDeadError
from jpd.semi_pd.controller import Observation, Shares
from jpd.semi_pd.mode import BreakEven
from jpd.semi_pd.share_models import Interference
from jpd.simulate.latency import DecodeTime, Overheads, PromptTime
from jpd.simulate.run import simulate, simulate_alone
from jpd.types import FinishReason, SamplingParams
from tests.simulate.simulated import latencies, make_engine, requests, times_ms

HOST = Overheads(launch_s=1e-3, deliver_s=1.5e-3, deliver_token_s=0.5e-3, message_s=0.5e-3)
SEMI_PD = {"topology": "semi_pd", "semi_pd": {"prefill_share": 50, "decode_share": 50}}


def run(folder: Path, model, *rows, **options) -> list[RequestRecord]:
    return simulate(requests(*rows), [make_engine(folder, model, **options)])


def test_one_request_step_by_step(folder):
    (record,) = run(folder, latencies(overheads=HOST), (0.1, 5, 4), async_scheduling=False)
    # Launch 1, prompt 10, deliver 2; then three times launch 1, decode 5, deliver 2.
    assert times_ms(record) == pytest.approx((113, 137))
    assert record.ttft_s == pytest.approx(13e-3)
    assert record.tpot_s == pytest.approx(8e-3)
    assert (record.sent_s, record.due_s, record.lateness_s) == (0.1, 0.1, 0)


def test_launches_ahead_hide_the_host(folder):
    (record,) = run(folder, latencies(overheads=HOST), (0, 5, 4))
    # The GPU: prompt 1-11, decode 11-16, 16-21, 21-26; each is delivered 2 ms after its end.
    assert times_ms(record) == pytest.approx((13, 28))


def test_two_phases_in_processes_of_their_own(folder):
    engine = make_engine(folder, latencies(overheads=HOST), **SEMI_PD)
    (record,) = simulate(requests((0, 5, 4)), [engine])
    # Launch 1, message 0.5, prompt 10, message 0.5, deliver 2. Decode is launched at 15, begins at
    # 15.5 and ends at 20.5, 25.5 and 30.5, each known 0.5 and delivered 2 later.
    assert times_ms(record) == pytest.approx((14, 33))
    seats = (engine.topology.prefill, engine.topology.decode)
    assert [1e3 * seat.pool.busy_s for seat in seats] == pytest.approx([10, 15])


def test_a_request_ends_when_its_time_is_over_though_nothing_is_reported(folder):
    engine = make_engine(folder, latencies(prompt_s=10.0), **SEMI_PD)
    coordinator = engine.coordinator
    limits = (0.5, 0.3, None)
    outputs = [
        coordinator.add(str(i), None, [5] * 5, SamplingParams(max_tokens=1, timeout_s=limit))
        for i, limit in enumerate(limits)
    ]
    while coordinator.has_work:
        coordinator.step()
    assert [o.metrics.finished_s for o in outputs] == pytest.approx([0.5, 0.3, 10.0])
    reasons = [o.outputs[0].finish_reason for o in outputs]
    assert reasons == [FinishReason.TIMEOUT, FinishReason.TIMEOUT, FinishReason.LENGTH]


def test_what_steps_compute_makes_their_time(folder):
    model = dataclasses.replace(
        latencies(),
        decode=DecodeTime(row_s=1e-3, context_token_s=1e-4),
        prompt=PromptTime(token_s=1e-4, pair_s=1e-5),
    )
    buckets = {"token_buckets": (64,), "batch_buckets": (2, 8)}
    (record,) = run(folder, model, (0, 40, 3), **buckets)
    # 64 prompt tokens and 8 rows of a mixed step, padding included, and 40 * 41 / 2 pairs.
    first = 0.1 * 64 + 0.01 * 820
    # Two rows although one decodes; 41 and 42 keys.
    assert times_ms(record) == pytest.approx((first, first + 2 + 4.1 + 2 + 4.2))
    # An executor of prompts alone pads to no rows.
    (record,) = run(folder, model, (0, 40, 1), **buckets, topology="semi_pd")
    assert times_ms(record)[0] == pytest.approx(0.1 * 64 + 0.01 * 820)


def test_long_prompts_come_in_chunks(folder):
    (record,) = run(folder, latencies(), (0, 150, 1))
    assert times_ms(record) == pytest.approx((30, 30))


def test_policies_of_the_unified_engine(folder):
    rows = [(0, 5, 11), (0.021, 150, 2)]
    mixed = run(folder, latencies(), *rows)
    # Mixed: decode 10-15, 15-20, 20-25 and, launched at 20, 25-30. The chunks are in the steps from
    # 30 on and take the first one's rows along; then one decode step is left for the second.
    assert times_ms(mixed[1])[0] == pytest.approx(60)
    assert times_ms(mixed[0]) == pytest.approx((10, 75))
    first = run(folder, latencies(), *rows, prefill_policy="first")
    assert times_ms(first[1])[0] == pytest.approx(60)
    assert times_ms(first[0]) == pytest.approx((10, 90))


def test_phases_side_by_side_and_what_they_do_to_each_other(folder):
    slow = latencies(
        prompt_s=20e-3,
        interference=Interference(
            prefill_slowdown=2.0, prefill_pull=2.0, decode_slowdown=1.5, overlap_wait=0.0
        ),
    )
    first, second = run(folder, slow, (0, 5, 2), (0.022, 5, 1), **SEMI_PD)
    # Decode of the first begins at 20 and ends at 25 if alone. From 22 on prompt and decode run
    # side by side: 3 of 5 ms are left and take 4.5; by 26.5 the prompt has 17.75 of 20 left.
    assert times_ms(first) == pytest.approx((20, 26.5))
    assert times_ms(second) == pytest.approx((44.25, 44.25))


def test_phases_that_take_turns(folder):
    model = latencies(
        prompt_s=20e-3, turns=2.0, interference=Interference(prefill_slowdown=9.0, overlap_wait=99)
    )
    rows, shares = [(0, 5, 2), (0.022, 5, 1)], {"prefill_share": 100, "decode_share": 100}
    first, second = run(folder, model, *rows, topology="semi_pd", semi_pd=shares)
    # From 22 on 3 of 5 ms of the decode step are left, and it takes 5 + 20 / 2 in turns: 9 ms. The
    # prompt takes 20 + 2 * 5 in turns; at 31 it has 0.7 of 20 left, alone.
    assert times_ms(first) == pytest.approx((20, 31))
    assert times_ms(second) == pytest.approx((45, 45))
    disjoint = run(folder, model, *rows, **SEMI_PD)
    without = dataclasses.replace(model, turns=None)
    assert disjoint == run(folder, without, *rows, **SEMI_PD)
    for wrong in (0.0, float("inf")):
        with pytest.raises(ConfigError, match="turns="):
            dataclasses.replace(model, turns=wrong)


@pytest.mark.parametrize(("page_copy_s", "prompt_ms"), [(5e-3, 20), (8e-3, 24)])
def test_two_gpus_do_not_slow_each_other_down_but_send_pages(folder, page_copy_s, prompt_ms):
    model = latencies(
        prompt_s=20e-3,
        page_copy_s=page_copy_s,
        interference=Interference(prefill_slowdown=2.0, decode_slowdown=2.0),
    )
    rows = [(0, 20, 3), (0.0301, 5, 1)]
    first, second = run(folder, model, *rows, topology="disaggregated")
    # 20 tokens are on 3 pages, which are sent while they are computed; a decode step takes 5 ms.
    assert times_ms(first) == pytest.approx((prompt_ms, prompt_ms + 10))
    assert times_ms(second) == pytest.approx((50.1, 50.1))


def test_shares_and_overlap(folder):
    model = latencies(
        parallel=0.5,
        knee=50.0,
        knee_row=0.5,
        interference=Interference(
            prefill_slowdown=1.25,
            prefill_pull=0.4,
            decode_slowdown=1.2,
            overlap_wait=10.0,
            overlap_offset=10.0,
        ),
    )
    assert model.stretch(True, 50, None) == 1.5
    assert model.stretch(True, 50, 100) == 1.25 * 1.5
    assert model.stretch(True, 50, 40) == 1.16 * 1.5
    assert model.stretch(False, 75, None, padded_rows=50) == pytest.approx(
        2**0.25 / (1 + 0.75**4) ** 0.25
    )
    half = (1 + 1) ** 0.25 / (1 + 0.5**4) ** 0.25
    assert model.stretch(False, 50, None) == pytest.approx(half)
    assert model.stretch(False, 50, 50) == pytest.approx(1.2 * half)
    assert model.stretch(False, 50, 100) == pytest.approx(1.2 * half)
    # Ten times over 60 - 50 + 10 % what a step without rows takes alone.
    assert model.wait_s(False, 100, 50) == pytest.approx(10 / 60 * model.decode.step_s)
    assert model.wait_s(False, 50, 50) == model.wait_s(False, 50, None) == 0
    assert model.wait_s(True, 100, 100) == 0
    options = {"topology": "semi_pd", "semi_pd": {"prefill_share": 50}}
    (record,) = run(folder, model, (0, 5, 2), **options)
    assert times_ms(record) == pytest.approx((15, 20))


def test_an_arrival_ends_a_wait_for_other_processes(folder):
    rows = [(0, 5, 30), (0.0311, 5, 1)]
    first, second = run(folder, latencies(), *rows, **SEMI_PD)
    # Decode steps end at 30 and 35; the prompt waits for neither.
    assert times_ms(second)[0] == pytest.approx(41.1)
    assert times_ms(first) == pytest.approx((10, 155))


class Script:
    """Says what shares to have from when on."""

    def __init__(self, *lines: tuple[float, Shares]) -> None:
        self._lines = lines
        self.seen: list[Observation] = []

    def decide(self, observation: Observation, current: Shares) -> Shares:
        self.seen.append(observation)
        return next((s for at_s, s in reversed(self._lines) if observation.now_s >= at_s), current)


def controlled(script: Script, **options) -> dict:
    options = {"prefill_share": 50, "decode_share": 50, "control_interval_s": 1e-3} | options
    return {"topology": "semi_pd", "semi_pd": {"controller": script, **options}}


def test_a_kept_executor_takes_over_at_the_end_of_a_step(folder):
    script = Script((0.032, Shares(50, 100)))
    engine = make_engine(
        folder,
        latencies(start_s=5.0, knee=50.0),
        **controlled(script, kept_shares=[(50, 50), (50, 100)]),
    )
    full_s = 5e-3
    half_s = full_s * 2**0.25 / (1 + 0.5**4) ** 0.25
    (record,) = simulate(requests((0, 5, 20)), [engine])
    (switch,) = engine.switches
    assert (switch.phase, switch.old_share, switch.share) == ("decode", 50, 100)
    # Two steps are in flight when it is asked for; both end on the old executor, 10 to 10 + 6 half.
    asked_s = 10e-3 + 4 * half_s
    assert asked_s > 0.032
    assert switch.asked_s == switch.held_s == pytest.approx(asked_s)
    assert switch.done_s == pytest.approx(10e-3 + 5 * half_s)
    assert record.finished_s == pytest.approx(10e-3 + 5 * half_s + 14 * full_s)


def test_others_are_started_while_the_old_one_serves(folder):
    script = Script((0.05, Shares(100, 50)))
    engine = make_engine(folder, latencies(start_s=0.35, parallel=0.5), **controlled(script))
    rows = [(i / 10, 5, 2) for i in range(9)]
    records = simulate(requests(*rows), [engine])
    (switch,) = engine.switches
    assert (switch.phase, switch.old_share, switch.share) == ("prefill", 50, 100)
    # Nobody asks while nothing is to be done: the next step is at 0.1 s.
    assert switch.asked_s == pytest.approx(0.1)
    assert switch.done_s == pytest.approx(0.5)
    assert switch.held_s == switch.done_s
    assert [round(1e3 * r.ttft_s, 6) for r in records] == [15] * 5 + [10] * 4


def test_what_a_controller_is_told(folder):
    script = Script()
    engine = make_engine(folder, latencies(), **controlled(script))
    records = simulate(requests(*((i * 7e-3, 20, 6) for i in range(12))), [engine])
    engine.topology._asked_s = -1.0  # asks once more
    engine.topology.tend(engine.coordinator.recent)
    told = [t for o in script.seen for t in o.ttft_s]
    # The engine counts from when it takes a request in, which is later than when it was sent.
    ttft = sorted(r.ttft_s for r in records)
    assert all(t <= r + 1e-12 for t, r in zip(sorted(told), ttft, strict=True))
    assert sum(told) > 0.8 * sum(ttft)
    tpot = sorted(t for o in script.seen for t in o.tpot_s)
    assert tpot == pytest.approx(sorted(r.tpot_s for r in records))
    assert sum(o.prefill_tokens for o in script.seen) == 12 * 20
    assert sum(o.prefill_busy_s for o in script.seen) == pytest.approx(
        engine.topology.prefill.pool.busy_s
    )


@pytest.mark.parametrize("answer", [(50, 50), None, "(50, 50)", Shares])
def test_an_answer_of_a_controller_that_is_no_shares(folder, answer):
    engine = make_engine(folder, latencies(), **controlled(Script((0.02, answer))))
    check_stops(engine, f"shares={answer!r} is not allowed: Shares(prefill, decode)")


@pytest.mark.parametrize("answer", ["disaggregated", None, Shares(50, 50)])
def test_an_answer_of_a_mode_policy_that_is_no_mode(folder, answer):
    options = {"break_even": Script((0.02, answer)), "control_interval_s": 1e-3}
    engine = make_engine(folder, latencies(), topology="auto", semi_pd=options)
    check_stops(engine, f"mode={answer!r} is not allowed: one of ['unified', 'semi_pd']")


def check_stops(engine, why: str) -> None:
    """The engine stops at an answer: whoever goes on with it is told why."""
    with pytest.raises(ConfigError, match=re.escape(why)):
        simulate(requests((0, 5, 20)), [engine])
    assert engine.coordinator.has_work
    with pytest.raises(EngineDeadError, match=re.escape(why)):
        engine.coordinator.step()


def test_one_of_two_executors_serves_both_phases_while_nobody_is_held_up(folder):
    engine = make_engine(folder, latencies(overheads=HOST), topology="auto")
    (record,) = simulate(requests((0, 5, 4)), [engine])
    # Launch 1, message 0.5, prompt 10; the decode steps follow it on the same executor, 11.5 to
    # 26.5, and each is known 0.5 and delivered 2 later.
    assert times_ms(record) == pytest.approx((14, 29))
    assert engine.coordinator.stats().mode == "unified"
    assert engine.topology.prefill.pool.busy_s == 0


def test_the_load_decides_between_one_executor_and_two(folder):
    quiet, busy = workload.poisson(2, 20, seed=0), workload.poisson(60, 600, seed=1)
    arrivals = np.concatenate([quiet, 10 + busy, 20 + quiet])
    engine = make_engine(folder, latencies(), topology="auto", max_num_seqs=64)
    modes = []

    class Watched(BreakEven):
        def decide(self, observation, current):
            modes.append((observation.now_s, super().decide(observation, current)))
            return modes[-1][1]

    engine.topology._mode_policy = Watched(ratio=3.0, slowdown=1.0, window_s=2.0)
    records = simulate(fixed(arrivals, 20, 60), [engine])
    assert all(record.ok for record in records)
    changes = [b for (_, a), (at_s, b) in pairwise(modes) if a != b]
    assert changes == ["semi_pd", "unified"]
    assert {mode for at_s, mode in modes if 15 < at_s < 19} == {"semi_pd"}
    assert engine.coordinator.stats().mode_changes == 2


class InTurns:
    """Changes the mode whenever it is asked."""

    def decide(self, observation, current):
        return "semi_pd" if current == "unified" else "unified"


@pytest.mark.parametrize("options", [{}, {"topology": "semi_pd"}, {"topology": "auto"}], ids=str)
def test_who_decodes_and_who_waits_while_prompts_are_computed(folder, options):
    engine = make_engine(folder, latencies(), **options)
    taken = []
    take = engine.coordinator.recent
    engine.coordinator.recent = lambda: taken.append(take()) or taken[-1]
    simulate(requests((0, 5, 30), (0.031, 64, 30), (0.031, 6, 1)), [engine])
    taken.append(take())
    sums = [sum(getattr(r, f"{who}_beside") for r in taken) for who in ("decoding", "waiting")]
    if options.get("topology") == "semi_pd":
        # A step of 64 tokens beside one that decodes, in which both wait; one of 6 beside two.
        assert sums == [64 + 2 * 6, 5 + 2 * 64 + 6]
    else:
        # The row that decodes is one of the 64 tokens; so both also wait in the next step.
        assert sums == [63 + 7, 5 + 2 * 63 + 2 * 7]
    assert sum(r.prefill_tokens for r in taken) == 75


TOPOLOGIES = [
    {},
    {"async_scheduling": False},
    {"prefill_policy": "first"},
    SEMI_PD,
    {"topology": "semi_pd"},
    {"topology": "auto", "semi_pd": {"break_even": InTurns(), "control_interval_s": 7e-3}},
    {
        "topology": "auto",
        "prefill_policy": "first",
        "semi_pd": {"break_even": InTurns(), "decode_share": 50, "control_interval_s": 7e-3},
    },
    {"topology": "disaggregated"},
]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.3), st.integers(1, 120), st.integers(1, 60)),
        min_size=1,
        max_size=25,
    ),
    st.sampled_from(TOPOLOGIES),
    st.sampled_from([24, 257]),
)
def test_every_request_gets_its_tokens(folder, rows, options, num_pages):
    shares = {"interference": Interference(), "parallel": 0.6, "knee": 35.0, "knee_row": 0.1}
    model = latencies(overheads=HOST, **shares)
    engine = make_engine(folder, model, num_pages=num_pages, **options)
    rows = sorted(rows)
    records = simulate(requests(*rows), [engine])
    for (arrival_s, prompt, wanted), record in zip(rows, records, strict=True):
        assert record.ok
        assert (record.due_s, record.prompt_tokens) == (arrival_s, prompt)
        assert record.output_tokens == wanted
        # A launch, a step and its delivery at least; then a step for each token at least, but the
        # delivery of the first may have taken longer than that of the last.
        assert record.ttft_s > 13e-3 - 1e-9
        assert record.finished_s - record.first_token_s > (wanted - 1) * 5e-3 - 8 * 0.5e-3 - 1e-9
    scheduler = engine.coordinator.scheduler
    scheduler.check_integrity()
    assert scheduler.pool.num_free == scheduler.pool.num_usable


def test_pages_that_run_out_cost_time(folder):
    rows = [(0, 30, 60)] * 4
    plenty, scarce = (make_engine(folder, latencies(), num_pages=n) for n in (257, 20))
    quick, slow = (simulate(requests(*rows), [e]) for e in (plenty, scarce))
    assert scarce.coordinator.stats().preemptions > 0 == plenty.coordinator.stats().preemptions
    assert max(r.finished_s for r in slow) > max(r.finished_s for r in quick)


def test_a_request_that_cannot_be_served(folder):
    good, bad = run(folder, latencies(), (0, 5, 2), (0.001, 250, 20))
    assert good.ok
    assert not bad.ok
    assert "max_model_len=256" in bad.error
    assert (bad.output_tokens, bad.ttft_s) == (0, None)


def test_a_queue_with_one_server(folder):
    """M/D/1: with load r and service time d, the mean wait is d r / 2 (1 - r)."""
    count, service_s, load = 6000, 10e-3, 0.7
    arrivals = workload.poisson(load / service_s, count, seed=1)
    options = {"max_prefills_per_step": 1, "async_scheduling": False}
    engine = make_engine(folder, latencies(prompt_s=service_s), **options)
    records = simulate(fixed(arrivals, 8, 1), [engine])
    wait_s = np.mean([r.ttft_s for r in records]) - service_s
    assert wait_s == pytest.approx(service_s * load / (2 * (1 - load)), rel=0.08)
    # And exactly, request by request: Lindley's recursion.
    free_s, expected = 0.0, []
    for arrival_s in arrivals:
        free_s = max(free_s, arrival_s) + service_s
        expected.append(free_s)
    np.testing.assert_allclose([r.first_token_s for r in records], expected)


def test_the_same_run_twice(folder):
    rows = workload.poisson(30, 60, seed=3)
    both = [
        simulate(fixed(rows, 40, 20), [make_engine(folder, latencies(overheads=HOST), **SEMI_PD)])
        for _ in range(2)
    ]
    assert both[0] == both[1]


def test_one_at_a_time(folder):
    engine = make_engine(folder, latencies(overheads=HOST))
    records = simulate_alone(requests((0, 5, 4), (0, 5, 4), (0, 5, 1)), engine)
    assert [1e3 * r.ttft_s for r in records] == pytest.approx([13] * 3)
    assert [1e3 * r.e2e_s for r in records] == pytest.approx([28, 28, 13])
