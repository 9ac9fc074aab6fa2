"""What the recorder notes of a real engine whose executors sleep instead of computing.

How well a fitted model foretells times is a question to a quiet machine:
`benchmarks/simulator_fidelity.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from jpd.bench import client, slo, traces, workload
from jpd.config import EngineConfig
from jpd.engine.plan import StepResult
from jpd.semi_pd.share_models import H200
from jpd.simulate import engine, record
from jpd.simulate.device import SimulatedExecutor, SimulatedStep
from jpd.simulate.engine import SimulatedEngine
from jpd.simulate.fit import fit
from jpd.simulate.latency import DecodeTime, Overheads, PromptTime
from jpd.simulate.record import Recorder
from jpd.simulate.run import simulate
from tests.simulate.simulated import SIZES, latencies, make_engine
from tests.simulate.sleeping import sleeping_llm

STEPS = dataclasses.replace(
    latencies(),
    decode=DecodeTime(step_s=2e-3, row_s=5e-5, context_token_s=5e-7),
    prompt=PromptTime(step_s=3e-3, token_s=5e-5, context_token_s=5e-7),
)


HOST = Overheads(launch_s=4e-4, deliver_s=2e-4, deliver_token_s=1e-5, message_s=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_policy": "first"},
        {"topology": "semi_pd"},
        {"topology": "auto", "semi_pd": {"break_even": 1e9}},
    ],
    ids=str,
)
def test_every_step_is_recorded_once_and_can_be_fitted(folder, options):
    prepared = engine.prepare(
        EngineConfig.from_kwargs(str(folder), **SIZES, **options), 1 << 30, "none"
    )
    load = traces.fixed(workload.poisson(40.0, 24, 0), 40, 30)
    llm = sleeping_llm(prepared, STEPS)
    try:
        recorder = Recorder(llm._engine)
        records = asyncio.run(client.run(llm, load, client.ClientOptions()))
        times, stats = recorder.times("sleeping executors"), llm.stats
    finally:
        llm.close()
    assert slo.summarize(records)["failed"] == 0
    # Warm-up included, nothing twice and nothing left out.
    assert len(recorder.records) == stats.steps
    computed = sum(r.work.rows + r.work.prompt_tokens for r in recorder.records)
    assert computed == stats.step_tokens
    assert all(r.begun_s <= r.ended_s <= r.known_s for r in recorder.records)
    assert times.overheads.launch_s + times.overheads.deliver_s > 0
    assert all(0 <= step.other_busy <= 1 for step in times.steps)
    busy = max(step.other_busy for step in times.steps)
    assert busy > 0 if options.get("topology") == "semi_pd" else busy == 0
    simulated = engine.build(prepared, fit(times).model)
    assert slo.summarize(simulate(load, [simulated]))["failed"] == 0
    simulated.close()


class _Report(NamedTuple):
    begun_s: float
    ended_s: float


@pytest.fixture
def in_virtual_time(monkeypatch):
    """Makes a simulated engine look to the recorder as a real one does."""

    def install(virtual: SimulatedEngine) -> None:
        gpu, coordinator = virtual.gpu, virtual.coordinator
        monkeypatch.setattr(record, "time", SimpleNamespace(monotonic=gpu.clock))
        if len(virtual.topology.lanes) == 2:
            monkeypatch.setattr(record, "RemoteStep", SimulatedStep)
        ended, deliver, overheads = SimulatedExecutor.ended, coordinator._deliver, HOST

        def reported(executor, step, now_s):
            step.report = _Report(step.begin_s, now_s)
            ended(executor, step, now_s)

        def result(step):
            while gpu.now_s < step.known_s:
                gpu.advance(step.known_s)
            return StepResult(np.zeros(len(step.plan.rows) + len(step.plan.chunks), int), None)

        def delivered(plan, committed, result):
            gpu.spend(overheads.deliver_s + len(result.tokens) * overheads.deliver_token_s)
            return deliver(plan, committed, result)

        monkeypatch.setattr(SimulatedExecutor, "ended", reported)
        # It lets the time of the delivery pass itself, before the recorder knows the result.
        monkeypatch.setattr(SimulatedStep, "result", result)
        monkeypatch.setattr(coordinator, "_deliver", delivered)

    return install


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topology": "semi_pd", "semi_pd": {"prefill_share": 60, "decode_share": 50}},
        {"topology": "semi_pd"},
        {"topology": "auto", "semi_pd": {"break_even": 1e9, "prefill_share": 60}},
        {"tensor_parallel_size": 2},
    ],
    ids=str,
)
def test_what_is_recorded_of_a_simulated_engine_is_its_model(folder, in_virtual_time, options):
    """The host's times come back, and do not get mixed up with what it waits for."""
    shares = {"parallel": 0.6, "knee": 35.0, "knee_row": 0.1, "interference": H200}
    ranks = options.get("tensor_parallel_size", 1)
    model = dataclasses.replace(STEPS, overheads=HOST, tensor_parallel_size=ranks, **shares)
    virtual = make_engine(folder, model, **options)
    in_virtual_time(virtual)
    recorder = Recorder(virtual)
    simulate(traces.fixed(workload.poisson(30.0, 300, 0), 40, 30), [virtual])
    times = recorder.times("a simulated engine")
    assert len(times.steps) == virtual.coordinator.stats().steps
    assert times.tensor_parallel_size == ranks
    found = times.overheads
    assert found.launch_s == pytest.approx(HOST.launch_s, rel=1e-6)
    assert found.deliver_s == pytest.approx(HOST.deliver_s, rel=1e-6)
    assert found.deliver_token_s == pytest.approx(HOST.deliver_token_s, rel=1e-6)
    apart = len(virtual.topology.lanes) == 2
    assert found.message_s == pytest.approx(HOST.message_s if apart else 0.0, rel=1e-6)
    fitted = fit(times)
    assert fitted.decode.mean < 0.05
    assert fitted.prompt.mean < 0.05
