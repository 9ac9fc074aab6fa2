"""What the recorder notes of a real engine whose executors sleep instead of computing.

How well a fitted model foretells times is a question to a quiet machine:
`benchmarks/simulator_fidelity.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from jpd.bench import client, slo, traces, workload
from jpd.config import EngineConfig
from jpd.simulate import engine
from jpd.simulate.fit import fit
from jpd.simulate.latency import DecodeTime, PromptTime
from jpd.simulate.record import Recorder
from jpd.simulate.run import simulate
from tests.simulate.simulated import SIZES, latencies
from tests.simulate.sleeping import sleeping_llm

STEPS = dataclasses.replace(
    latencies(),
    decode=DecodeTime(step_s=2e-3, row_s=5e-5, context_token_s=5e-7),
    prompt=PromptTime(step_s=3e-3, token_s=5e-5, context_token_s=5e-7),
)


@pytest.mark.parametrize(
    "options", [{}, {"prefill_policy": "first"}, {"topology": "semi_pd"}], ids=str
)
def test_every_step_is_recorded_once_and_can_be_fitted(folder, options):
    prepared = engine.prepare(EngineConfig(model=str(folder), **SIZES, **options), 1 << 30, "none")
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
    assert busy > 0 if options.get("topology") else busy == 0
    simulated = engine.build(prepared, fit(times).model)
    assert slo.summarize(simulate(load, [simulated]))["failed"] == 0
    simulated.close()
