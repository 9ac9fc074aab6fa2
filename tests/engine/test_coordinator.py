"""The engine's loop on a device without a model: aborts, stops, priorities, text and times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jpd.config import EngineConfig
from jpd.engine.coordinator import Coordinator
from jpd.engine.plan import StepPlan, StepResult
from jpd.engine.sequence import Sequence, State
from jpd.engine.shapes import shape_table
from jpd.errors import ConfigError, PromptTooLongError, RequestError
from jpd.text import Tokenizer
from jpd.types import Delta, FinishReason, SamplingParams
from tests.engine.fake_device import VOCAB, FakeDevice, output_alone
from tests.engine.tiny_engine import drain, one_executor

LETTERS = "abcdefgh"
MAX_LEN = 32


@cache
def letters() -> Tokenizer:
    """Token i is the i-th letter."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE({c: i for i, c in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), "letters")


def make(
    eos: tuple[int, ...] = (),
    tokenizer: Tokenizer | None = None,
    clock: Callable[[], float] | None = None,
    **options: Any,
):
    """A coordinator whose clock counts its readings, if none is given."""
    sizes = {
        "max_model_len": MAX_LEN,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "page_size": 4,
        "num_pages": 40,
    }
    config = EngineConfig(model="none", **(sizes | options))
    device = FakeDevice(
        config.num_pages,
        config.page_size,
        config.max_num_seqs,
        config.max_model_len,
        config.max_prefills_per_step,
        shape_table(config),
    )
    clock = clock or itertools.count(1).__next__
    model = SimpleNamespace(vocab_size=VOCAB)
    return Coordinator(
        config, model, one_executor(config, device), tokenizer, eos, clock=lambda: float(clock())
    )


def sequences_of(coordinator: Coordinator, request_id: str):
    return coordinator._requests[request_id].sequences


def alone(prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    return output_alone(tuple(prompt), len(prompt) + max_tokens, stop_ids)


# ---- aborts


def stage(coordinator: Coordinator, request_id: str) -> str:
    sequence = sequences_of(coordinator, request_id)[0]
    if sequence.state is State.WAITING:
        return "preempted" if sequence.num_preemptions else "waiting"
    return "decoding" if coordinator.scheduler.table.decoding[sequence.row] else "prefilling"


@pytest.mark.parametrize("asynchronous", [True, False], ids=["in_flight", "synchronous"])
@pytest.mark.parametrize("wanted", ["waiting", "prefilling", "decoding", "preempted"])
def test_an_abort_in_any_state_ends_one_request_and_no_other(
    wanted: str, asynchronous: bool
) -> None:
    # The pages hold two of the three at their full length: the last is preempted on the way.
    coordinator = make(num_pages=17, max_num_batched_tokens=8, async_scheduling=asynchronous)
    prompts = [[i, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2] for i in range(3)]
    outputs = [
        coordinator.add(str(i), None, p, SamplingParams(temperature=0, max_tokens=20))
        for i, p in enumerate(prompts)
    ]
    while stage(coordinator, "2") != wanted:
        assert coordinator.has_work
        coordinator.step()
    assert bool(coordinator._topology.lanes[0].in_flight) == (asynchronous and wanted != "waiting")
    before = list(outputs[2].outputs[0].token_ids)
    (delta,) = coordinator.abort("2")
    assert delta == Delta("2", 0, "", [], FinishReason.ABORT)
    assert outputs[2].finished
    assert outputs[2].outputs[0].finish_reason is FinishReason.ABORT
    coordinator.scheduler.check_integrity()
    assert coordinator.abort("2") == []
    drain(coordinator)
    assert outputs[2].outputs[0].token_ids == before == alone(prompts[2], 20)[: len(before)]
    for output, prompt in zip(outputs[:2], prompts, strict=False):
        assert output.outputs[0].token_ids == alone(prompt, 20)
        assert output.outputs[0].finish_reason is FinishReason.LENGTH
    stats = coordinator.stats()
    assert (stats.requests_finished, stats.requests_aborted) == (2, 1)


def test_an_abort_ends_what_is_left_of_n_sequences() -> None:
    coordinator = make(max_num_seqs=2)
    params = SamplingParams(n=3, max_tokens=4)  # the fake device gives all of them the same
    output = coordinator.add("a", None, [1, 2, 3], params)
    while sum(c.finish_reason is not None for c in output.outputs) < 2:
        coordinator.step()
    assert not output.finished
    assert [d.index for d in coordinator.abort("a")] == [2]
    drain(coordinator)
    reasons = [c.finish_reason for c in output.outputs]
    assert reasons == [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.ABORT]
    assert output.finished


def test_an_unknown_or_finished_request_is_not_aborted() -> None:
    coordinator = make()
    output = coordinator.add("a", None, [1], SamplingParams(temperature=0, max_tokens=2))
    drain(coordinator)
    assert coordinator.abort("a") == coordinator.abort("nobody") == []
    assert output.outputs[0].finish_reason is FinishReason.LENGTH
    assert coordinator.stats().requests_aborted == 0


# ---- time-outs


@pytest.mark.parametrize("asynchronous", [True, False], ids=["in_flight", "synchronous"])
@pytest.mark.parametrize("wanted", ["waiting", "prefilling", "decoding", "preempted"])
def test_a_request_whose_time_is_over_ends_in_any_state_and_no_other(
    wanted: str, asynchronous: bool
) -> None:
    now = 5.0
    options = {"max_num_batched_tokens": 8, "async_scheduling": asynchronous}
    coordinator = make(clock=lambda: now, num_pages=17, **options)
    prompts = [[i, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2] for i in range(3)]
    limits = [None, 100.5, 100]
    outputs = [
        coordinator.add(
            str(i), None, p, SamplingParams(temperature=0, max_tokens=20, timeout_s=limit)
        )
        for i, (p, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    while stage(coordinator, "2") != wanted:
        coordinator.step()
    now = 104.9
    assert all(d.finish_reason is None for d in coordinator.step())
    seen, now = list(outputs[2].outputs[0].token_ids), 105.0
    ended = [d for d in coordinator.step() if d.finish_reason is not None]
    assert ended == [Delta("2", 0, "", [], FinishReason.TIMEOUT)]
    assert outputs[2].finished
    assert outputs[2].metrics.finished_s == 105.0
    coordinator.scheduler.check_integrity()
    drain(coordinator)
    assert outputs[2].outputs[0].token_ids == seen == alone(prompts[2], 20)[: len(seen)]
    for output, prompt in zip(outputs[:2], prompts, strict=False):
        assert output.outputs[0].token_ids == alone(prompt, 20)
    stats = coordinator.stats()
    assert (stats.requests_finished, stats.requests_timed_out, stats.requests_aborted) == (2, 1, 0)


def test_the_time_of_an_earlier_request_does_not_end_a_later_one_of_its_name() -> None:
    now = 0.0
    coordinator = make(clock=lambda: now)
    params = SamplingParams(temperature=0, max_tokens=2, timeout_s=10)
    coordinator.add("a", None, [1], params)
    drain(coordinator)
    now = 9.0
    later = coordinator.add("a", None, [1], params)
    now = 11.0
    drain(coordinator)
    assert later.outputs[0].finish_reason is FinishReason.LENGTH


# ---- ends


def test_n_sequences_are_counted_and_finish_together() -> None:
    coordinator = make()
    output = coordinator.add("a", None, [1, 2, 3], SamplingParams(n=3, max_tokens=4))
    drain(coordinator)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert all(c.token_ids == alone([1, 2, 3], 4) for c in output.outputs)
    assert output.metrics.num_generated_tokens == 12
    assert coordinator.stats().requests_finished == 1


def test_max_tokens_none_fills_max_model_len() -> None:
    coordinator = make()
    output = coordinator.add("a", None, [3, 1], SamplingParams(temperature=0, max_tokens=None))
    drain(coordinator)
    assert output.outputs[0].token_ids == alone([3, 1], MAX_LEN - 2)
    assert output.outputs[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("asynchronous", [True, False])
def test_stop_ids_end_of_sequence_and_ignore_eos(asynchronous: bool) -> None:
    prompt = [1, 2, 3]
    free = alone(prompt, 20)
    eos, own = free[4], next(t for t in free if t != free[4] and free.index(t) > 0)
    coordinator = make(eos=(eos,), async_scheduling=asynchronous)
    cases = {
        "eos": (SamplingParams(temperature=0, max_tokens=20), (eos,)),
        "own": (SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[own]), (eos, own)),
        "ignore": (SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), ()),
        "both": (
            SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[own]),
            (own,),
        ),
    }
    outputs = {
        name: coordinator.add(name, None, prompt, params) for name, (params, _) in cases.items()
    }
    drain(coordinator)
    for name, (params, stop_ids) in cases.items():
        completion, want = outputs[name].outputs[0], alone(prompt, 20, stop_ids)
        assert completion.token_ids == want, name
        stopped = want[-1] in stop_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        own_stop = stopped and want[-1] in params.stop_token_ids
        assert completion.stop_reason == (want[-1] if own_stop else None)


def text_of(ids: list[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_stop_string_over_several_tokens_ends_the_text_before_it(
    include: bool, asynchronous: bool
) -> None:
    coordinator = make(tokenizer=letters(), async_scheduling=asynchronous)
    prompt = [1, 2, 3]
    ids = alone(prompt, 20)
    stop = text_of(ids[6:9])
    at = text_of(ids).index(stop)
    params = SamplingParams(
        temperature=0, max_tokens=20, stop=["zzz", stop], include_stop_str_in_output=include
    )
    output = coordinator.add("a", "bcd", prompt, params)
    other = coordinator.add("b", None, prompt, SamplingParams(temperature=0, max_tokens=20))
    deltas = []
    while coordinator.has_work:
        deltas += [d for d in coordinator.step() if d.request_id == "a"]
    completion = output.outputs[0]
    assert completion.text == text_of(ids[: at + 3 if include else at])
    assert completion.token_ids == ids[: at + 3]
    assert completion.finish_reason is FinishReason.STOP
    assert completion.stop_reason == stop
    # What was streamed is what the output holds: no letter of the stop string came early.
    assert "".join(d.text for d in deltas) == completion.text
    assert list(itertools.chain(*(d.token_ids for d in deltas))) == completion.token_ids
    assert [d.finish_reason for d in deltas][-1] is FinishReason.STOP
    assert other.outputs[0].text == text_of(ids)


def test_an_unfinished_stop_string_is_shown_at_the_end() -> None:
    coordinator = make(tokenizer=letters())
    ids = alone([1, 2, 3], 6)
    stop = text_of(ids[-2:]) + "zz"
    params = SamplingParams(temperature=0, max_tokens=6, stop=stop)
    output = coordinator.add("a", None, [1, 2, 3], params)
    drain(coordinator)
    assert output.outputs[0].text == text_of(ids)
    assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_an_abort_delivers_text_that_was_held_back() -> None:
    coordinator = make(tokenizer=letters())
    ids = alone([1, 2, 3], 6)
    params = SamplingParams(temperature=0, max_tokens=6, stop=text_of(ids[2:4]) + "zz")
    output = coordinator.add("a", None, [1, 2, 3], params)
    while len(output.outputs[0].token_ids) < 4:
        coordinator.step()
    assert output.outputs[0].text == text_of(ids[:2])
    (delta,) = coordinator.abort("a")
    assert delta.text == text_of(ids[2:4])
    assert output.outputs[0].text == text_of(ids[:4])
    drain(coordinator)


def test_the_text_of_a_stop_token_is_not_shown() -> None:
    coordinator = make(tokenizer=letters())
    ids = alone([1, 2, 3], 10)
    stop = ids[3]
    want = alone([1, 2, 3], 10, (stop,))
    params = SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[stop])
    output = coordinator.add("a", None, [1, 2, 3], params)
    drain(coordinator)
    assert output.outputs[0].token_ids == want
    assert output.outputs[0].text == text_of(want[:-1])


# ---- the order of events


@pytest.mark.parametrize(
    ("asynchronous", "want"),
    [
        (True, ["launch 0", "launch 1", "result 0", "launch 2", "result 1", "result 2"]),
        (False, ["launch 0", "result 0", "launch 1", "result 1", "launch 2", "result 2"]),
    ],
)
def test_the_next_step_is_launched_before_the_tokens_of_the_last_are_read(
    asynchronous: bool, want: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = make(async_scheduling=asynchronous)
    events: list[str] = []
    launch = FakeDevice.launch

    def recording(device: FakeDevice, plan: StepPlan) -> SimpleNamespace:
        number = sum(e.startswith("launch") for e in events)
        events.append(f"launch {number}")
        step = launch(device, plan)

        def result() -> StepResult:
            events.append(f"result {number}")
            return step.result()

        return SimpleNamespace(plan=plan, result=result)

    monkeypatch.setattr(FakeDevice, "launch", recording)
    coordinator.add("a", None, [1, 2, 3], SamplingParams(temperature=0, max_tokens=3))
    drain(coordinator)
    assert events == want


def recorded_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and prompt tokens of each step that is launched from now on."""
    steps: list[tuple[int, int]] = []
    launch = FakeDevice.launch

    def recording(device: FakeDevice, plan: StepPlan):
        steps.append((len(plan.rows), sum(len(c.tokens) for c in plan.chunks)))
        return launch(device, plan)

    monkeypatch.setattr(FakeDevice, "launch", recording)
    return steps


@pytest.mark.parametrize(
    ("policy", "want"),
    [
        ("mixed", [(0, 1), (1, 0), (1, 12), (1, 12), (1, 6), (3, 0)]),  # 4 rows, padded
        ("first", [(0, 1), (1, 0), (0, 16), (0, 14), (3, 0)]),
    ],
)
@pytest.mark.parametrize("assigned", [False, True])
def test_prompts_ride_along_with_decoding_rows_or_go_first(
    policy: str, want: list[tuple[int, int]], assigned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"mixed": "first", "first": "mixed"}[policy]
    coordinator = make(prefill_policy=other if assigned else policy)
    if assigned:
        coordinator.prefill_policy = policy
    steps = recorded_steps(monkeypatch)
    params = SamplingParams(temperature=0, max_tokens=2 + 16)
    outputs = [coordinator.add("a", None, [1], params)]
    coordinator.step()
    coordinator.step()
    prompt = [2, 3] * 15
    outputs.append(coordinator.add("b", None, prompt[:-2], SamplingParams(max_tokens=2)))
    outputs.append(coordinator.add("c", None, prompt[:2], SamplingParams(max_tokens=2)))
    drain(coordinator)
    assert steps[: len(want)] == want
    assert coordinator.prefill_policy == policy
    assert outputs[0].outputs[0].token_ids == alone([1], 18)


@pytest.mark.parametrize("assigned", [False, True])
def test_steps_that_hold_up_who_decodes_may_be_smaller(
    assigned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = make(max_num_mixed_tokens=None if assigned else 8)
    if assigned:
        assert coordinator.max_num_mixed_tokens == 16
        coordinator.max_num_mixed_tokens = 8
    assert coordinator.max_num_mixed_tokens == 8
    steps = recorded_steps(monkeypatch)
    prompts = [[1] * 20, [2] * 10]
    outputs = [coordinator.add("a", None, prompts[0], SamplingParams(max_tokens=9))]
    for _ in range(3):
        coordinator.step()
    outputs.append(coordinator.add("b", None, prompts[1], SamplingParams(max_tokens=3)))
    drain(coordinator)
    # The first prompt holds up nobody. One row is padded to four.
    assert steps[:6] == [(0, 16), (0, 4), (1, 0), (1, 4), (1, 4), (1, 2)]
    for output, prompt, tokens in zip(outputs, prompts, (9, 3), strict=True):
        assert output.outputs[0].token_ids == alone(prompt, tokens)


def test_smaller_steps_are_those_of_the_engine_and_hold_all_rows() -> None:
    coordinator = make(max_num_mixed_tokens=12)
    with pytest.raises(ConfigError, match=r"max_num_mixed_tokens=13 .* at most the engine's 12"):
        coordinator.max_num_mixed_tokens = 13
    with pytest.raises(ConfigError, match=r"max_num_mixed_tokens=3 .* at least max_num_seqs=4"):
        coordinator.max_num_mixed_tokens = 3
    with pytest.raises(ConfigError, match=r"max_num_mixed_tokens=None .* the engine's 12"):
        coordinator.max_num_mixed_tokens = None
    assert coordinator.max_num_mixed_tokens == 12
    coordinator.max_num_mixed_tokens = 4
    coordinator.max_num_mixed_tokens = 12  # and back
    assert coordinator.max_num_mixed_tokens == 12


def test_an_unknown_policy_is_refused() -> None:
    coordinator = make()
    with pytest.raises(ConfigError, match="prefill_policy='last' is not allowed"):
        coordinator.prefill_policy = "last"
    assert coordinator.prefill_policy == "mixed"
    with pytest.raises(ConfigError, match="scheduling_policy='longest' is not allowed"):
        coordinator.scheduling_policy = "longest"
    assert coordinator.scheduling_policy == "fcfs"


# ---- order, limits and counters


def test_priority_decides_who_is_served_first() -> None:
    coordinator = make(scheduling_policy="priority", max_num_seqs=1)
    priorities = [2, 0, 1, 0]
    outputs = [
        coordinator.add(str(i), None, [i], SamplingParams(temperature=0, max_tokens=3), p)
        for i, p in enumerate(priorities)
    ]
    drain(coordinator)
    order = sorted(range(4), key=lambda i: outputs[i].metrics.first_token_s)
    assert order == [1, 3, 2, 0]


@pytest.mark.parametrize(
    ("between_s", "want"),
    [
        (0.0, [4, 1, 3, 2, 0]),  # by length; of two as long as each other the first one
        (0.006, [1, 3, 4, 2, 0]),  # the last one comes too late to overtake them
        (1.0, [0, 1, 2, 3, 4]),  # nobody waits for ever
    ],
)
@pytest.mark.parametrize("assigned", [False, True])
def test_short_prompts_overtake_those_that_came_a_little_earlier(
    between_s: float, want: list[int], assigned: bool
) -> None:
    now_s = [0.0]
    policy = "fcfs" if assigned else "shortest"
    coordinator = make(scheduling_policy=policy, max_num_seqs=1, clock=lambda: now_s[0])
    if assigned:
        coordinator.scheduling_policy = "shortest"
    outputs = []
    for i, length in enumerate([9, 3, 6, 3, 2]):
        params = SamplingParams(temperature=0, max_tokens=3)
        outputs.append(coordinator.add(str(i), None, [i] * length, params))
        now_s[0] += between_s
    while coordinator.has_work:
        now_s[0] += 1.0
        coordinator.step()
    order = sorted(range(5), key=lambda i: outputs[i].metrics.first_token_s)
    assert order == want
    assert coordinator.scheduling_policy == "shortest"


def test_who_has_given_tokens_is_overtaken_no_more() -> None:
    long = Sequence("a", 0, np.zeros(9, np.int32), SamplingParams(), (0, 1), 12)
    long.arrival_s, long.overtaken_s = 5.0, 0.045
    short = Sequence("b", 0, np.zeros(2, np.int32), SamplingParams(), (0, 2), 12)
    short.arrival_s, short.overtaken_s = 5.01, 0.01
    assert short.place < long.place
    long.tokens = np.zeros(10, np.int32)  # preempted after its first token
    assert long.place < short.place


def test_another_policy_holds_for_those_to_come() -> None:
    now_s = [100.0]
    coordinator = make(scheduling_policy="shortest", max_num_seqs=1, clock=lambda: now_s[0])
    params = SamplingParams(temperature=0, max_tokens=3)
    outputs = [coordinator.add("0", None, [1] * 9, params)]
    coordinator.scheduling_policy = "fcfs"
    for i, later_s in enumerate([0.01, 1.0], start=1):
        now_s[0] = 100.0 + later_s
        outputs.append(coordinator.add(str(i), None, [1] * 2, params))
    while coordinator.has_work:
        now_s[0] += 1.0
        coordinator.step()
    assert sorted(range(3), key=lambda i: outputs[i].metrics.first_token_s) == [1, 0, 2]


@pytest.mark.parametrize("policy", ["fcfs", "shortest"])
def test_a_priority_needs_the_policy(policy: str) -> None:
    coordinator = make(scheduling_policy=policy)
    with pytest.raises(RequestError, match=r"priority=3 needs scheduling_policy='priority'"):
        coordinator.add("a", None, [1], SamplingParams(), 3)


def test_a_request_that_the_pages_can_never_hold_is_refused_and_the_others_go_on() -> None:
    coordinator = make(num_pages=5)
    params = SamplingParams(temperature=0, max_tokens=8)
    output = coordinator.add("a", None, [1, 2, 3], params)
    coordinator.step()
    with pytest.raises(PromptTooLongError, match=r"12 tokens \+ max_tokens=8 needs 5 pages of 4"):
        coordinator.add("b", None, [1] * 12, params)
    coordinator.add("largest", None, [1] * 9, params)
    with pytest.raises(RequestError, match="'a' is in use"):
        coordinator.add("a", None, [1], params)
    drain(coordinator)
    assert output.outputs[0].token_ids == alone([1, 2, 3], 8)


def test_times_and_counts_of_a_request() -> None:
    coordinator = make(max_num_seqs=2, num_pages=9)
    outputs = [
        coordinator.add(str(i), None, [i] * 9, SamplingParams(temperature=0, max_tokens=16))
        for i in range(2)
    ]
    assert coordinator.stats().waiting == 2
    drain(coordinator)
    for output in outputs:
        m = output.metrics
        assert m.arrival_s < m.first_scheduled_s < m.first_token_s < m.finished_s
        assert m.ttft_s == m.first_token_s - m.arrival_s
        assert m.tpot_s == (m.finished_s - m.first_token_s) / 15
    stats = coordinator.stats()
    assert [o.metrics.num_preemptions for o in outputs] == [0, stats.preemptions]
    assert stats.preemptions > 0
    assert stats.generated_tokens == 32
    assert stats.prompt_tokens == 18
    assert stats.step_tokens >= 18 + 30
    again = coordinator.add("2", None, [0] * 9, SamplingParams(temperature=0, max_tokens=1))
    drain(coordinator)
    assert again.metrics.num_cached_tokens == 8
    assert again.metrics.tpot_s is None
