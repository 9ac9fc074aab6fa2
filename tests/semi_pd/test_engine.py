"""The engine on processes: the same tokens as in one process, whatever happens to the executors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpd import LLM, AsyncLLM, SamplingParams
from jpd.child import Child
from jpd.config import SemiPDConfig
from jpd.engine.lane import ExecutorLostError
from jpd.engine.plan import StepPlan
from jpd.errors import ConfigError, EngineDeadError
from jpd.semi_pd import shared_model
from jpd.semi_pd.controller import Observation, Shares
from jpd.semi_pd.messages import WorkerSpec
from jpd.semi_pd.mode import Mode
from jpd.semi_pd.pool import MAX_FAILURES
from jpd.semi_pd.remote import RemoteExecutor, RemoteStep
from jpd.types import FinishReason, RequestOutput
from tests import tiny_models
from tests.engine.tiny_engine import MODEL, SIZES
from tests.processes import PATIENCE_S, stop, wait_for_end, wait_until

OPTIONS = SIZES | {"num_pages": 33, "skip_tokenizer_init": True, "show_progress": False}
VOCAB = tiny_models.CASES[MODEL]["vocab_size"]
PAIRS = [(100, 100), (50, 50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model"))


def work(count: int) -> tuple[list[dict], list[SamplingParams]]:
    """Prompts of all lengths, some with common beginnings, and ways to sample."""
    rng = np.random.default_rng(0)
    common = rng.integers(5, VOCAB, 40).tolist()
    prompts = [
        common[: int(rng.integers(0, 40))]
        + rng.integers(5, VOCAB, int(rng.integers(1, 30))).tolist()
        for _ in range(count)
    ]
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "repetition_penalty": 1.3, "n": 2},
        {"temperature": 0, "logprobs": 3},
    ]
    params = [
        SamplingParams(**kinds[i % 4], seed=i, max_tokens=10 + i % 30, ignore_eos=True)
        for i in range(count)
    ]
    return [{"prompt_token_ids": p} for p in prompts], params


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [c.token_ids for output in outputs for c in output.outputs]


@pytest.fixture(scope="module")
def in_one_process(folder: Path) -> list[list[int]]:
    """What the work gives on one executor in this process."""
    llm = LLM(str(folder), **OPTIONS)
    outputs = llm.generate(*work(60))
    assert llm.stats.preemptions > 0
    llm.close()
    return tokens(outputs)


class Script:
    """A controller that is told what to say."""

    def __init__(self) -> None:
        self.wanted: Shares | None = None
        self.observations: list[Observation] = []

    def decide(self, observation: Observation, current: Shares) -> Shares:
        self.observations.append(observation)
        return self.wanted or current


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def llm(folder: Path, script: Script) -> Iterator[LLM]:
    """Two pairs of executors, one in use and one kept ready."""
    llm = LLM(
        str(folder),
        **OPTIONS,
        topology="semi_pd",
        semi_pd={
            "kept_shares": PAIRS,
            "check_ownership": True,
            "controller": script,
            "control_interval_s": 1e-6,
        },
    )
    assert {(e.phase, e.share, e.serves) for e in llm.executors} == {
        (phase, share, share == 100) for phase in ("prefill", "decode") for share in (100, 50)
    }
    cpus = len(os.sched_getaffinity(0))
    assert {e.units for e in llm.executors if e.share == 100} == {cpus}
    yield llm
    pids = [e.pid for e in llm.executors]
    llm.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def seats(llm: LLM) -> tuple:
    topology = llm._engine.topology
    return topology.prefill, topology.decode


def check_idle(llm: LLM) -> None:
    scheduler = llm._engine.coordinator.scheduler
    scheduler.check_integrity()
    assert scheduler.pool.num_free == scheduler.pool.num_usable, "a page leaked"


def test_the_same_tokens_as_in_one_process(llm: LLM, in_one_process: list[list[int]]) -> None:
    before = llm.stats
    for _ in range(20):  # how many decode at once depends on how fast either executor is
        outputs = llm.generate(*work(60))
        assert tokens(outputs) == in_one_process
        stats = llm.stats
        if stats.preemptions > before.preemptions:
            break
    assert all(len(o.outputs[0].logprobs) == len(o.outputs[0].token_ids) for o in outputs[3::4])
    assert stats.preemptions > before.preemptions
    assert stats.cached_tokens > before.cached_tokens
    assert stats.recompiles == 0
    check_idle(llm)


def test_while_shares_switch_at_every_turn(
    llm: LLM, script: Script, in_one_process: list[list[int]]
) -> None:
    rng = random.Random(0)
    before = [len(seat.switches) for seat in seats(llm)]
    outputs = llm._queue(llm._checked(*work(60), None))
    while not all(o.finished for o in outputs):
        script.wanted = Shares(rng.choice((50, 100)), rng.choice((50, 100)))
        llm._step()
    script.wanted = None
    assert tokens(outputs) == in_one_process
    for seat, count in zip(seats(llm), before, strict=True):
        new = seat.switches[count:]
        assert len(new) >= 5
        assert all(s.asked_s <= s.held_s <= s.done_s for s in new)
        assert {s.share for s in new} == {50, 100}
    check_idle(llm)


def test_what_a_controller_is_told(llm: LLM, script: Script) -> None:
    llm._engine.topology.tend(llm._engine.coordinator.recent)
    script.observations.clear()
    before = llm.stats
    outputs, seen = [], script.observations
    for _ in range(50):  # how many decode at once depends on how fast either executor is
        outputs += llm.generate(*work(6))
        llm._engine.topology.tend(llm._engine.coordinator.recent)
        if max(o.decoding_requests for o in seen) >= 4:
            break
    ttft = sorted(t for o in seen for t in o.ttft_s)
    np.testing.assert_allclose(ttft, sorted(o.metrics.ttft_s for o in outputs))
    tpot = sorted(t for o in seen for t in o.tpot_s)
    np.testing.assert_allclose(tpot, sorted(o.metrics.tpot_s for o in outputs))
    after = llm.stats
    assert after.preemptions == before.preemptions
    computed = (after.prompt_tokens - before.prompt_tokens) - (
        after.cached_tokens - before.cached_tokens
    )
    assert sum(o.prefill_tokens for o in seen) == computed > 0
    assert sum(o.prefill_busy_s for o in seen) > 0
    assert sum(len(o.token_gap_s) for o in seen) > 10
    assert max(o.waiting_requests for o in seen) > 0
    assert max(o.decoding_requests for o in seen) >= 4
    assert (seen[-1].waiting_requests, seen[-1].waiting_tokens, seen[-1].decoding_requests) == (
        0,
        0,
        0,
    )
    times = [o.now_s for o in seen]
    assert times == sorted(times)


def test_while_executors_are_killed(
    llm: LLM, in_one_process: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = []

    def noted(**fields: object) -> shared_model.WorkerSpec:
        specs.append(WorkerSpec(**fields))
        return specs[-1]

    monkeypatch.setattr(shared_model, "WorkerSpec", noted)
    before = llm.stats
    killed = 0
    outputs = llm._queue(llm._checked(*work(60), None))
    for turn in range(1_000_000):
        if all(o.finished for o in outputs):
            break
        if turn in (20, 90, 160, 230):
            seat = seats(llm)[killed % 2]
            if seat.executor is not None:
                os.kill(seat.executor.pid, signal.SIGKILL)
                killed += 1
        llm._step()
    assert tokens(outputs) == in_one_process
    assert killed >= 3
    wait_for_losses(llm, before.executors_lost + killed)
    # Others with their shares have compared the kernels.
    assert specs
    assert not any(spec.check_kernels for spec in specs)
    check_idle(llm)


def test_twenty_kills_at_random(llm: LLM, in_one_process: list[list[int]]) -> None:
    """Of executors of either phase, in use or kept ready, at any point of the work."""
    rng, lost, dead = random.Random(0), llm.stats.executors_lost, set()
    while len(dead) < 20:
        for seat in seats(llm):  # those that were killed before they served are no broken share
            seat.pool.forgive()
        rest_until(llm, lambda: len(llm.executors) == 4, "what was killed before is not replaced")
        outputs = llm._queue(llm._checked(*work(60), None))
        until_next, most = rng.randrange(5, 60), min(20, len(dead) + 5)
        while not all(o.finished for o in outputs):
            alive = [e.pid for e in llm.executors if e.pid not in dead]
            if until_next <= 0 and len(dead) < most and alive:
                pid = rng.choice(alive)
                os.kill(pid, signal.SIGKILL)
                dead.add(pid)
                until_next = rng.randrange(5, 60)
            llm._step()
            until_next -= 1
        assert tokens(outputs) == in_one_process
    wait_for_losses(llm, lost + 20)
    for seat in seats(llm):
        seat.pool.forgive()
    check_idle(llm)


def wait_for_losses(llm: LLM, count: int) -> None:
    """Until all losses were seen, also of executors that had nothing to do."""
    rest_until(llm, lambda: llm.stats.executors_lost >= count, f"{count} losses")
    assert llm.stats.executors_lost == count


def rest_until(llm: LLM, condition: Callable[[], object], what: str) -> None:
    """Looks after the executors of an idle engine until a condition holds."""
    wait_until(lambda: llm._engine.coordinator.rest() or condition(), what)


def test_all_executors_at_once_also_those_kept_ready(
    llm: LLM, in_one_process: list[list[int]]
) -> None:
    rest_until(llm, lambda: len(llm.executors) == 4, "what was killed before is not replaced")
    before = llm.stats
    outputs = llm._queue(llm._checked(*work(60), None))
    for _ in range(80):
        llm._step()
    for executor in llm.executors:
        os.kill(executor.pid, signal.SIGKILL)
    while not all(o.finished for o in outputs):
        llm._step()
    assert tokens(outputs) == in_one_process
    wait_for_losses(llm, before.executors_lost + 4)
    check_idle(llm)


def test_aborts_and_requests_while_steps_run(llm: LLM) -> None:
    prompts, params = work(16)
    want = tokens(llm.generate(prompts, params))
    streams = llm.stream(prompts, params)
    got: dict[tuple[str, int], list[int]] = {}
    for count, delta in enumerate(streams):
        got.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        if count == 60:
            break
    streams.close()
    check_idle_after_steps(llm)
    first = min(int(request_id) for request_id, _ in got)
    whole = iter(want)
    for i, param in enumerate(params):
        for index in range(param.n):
            ids = next(whole)
            part = got.get((str(first + i), index), [])
            assert part == ids[: len(part)]
    assert tokens(llm.generate(prompts, params)) == want


def check_idle_after_steps(llm: LLM) -> None:
    while llm._engine.coordinator.has_work:
        llm._engine.coordinator.step()
    check_idle(llm)


def test_when_the_memory_is_lost_everything_is_computed_again(
    llm: LLM, in_one_process: list[list[int]]
) -> None:
    """As after a fault of the GPU, which takes all processes on it along."""
    before = llm.stats
    outputs = llm._queue(llm._checked(*work(60), None))
    for _ in range(150):
        llm._step()
    os.kill(llm._engine.topology._models[0]._owner._child.process.pid, signal.SIGKILL)
    while not all(o.finished for o in outputs):
        llm._step()
    assert tokens(outputs) == in_one_process
    stats = llm.stats
    assert stats.pages_lost - before.pages_lost == 1
    assert stats.requeued > before.requeued
    check_idle(llm)


def test_an_executor_that_nobody_can_start_leaves_its_phase_to_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, in_one_process: list[list[int]]
) -> None:
    llm = LLM(str(folder), **OPTIONS, topology="semi_pd")
    spawn, num_started = shared_model.spawn, itertools.count()

    def spawn_another(module: str, **options: Any) -> Child:
        child = spawn("tests.semi_pd.no_executor", **options)
        if next(num_started) % 2:  # it ends before it is told what to do, or after that
            child.wait()
        return child

    monkeypatch.setattr(shared_model, "spawn", spawn_another)
    prompts, params = work(60)
    outputs = llm._queue(llm._checked(prompts, params, None))
    for _ in range(30):
        llm._step()
    os.kill(llm._engine.topology.prefill.executor.pid, signal.SIGKILL)
    while not all(o.finished for o in outputs):
        llm._step()
    pool = llm._engine.topology.prefill.pool
    assert pool.given_up(100)
    assert pool.num_lost == pool.num_failures(100) == MAX_FAILURES
    assert llm._engine.topology.prefill.executor is None
    assert tokens(outputs) == in_one_process
    owner = llm._engine.topology._models[0]._owner._child.process
    os.kill(llm._engine.topology.decode.executor.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="no executor is left"):
        llm.generate(prompts[0], params[0])
    llm.close()
    assert owner.poll() is not None, "the storage owner outlived its engine"


def test_decode_given_up_is_taken_over_with_all_that_penalties_need(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    prompts = [{"prompt_token_ids": rng.integers(5, VOCAB, 20).tolist()} for _ in range(4)]
    kinds = [{"repetition_penalty": 1.5}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {}]
    params = [SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, **k) for k in kinds]
    alone = LLM(str(folder), **OPTIONS)
    want = tokens(alone.generate(prompts, params))
    alone.close()
    llm = LLM(str(folder), **OPTIONS, topology="semi_pd")
    spawn = shared_model.spawn
    monkeypatch.setattr(
        shared_model, "spawn", lambda _, **options: spawn("tests.semi_pd.no_executor", **options)
    )
    outputs = llm._queue(llm._checked(prompts, params, None))
    while len(outputs[0].outputs[0].token_ids) < 20:
        llm._step()
    os.kill(llm._engine.topology.decode.executor.pid, signal.SIGKILL)
    while not all(o.finished for o in outputs):
        llm._step()
    assert llm._engine.topology.decode.pool.given_up(100)
    assert tokens(outputs) == want
    llm.close()


class ModeScript:
    """A mode policy that is told what to say."""

    def __init__(self) -> None:
        self.wanted: Mode = "unified"
        self.observations: list[Observation] = []

    def decide(self, observation: Observation, current: Mode) -> Mode:
        self.observations.append(observation)
        return self.wanted


def test_while_one_executor_and_two_take_turns(
    folder: Path, in_one_process: list[list[int]]
) -> None:
    """With a decode executor on half of the CPUs, and one on all that can compute prompts too."""
    script, rng, served = ModeScript(), random.Random(0), set()
    options = {"decode_share": 50, "control_interval_s": 1e-6, "check_ownership": True}
    llm = LLM(str(folder), **OPTIONS, topology="auto", semi_pd=options | {"break_even": script})
    try:
        assert {(e.phase, e.share) for e in llm.executors} == {
            ("prefill", 100),
            ("decode", 100),
            ("decode", 50),
        }
        assert (llm.stats.mode, llm.stats.mode_changes) == ("unified", 0)
        turn = 0
        for _ in range(20):  # how much is served while an executor starts depends on the machine
            outputs = llm._queue(llm._checked(*work(60), None))
            while not all(o.finished for o in outputs):
                if rng.random() < 0.1:
                    script.wanted = rng.choice(("unified", "semi_pd"))
                if turn in (100, 300):
                    os.kill(llm._engine.topology.decode.executor.pid, signal.SIGKILL)
                llm._step()
                turn += 1
                prefill, decode = llm._engine.topology.lanes
                served |= {("prefill", bool(s.plan.rows.size)) for s in prefill.in_flight}
                served |= {
                    ("decode", len(s.plan.chunks) > 0, llm._engine.topology.shares.decode)
                    for s in decode.in_flight
                }
            assert tokens(outputs) == in_one_process
            if turn > 300 and llm.stats.mode_changes >= 10 and len(served) >= 4:
                break
        assert served == {
            ("prefill", False),
            ("decode", False, 50),
            ("decode", False, 100),
            ("decode", True, 100),
        }
        stats = llm.stats
        assert stats.mode_changes >= 10
        assert stats.recompiles == 0, "an executor was not prepared for steps of both phases"
        assert sum(o.decoding_beside > 0 for o in script.observations) > 10
        # A prompt token's own request waits.
        assert all(o.waiting_beside >= o.prefill_tokens for o in script.observations)
        wait_for_losses(llm, 2)
        check_idle(llm)
    finally:
        llm.close()


def test_time_slices_compute_the_same(folder: Path, in_one_process: list[list[int]]) -> None:
    """Two executors without shares of their own (`sm_shares=False`), and one that is lost."""
    options = {"sm_shares": False, "check_ownership": True}
    llm = LLM(str(folder), **OPTIONS, topology="semi_pd", semi_pd=options)
    try:
        assert {(e.phase, e.share) for e in llm.executors} == {("prefill", 100), ("decode", 100)}
        assert tokens(llm.generate(*work(60))) == in_one_process
        os.kill(llm._engine.topology.decode.executor.pid, signal.SIGKILL)
        assert tokens(llm.generate(*work(60))) == in_one_process
        wait_for_losses(llm, 1)
        check_idle(llm)
    finally:
        llm.close()


def test_a_hung_executor_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(folder), **OPTIONS, topology="semi_pd", semi_pd={"step_timeout_s": 1000.0})
    launch, hung = RemoteExecutor.launch, []

    def launch_long_ago(executor: RemoteExecutor, plan: StepPlan) -> RemoteStep:
        step = launch(executor, plan)
        if executor.pid in hung:
            step.launched_s -= 999.5
        return step

    monkeypatch.setattr(RemoteExecutor, "launch", launch_long_ago)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompt = [{"prompt_token_ids": [7, 8, 9]}]
    want = tokens(llm.generate(prompt, params))
    (output,) = llm._queue(llm._checked(prompt, params, None))
    while len(output.outputs[0].token_ids) < 10:
        llm._step()
    lane = llm._engine.topology.decode.lane
    hung.append(lane.executor.pid)
    stop(lane.executor.pid)
    for step in lane.in_flight:
        step.launched_s -= 999.5
    while not output.finished:
        llm._step()
    assert tokens([output]) == want
    assert lane.executor.pid not in hung
    assert llm.stats.executors_lost == 1
    close_in_the_middle_of_steps(llm, monkeypatch)


def close_in_the_middle_of_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors run what they were sent, report it to nobody, and end by themselves."""
    ended = []

    def look(executor: RemoteExecutor, *, wait: bool) -> None:
        with contextlib.suppress(ExecutorLostError):
            while True:
                ended.append((executor, executor.next_report()))
        kill(executor, wait=wait)

    kill = RemoteExecutor.kill
    monkeypatch.setattr(RemoteExecutor, "kill", look)
    monkeypatch.setattr("jpd.semi_pd.pool._END_TIMEOUT_S", PATIENCE_S)
    llm._queue(llm._checked(*work(3), None))
    lane = llm._engine.topology.decode.lane
    while len(lane.in_flight) < 2:
        llm._step()
    sent, decoding = len(lane.in_flight), lane.executor
    ready = [executor for seat in seats(llm) for executor in seat.pool.ready()]
    llm.close()
    assert [executor._child.wait() for executor in ready] == [0] * len(ready)
    assert sum(executor is decoding for executor, _ in ended) == sent


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_request_ends_in_time_though_its_executor_hangs(folder: Path, phase: str) -> None:
    llm = LLM(str(folder), **OPTIONS, topology="semi_pd", semi_pd={"step_timeout_s": 10000.0})
    prompt = [{"prompt_token_ids": [7, 8, 9]}]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    want = tokens(llm.generate(prompt, params))
    hung = getattr(llm._engine.topology, phase).executor.pid
    stop(hung)
    # Without the time-out it would go on when the executor does.
    timer = threading.Timer(PATIENCE_S, os.kill, (hung, signal.SIGCONT))
    timer.start()
    begun_s = time.monotonic()
    (output,) = llm.generate(prompt, dataclasses.replace(params, timeout_s=0.5))
    took_s = time.monotonic() - begun_s
    timer.cancel()
    assert output.outputs[0].finish_reason is FinishReason.TIMEOUT
    assert 0.5 <= took_s < PATIENCE_S / 2
    os.kill(hung, signal.SIGCONT)
    assert tokens(llm.generate(prompt, params)) == want
    assert llm.stats.executors_lost == 0
    check_idle_after_steps(llm)
    llm.close()


def hang_executors_at_start(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The next so many executors never become ready."""
    spawn, left = shared_model.spawn, [most]

    def spawn_another(module: str, **options: Any) -> Child:
        left[0] -= 1
        return spawn("tests.semi_pd.hangs_at_start" if left[0] >= 0 else module, **options)

    monkeypatch.setattr(shared_model, "spawn", spawn_another)


def test_an_executor_that_hangs_while_it_starts_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(folder), **OPTIONS, topology="semi_pd", semi_pd={"start_timeout_s": 10000.0})
    prompt = [{"prompt_token_ids": [7, 8, 9]}]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, timeout_s=PATIENCE_S)
    want = tokens(llm.generate(prompt, params))
    hang_executors_at_start(monkeypatch, 1)
    pool = llm._engine.topology.prefill.pool
    os.kill(llm._engine.topology.prefill.executor.pid, signal.SIGKILL)
    rest_until(llm, lambda: pool.num_starting, "the executor was not replaced")
    # It was started long ago, and its time is over while the engine waits.
    hung, begun_s = pool._starting[100]
    pool._starting[100] = (hung, begun_s - 9999.5)
    assert tokens(llm.generate(prompt, params)) == want
    assert llm.stats.executors_lost == 2
    assert pool.last_failure == f"its process {hung.pid} was not ready after 10000 s"
    wait_for_end(hung.pid)
    llm.close()


def test_an_engine_whose_executor_hangs_while_it_starts_is_not_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang_executors_at_start(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"could not be started: .* was not ready after 1 s"):
        LLM(str(folder), **OPTIONS, topology="semi_pd", semi_pd={"start_timeout_s": 1})


@pytest.mark.parametrize("name", ["step_timeout_s", "start_timeout_s"])
def test_a_time_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"semi_pd.{name}=0.*a number of seconds above 0"):
        SemiPDConfig(**{name: 0})


def test_what_cannot_be_built_says_why_and_leaves_nothing(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(prefill|decode) executor could not be started.*no kernel"
    ):
        LLM(str(folder), **OPTIONS, topology="semi_pd", kernels={"pallas_only": True})


def test_an_async_face(folder: Path, in_one_process: list[list[int]]) -> None:
    async def serve() -> list[RequestOutput]:
        async def answer(prompt: dict, params: SamplingParams) -> RequestOutput:
            return [output async for output in llm.generate(prompt, params)][-1]

        return await asyncio.gather(*(answer(p, q) for p, q in zip(*work(60), strict=True)))

    llm = AsyncLLM(str(folder), **OPTIONS, topology="semi_pd")
    try:
        assert tokens(asyncio.run(serve())) == in_one_process
        # An executor that dies while nobody asks for anything is replaced before somebody does.
        seat = llm._engine.topology.decode
        first = seat.executor.pid
        os.kill(first, signal.SIGKILL)
        wait_until(
            lambda: (executor := seat.executor) is not None and executor.pid != first,
            "the executor was not replaced",
        )
        assert llm.stats.executors_lost == 1
    finally:
        llm.close()


def test_nothing_outlives_a_coordinator_that_is_killed(folder: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from jpd import LLM
        llm = LLM(sys.argv[1], **eval(sys.argv[2]), topology="semi_pd")
        topology = llm._engine.topology
        owner = topology._models[0]._owner._child.process
        print(topology.prefill.executor.pid, topology.decode.executor.pid, owner.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), repr(OPTIONS)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    for pid in pids:
        wait_for_end(pid)
