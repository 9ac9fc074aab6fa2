"""The semi-PD benchmarks on small engines; their arithmetic is in `test_semi_pd_summaries.py`."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    semi_pd_crash,
    semi_pd_memory,
    semi_pd_parity,
    semi_pd_serving,
    semi_pd_switch,
    serving_impls,
    sm_share_surface,
    token_parity,
    topologies,
)
from benchmarks.engine_load import Load, LoadRequest, random_requests, seats
from benchmarks.report import Report
from benchmarks.rows import load as load_document
from jpd import AsyncLLM
from jpd.bench import client, traces
from jpd.bench.slo import RequestRecord, Slo
from jpd.engine.build import Engine
from jpd.semi_pd import decision_log
from jpd.semi_pd.controller import FULL, Observation, Shares, StaticController
from jpd.semi_pd.slo_controller import SloController
from jpd.simulate.fit import StepTimes

SIZES = topologies.SIZES["tiny"]
PAIRS = semi_pd_parity.PAIRS
QUESTION = "How fast do the topologies serve, and how much load do they bear within an SLO?"
SURFACE = "How long do prefill and decode steps take under each SM share, alone and side by side?"


def test_a_controller_is_put_in_between_two_points() -> None:
    steering = semi_pd_serving.Steering(StaticController())
    seen = Observation(now_s=0.0)
    assert steering.decide(seen, Shares(50, 50)) == Shares(100, 100)
    steering.inner = SimpleNamespace(decide=lambda observation, current: Shares(30, 70))
    assert steering.decide(seen, Shares(50, 50)) == Shares(30, 70)


class InThisProcess:
    """Stands in for `EngineProcess`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def call(self, function: Any, *args: Any) -> Any:
        return function(self.engine, *args)

    def begin(self) -> None:
        pass

    def wait(self) -> None:
        if isinstance(self.engine, Exception):
            raise self.engine

    def __exit__(self, *_: object) -> None:
        pass


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Its `main` in this process; the exit status."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *args])
    with pytest.raises(SystemExit) as end:
        module.main()
    return end.value.code


@pytest.mark.parametrize(
    "module",
    [
        semi_pd_crash,
        semi_pd_memory,
        semi_pd_parity,
        semi_pd_serving,
        semi_pd_switch,
        sm_share_surface,
    ],
)
def test_help(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(module, monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "--quick" in out
    measures_nothing = module in (semi_pd_serving, sm_share_surface)
    assert ("0 measures nothing" in " ".join(out.split())) == measures_nothing


def test_a_folder_for_decisions_that_cannot_be_made(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "decisions")
    assert run_main(semi_pd_serving, monkeypatch, "--quick", "--decisions", folder) == 2
    assert "--decisions: [Errno" in (error := capsys.readouterr().err)
    assert folder in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kept", "101,0"], "prefill=101 is not allowed: an integer percent, 1..100"),
        (["--kept", "70"], "two integers X,Y in percent, got '70'"),
        (["--kept", "70,30"], "no 100,100, under which points begin, in [(70, 30)]"),
        (
            ["--kept", "100,100", "70,30", "--impls", "semi_pd_80_20"],
            "(80, 20) is not kept ready: [(100, 100), (70, 30)]",
        ),
        (["--impls", "chunked_512"], "chunked_512: steps have at most 128 tokens"),
    ],
)
def test_what_cannot_be_served(arguments, said, monkeypatch, capsys) -> None:
    assert run_main(semi_pd_serving, monkeypatch, "--quick", *arguments) == 2
    assert said in capsys.readouterr().err


def test_kept_shares_reach_the_engine_that_divides_the_gpu(monkeypatch) -> None:
    monkeypatch.setattr(topologies, "EngineProcess", lambda make, arguments, **env: arguments)
    kept = [(100, 100), (80, 20)]
    engines = semi_pd_serving.Engines("tiny", SIZES, kept, ["chunked", "semi_pd_dynamic"])
    assert engines._process("semi_pd")["semi_pd"]["kept_shares"] == kept
    assert "semi_pd" not in engines._process("unified")


def test_controllers_of_a_workload_choose_from_the_same_shares(
    tmp_path, monkeypatch, capsys
) -> None:
    question = "How fast do the topologies serve, and how much load do they bear within an SLO?"
    report = Report("semi_pd_serving", question, out=tmp_path)
    report.summary["model"] = "tiny"
    point = {"rate": 4.0, "load": 0.4, "tight": 1.0, "loose": 1.0, "mean_e2el_ms": 5.0, "seed": 0}
    for workload, impl, kept in (
        ("azure_conv", "chunked", None),
        ("azure_conv", "semi_pd_mean", [[100, 100], [70, 30]]),
        ("azure_conv", "semi_pd_90_10", [[100, 100], [90, 10]]),  # it does not choose
        ("arxiv", "semi_pd_mean", [[100, 100], [60, 40]]),
    ):
        report.add(semi_pd_serving.unloaded_case(workload), "chunked", capacity=10.0)
        fields = point | {"workload": workload} | ({} if kept is None else {"kept_shares": kept})
        report.add(f"{workload} 4/s seed 0 {impl}", impl, **fields)
    report.save()
    file = str(tmp_path / "semi_pd_serving.json")
    here = ("--merge", file, "--out", str(tmp_path / "again"))
    assert run_main(semi_pd_serving, monkeypatch, *here, "--quick", "--seconds", "0") == 0
    other = (*here, "--quick", "--impls", "semi_pd_mean", "--kept", "100,100", "60,40")
    assert run_main(semi_pd_serving, monkeypatch, *other, "--workloads", "azure_conv") == 2
    said = "controllers of azure_conv chose from [((100, 100), (60, 40)), ((100, 100), (70, 30))]"
    assert said in capsys.readouterr().err


def test_serving_in_two_calls(tmp_path, monkeypatch, capsys) -> None:
    arguments = topologies.engine_args("tiny", "chunked", **SIZES, enable_prefix_caching=False)
    llm = AsyncLLM(**arguments)
    monkeypatch.setattr(topologies, "EngineProcess", lambda make, args, **env: InThisProcess(llm))
    common = ("--quick", "--impls", "chunked", "--out", str(tmp_path))
    try:
        first = ("--point-seconds", "0.1", "--loads", "0.2")
        assert run_main(semi_pd_serving, monkeypatch, *common, *first) == 0
        file = tmp_path / "semi_pd_serving.json"
        before = load_document(file)
        assert [row["case"] for row in before["rows"][:1]] == ["azure_conv unloaded"]
        assert len(before["rows"]) == 2
        again = ("--point-seconds", "0.1", "--missing", "--loads", "0.2", "0.4")
        assert run_main(semi_pd_serving, monkeypatch, *common, *again) == 0
    finally:
        llm.close()
    after = load_document(file)
    assert [row | {"run": 0} for row in before["rows"]] == after["rows"][:2]
    assert [row["run"] for row in after["rows"]] == [0, 0, 1]
    unloaded, *measured = after["rows"]
    assert [row["load"] for row in measured] == pytest.approx([0.2, 0.4], rel=0.01)
    assert all(row["failed"] == 0 and row["completed"] >= 4 for row in measured)
    assert unloaded["loose_ttft_s"] == pytest.approx(unloaded["tight_ttft_s"] * 10 / 7.5)
    assert set(after["summary"]) == {"model", "azure_conv"}
    assert all(row["p99_lateness_ms"] >= 0 for row in measured)
    assert "E2E" in capsys.readouterr().out
    # Another machine can merge and draw, without an engine.
    monkeypatch.setattr(topologies, "EngineProcess", None)
    here = ("--seconds", "0", "--merge", str(file), "--out", str(tmp_path / "again"))
    assert run_main(semi_pd_serving, monkeypatch, *here) == 0
    again = load_document(tmp_path / "again" / "semi_pd_serving.json")
    assert (again["rows"], again["summary"]) == (after["rows"], after["summary"])
    # Not what was measured by other SLOs.
    unloaded["capacity"] *= 1.1
    file.write_text(json.dumps(after))
    assert run_main(semi_pd_serving, monkeypatch, *here) == 2
    assert "another run's SLOs and capacity" in capsys.readouterr().err


def test_an_engine_that_does_not_start_costs_its_peers_nothing(
    tmp_path, monkeypatch, capsys
) -> None:
    arguments = topologies.engine_args("tiny", "chunked", **SIZES, enable_prefix_caching=False)
    llm = AsyncLLM(**arguments)

    def start(make: Any, args: dict[str, Any], **env: str) -> InThisProcess:
        no_room = args.get("topology") == "auto"
        return InThisProcess(RuntimeError("no room") if no_room else llm)

    monkeypatch.setattr(topologies, "EngineProcess", start)
    args = ("--quick", "--impls", "chunked", "auto", "--rates", "20", "--point-seconds", "0.2")
    try:
        assert run_main(semi_pd_serving, monkeypatch, *args, "--out", str(tmp_path)) == 1
    finally:
        llm.close()
    rows = load_document(tmp_path / "semi_pd_serving.json")["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed: RuntimeError: no room"]
    out = capsys.readouterr().out
    assert "unified is ready" in out
    assert "semi_pd did not start: no room" in out
    assert "semi_pd is ready" not in out


def serving_arguments(**changes: Any) -> SimpleNamespace:
    """What `semi_pd_serving.measure` reads of the command line."""
    arguments = {
        "quick": True,
        "seeds": [0],
        "workloads": ["azure_conv"],
        "impls": ["chunked"],
        "loads": [1.0],
        "rates": None,
        "missing": False,
        "break_even": 1.0,
        "decisions": None,
    }
    return SimpleNamespace(**arguments | changes)


@pytest.mark.parametrize("name", traces.NAMES)
def test_default_rates(name: str, tmp_path) -> None:
    report = Report("semi_pd_serving", QUESTION, out=tmp_path)
    cases = semi_pd_serving.cases_of(serving_arguments(loads=None), report, name, 7, 100.0)
    rates = [case.rate for case in cases]
    assert len(rates) >= 4
    assert sorted(rates) == rates
    assert 80.0 in rates  # `mean_e2e_speedup_at_80pct_load` as measured
    assert {(case.workload, case.seed) for case in cases} == {(name, 7)}


def test_every_workload_is_calibrated_as_chunked(tmp_path, monkeypatch) -> None:
    recent = SimpleNamespace(decoding_beside=1.0, waiting_beside=1.0)
    coordinator = SimpleNamespace(prefill_policy="first", recent=lambda: recent)
    llm = SimpleNamespace(
        _engine=SimpleNamespace(coordinator=coordinator, topology=None),
        config=SimpleNamespace(semi_pd=SimpleNamespace(controller=None), max_num_mixed_tokens=2048),
        stats=SimpleNamespace(preemptions=0, recompiles=0),
    )
    policies, mixed = [], []

    async def run(
        llm: Any, workload: Any, options: Any, until: int | None = None
    ) -> list[RequestRecord]:
        policies.append((coordinator.prefill_policy, coordinator.scheduling_policy))
        mixed.append(coordinator.max_num_mixed_tokens)
        times = {"due_s": 0.0, "sent_s": 0.0, "first_token_s": 0.1, "prompt_tokens": 9}
        tokens = {"wanted_tokens": 5, "output_tokens": 5}
        ends = range(until or len(workload))
        return [RequestRecord(finished_s=1.0 + i, **times, **tokens) for i in ends]

    for name in ("run", "run_alone", "run_at_once"):
        monkeypatch.setattr(client, name, run)
    semi_pd_serving.measure(
        serving_arguments(
            workloads=["azure_conv", "azure_code"],
            impls=["chunked", "chunked_512", "prefill_first", "prefill_first_shortest"],
        ),
        Report("semi_pd_serving", QUESTION, out=tmp_path),
        SimpleNamespace(of=lambda impl: InThisProcess(llm)),
        semi_pd_serving.Budget(None),
        sizes=SIZES,
        seconds=1.0,
    )
    # Alone, at once, and the four points of each workload.
    points = [("mixed", "fcfs")] * 4 + [("first", "fcfs"), ("first", "shortest")]
    assert policies == 2 * points
    assert mixed == 2 * ([2048] * 3 + [512] + [2048] * 2)


def test_a_calibration_is_written_before_the_first_case(tmp_path, monkeypatch) -> None:
    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(semi_pd_serving, "calibrate", lambda *args: {"capacity": 10.0})
    monkeypatch.setattr(semi_pd_serving, "measure_case", killed)
    report = Report("semi_pd_serving", QUESTION, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        semi_pd_serving.measure(
            serving_arguments(),
            report,
            SimpleNamespace(of=lambda impl: None),
            semi_pd_serving.Budget(None),
            sizes=SIZES,
            seconds=1.0,
        )
    assert [row["capacity"] for row in load_document(report.path)["rows"]] == [10.0]


def test_no_case_begins_that_may_not_end_in_time(tmp_path, monkeypatch) -> None:
    report = Report("semi_pd_serving", QUESTION, out=tmp_path)
    report.add("azure_conv unloaded", "chunked", capacity=10.0)
    now = iter(range(0, 1000, 10)).__next__
    begun = []

    def measure_case(report: Report, engine_of: Any, case: Any, impls: Any, *args, **options):
        begun.append(case.name)
        report.add(case.name, "chunked", workload=case.workload, load=1.0)

    monkeypatch.setattr(semi_pd_serving, "measure_case", measure_case)
    report.summarise = None
    args = serving_arguments(loads=[0.1, 0.2, 0.3, 0.4])
    engines = SimpleNamespace(of=lambda impl: None)
    budget = semi_pd_serving.Budget(45.0, clock=now)
    semi_pd_serving.measure(
        args, report, engines, budget, sizes={"max_model_len": 512}, seconds=1.0
    )
    assert begun == ["azure_conv 1/s seed 0"]
    rows = load_document(report.path)["rows"]
    assert [row["status"].split(":")[0] for row in rows] == ["ok", "ok", *["not run"] * 3]


@pytest.mark.parametrize(
    ("module", "name", "question"),
    [
        (semi_pd_serving, "semi_pd_serving", QUESTION),
        (sm_share_surface, "sm_share_surface", SURFACE),
    ],
)
def test_rows_of_another_model_are_refused(
    module: Any, name: str, question: str, tmp_path, monkeypatch, capsys
) -> None:
    def result(**summary: str) -> str:
        report = Report(name, question, out=tmp_path / summary.get("model", "unnamed"))
        report.fail("case", "chunked", "it is only about the summary")
        report.summary |= summary
        report.save()
        return str(report.path)

    large, tiny, unnamed = result(model="llama31-8b"), result(model="tiny"), result()
    out = ("--out", str(tmp_path))
    assert run_main(module, monkeypatch, "--quick", "--merge", large, *out) == 2
    assert "results of llama31-8b, not of tiny" in capsys.readouterr().err
    assert run_main(module, monkeypatch, "--seconds", "0", "--merge", tiny, large, *out) == 2
    assert "results of llama31-8b, not of tiny" in capsys.readouterr().err
    assert run_main(module, monkeypatch, "--seconds", "0", "--merge", unnamed, *out) == 2
    assert "does not say of which model" in capsys.readouterr().err
    assert run_main(module, monkeypatch, "--seconds", "0", *out) == 2
    assert "--merge what?" in capsys.readouterr().err


# --- on an engine ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One for all benchmarks, with two pairs of executors."""
    options = {"kept_shares": PAIRS}
    engine = topologies.build(**topologies.engine_args("tiny", "semi_pd", **SIZES, semi_pd=options))
    yield engine
    engine.coordinator.close()


class Shared:
    """A coordinator that outlives those who close it."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coordinator, name)

    def close(self) -> None:
        assert not self._coordinator.has_work


@pytest.fixture
def shared_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """`topologies.build` gives it."""
    shared = dataclasses.replace(engine, coordinator=Shared(engine.coordinator))
    monkeypatch.setattr(topologies, "build", lambda **args: shared)
    return shared


def settle(engine: Engine, shares: Shares) -> None:
    """Waits until the shares serve and all executors are ready, whatever was killed before."""
    engine.topology.shares = shares
    while engine.topology.shares != shares or any(
        seat.pool.next_due_s < math.inf for seat in seats(engine).values()
    ):
        engine.coordinator.step()
        time.sleep(0.01)


def check_idle(engine: Engine) -> None:
    assert not engine.coordinator.has_work
    assert semi_pd_crash.leaked_pages(engine) == 0


def test_a_load_keeps_requests_running(engine: Engine) -> None:
    requests = list(islice(random_requests(1, 256, (4, 20), (2, 9), common_tokens=8), 12))
    assert requests == list(islice(random_requests(1, 256, (4, 20), (2, 9), common_tokens=8), 12))
    load = Load(engine.coordinator, requests, 3)
    while load.running:
        load.step()
        assert engine.coordinator.stats().running + engine.coordinator.stats().waiting <= 3
    load.finish()
    assert [len(t) for t in load.tokens] == [r.output_tokens for r in requests]
    assert [len(t) for t in load.token_times_s] == [r.output_tokens for r in requests]
    earlier, later = load.gaps()
    assert len(earlier) == sum(r.output_tokens - 1 for r in requests)
    assert (later >= earlier).all()
    middle = float(np.median(earlier))
    assert (load.gaps(since_s=middle)[0] >= middle).all()
    check_idle(engine)


def test_parity_finds_a_wrong_token(engine: Engine, tmp_path) -> None:
    work = semi_pd_parity.make_work(12, SIZES["max_model_len"], 256)
    tokens, counts = semi_pd_parity.run_disturbed(engine, work, kills=1, switch_every_s=0.0)
    assert counts["kills"] == 1
    assert counts["switches"] > 2
    report = Report("semi_pd_parity", "?", out=tmp_path)

    def check(tie_below: float) -> dict[str, Any]:
        parity = semi_pd_parity.run_reference(engine, work, tokens, tie_below)
        semi_pd_parity.add_result(report, "c", "semi_pd", parity, counts)
        return report.rows[-1]

    row, total = check(0.0), sum(map(len, tokens))
    assert (row["identical"], row["ties"], row["compared_tokens"]) == (12, 0, total)
    assert report.failures == 0
    # The second best token, and what follows it is as the engine would have gone on from there.
    ask, request = token_parity.reference(engine.coordinator, 1), work[5]
    best = ask([request])[0][3].logprobs
    kept = [*tokens[5][:3], sorted(best, key=best.get)[-2]]
    rest = LoadRequest(request.prompt + kept, request.output_tokens - 4)
    tokens[5] = kept + [said.token for said in ask([rest])[0]]
    assert check(0.0)["status"].startswith("failed: wrong tokens: request 5, position 3")
    row = check(100.0)
    assert (row["identical"], row["ties"], row["wrong"]) == (11, 1, 0)
    assert row["compared_tokens"] == total
    tokens[5] = tokens[5][:-1]
    assert "request 5: " in check(100.0)["status"]
    check_idle(engine)


def test_switches(shared_engine: Engine, tmp_path, monkeypatch) -> None:
    settle(shared_engine, Shares(100, 100))
    monkeypatch.setattr(semi_pd_switch, "BACKGROUND", semi_pd_switch.POOL[::-1])
    args = ("--quick", "--switches", "4", "--background-switches", "2", "--hand-overs", "8")
    assert run_main(semi_pd_switch, monkeypatch, *args, "--out", str(tmp_path)) == 0
    document = load_document(tmp_path / "semi_pd_switch.json")
    rows = {row["impl"]: row for row in document["rows"]}
    hand_over, pool, background = (rows[name] for name in ("hand-over", "pool", "background"))
    assert hand_over["n"] >= 8
    assert {name: row["n"] for name, row in rows.items() if name != "hand-over"} == {
        "pool": 4,
        "pool control": 4,
        "pool control 50,50": 2,
        "pool control 100,100": 2,
        "background": 2,
        "background control": 2,
        "background control 50,50": 1,
        "background control 100,100": 1,
    }
    # No request is so long that no other prompt came.
    assert 0 < pool["beside_prefill_part"] + rows["pool control"]["beside_prefill_part"] <= 2
    assert document["summary"]["pool_switches"] == 4
    assert 0 <= hand_over["p50_ms"] <= hand_over["to_start_p50_ms"]
    # Pages are handed over, not what is in them.
    assert hand_over["message_bytes"] < hand_over["kv_bytes"]
    assert hand_over["kv_bytes_copied"] == 0 < hand_over["kv_bytes_copied_back"]
    assert document["summary"]["hand_over_kv_bytes_copied"] == 0
    assert "first_serve_ms" not in pool
    assert background["first_serve_ms"] > 0
    assert pool["serve_p99_ms"] > 0
    assert document["summary"]["pool_pause_p99_ms"] == pool["p99_ms"]
    added_ms = pool["ms"] - rows["pool control"]["ms"]
    assert document["summary"]["pool_added_p50_ms"] == added_ms
    check_idle(shared_engine)


def test_a_check_after_crashes_reads_no_page_from_before(shared_engine: Engine) -> None:
    coordinator = shared_engine.coordinator
    load = Load(coordinator, [LoadRequest([*range(100)], 5)], 1)
    load.finish()
    done = semi_pd_crash.CrashRun(requests=load.sent, tokens=load.tokens)
    found = coordinator.stats().cached_tokens
    parity = semi_pd_crash.undisturbed(shared_engine, done, 0.0)
    assert (parity.identical, parity.compared_tokens) == (1, 5)
    assert coordinator.stats().cached_tokens == found
    Load(coordinator, load.sent, 1).finish()
    assert coordinator.stats().cached_tokens > found  # as it would have been
    check_idle(shared_engine)


def test_crashes(shared_engine: Engine, tmp_path, monkeypatch) -> None:
    args = ("--quick", "--kinds", "warm", "--kills", "2", "--out", str(tmp_path))
    assert run_main(semi_pd_crash, monkeypatch, *args) == 0
    summary = load_document(tmp_path / "semi_pd_crash.json")["summary"]
    expected = {"kills": 2, "requests_lost": 0, "pages_leaked": 0, "ties": 0, "wrong": 0}
    assert {key: summary[key] for key in expected} == expected
    assert 0 < summary["warm_recovery_p50_ms"] <= summary["warm_recovery_p99_ms"]
    rows = load_document(tmp_path / "semi_pd_crash.json")["rows"]
    assert [row["case"].split()[-1] for row in rows] == ["prefill", "decode", "requests"]
    check_idle(shared_engine)


def test_surface(shared_engine: Engine, tmp_path, monkeypatch) -> None:
    nvidia_smi = tmp_path / "nvidia-smi"  # that knows clocks, and nothing else
    loop = "while sleep 0.01; do echo '1700, [N/A]'; done"
    nvidia_smi.write_text(f'#!/bin/sh\ncase "$*" in *loop-ms*) {loop} ;; esac\nexit 9\n')
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sm_share_surface, "SETTLE_S", 0.0)
    monkeypatch.setattr(sm_share_surface, "SAMPLE_S", 0.2)
    args = ("--quick", "--pairs", "100,100", "50,50", "--decode", "4x40", "--prompts", "48")
    args += ("--steps", "3", "--out", str(tmp_path))
    assert run_main(sm_share_surface, monkeypatch, *args) == 0
    document = load_document(tmp_path / "sm_share_surface.json")
    rows = document["rows"]
    sizes = {(r["phase"], r["rows"], r["prompt_tokens"]) for r in rows}
    assert sizes == {("decode", 4, 0), ("prefill", 0, 48)}
    assert {(r["prefill_share"], r["decode_share"]) for r in rows} == {(100, 100), (50, 50)}
    assert len(rows) == 8
    for row in rows:
        assert row["steps"] >= 3
        assert row["seconds"] > 0
        assert ("alone" in row["case"]) <= (row["other_busy"] == 0)
        assert (row["sm_mhz"], row["watts"]) == (1700, None)
    assert document["summary"]["prefill_max_slowdown_clock_ratio"] == 1
    beside = [row["other_busy"] for row in rows if "beside" in row["case"]]
    assert max(beside) > 0
    decodes = [row for row in rows if row["rows"]]
    assert all(row["context_tokens"] >= 4 * 41 for row in decodes)
    times = StepTimes.read(tmp_path / "sm_share_surface_steps.json")
    assert [step.seconds for step in times.steps] == [row["seconds"] for row in rows]
    check_idle(shared_engine)


def test_memory_of_the_processes(engine: Engine) -> None:
    settle(engine, Shares(100, 100))
    rows = semi_pd_memory.host_memory(engine)
    names = sorted(row["name"] for row in rows)
    assert names == [
        "coordinator",
        "decode executor",
        "kept executor",
        "kept executor",
        "prefill executor",
        "storage owner",
    ]
    shared = semi_pd_memory.shared_bytes(engine)
    mapped = sum(row["mapped_gb"] for row in rows) * semi_pd_memory.GB
    # Blocks are whole pages of the host.
    assert 0 < mapped < sum(shared.values()) + 2 * (1 << 16)
    assert all(row["gb"] > 0.005 for row in rows)
    semi_pd_memory.warm_up(engine, 3)
    check_idle(engine)


def test_engines_in_processes_of_their_own() -> None:
    with topologies.EngineProcess(io.StringIO, {"initial_value": "text"}, JPD_TEST="1") as process:
        assert process.call(io.StringIO.read) == "text"
        with pytest.raises(RuntimeError, match="TypeError"):
            process.call(io.StringIO.seek, None)
        with pytest.raises(RuntimeError, match=r"TypeError: cannot pickle .*weakref"):
            process.call(weakref.ref)
        process.call(io.StringIO.seek, 0)
        assert process.call(io.StringIO.read) == "text"
    with (
        pytest.raises(RuntimeError, match=r"TypeError: .*no_such"),
        topologies.EngineProcess(io.StringIO, {"no_such": 1}),
    ):
        pass


def test_an_engine_process_that_is_ended_closes_its_engine(tmp_path) -> None:
    with topologies.EngineProcess(Marked, {"path": str(tmp_path / "closed")}) as process:
        assert process.call(Marked.answer) == 42
        os.kill(process.call(Marked.pid), signal.SIGTERM)
        with pytest.raises(RuntimeError, match="ended, exit code 143"):
            process.call(Marked.answer)
        assert (tmp_path / "closed").exists()


class Marked:
    """Stands in for an engine."""

    def __init__(self, path: str) -> None:
        self.path = path

    def answer(self) -> int:
        return 42

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        open(self.path, "x").close()


def test_every_engine_gets_the_same_sizes() -> None:
    for topology in topologies.TOPOLOGIES:
        args = topologies.engine_args("tiny", topology, **SIZES)
        assert {key: args[key] for key in SIZES} == SIZES
        assert args.get("topology", "unified") == (
            "unified"
            if topology in serving_impls.UNIFIED
            else "disaggregated"
            if topology == "disaggregated"
            else "auto"
            if topology == "auto"
            else "semi_pd"
        )
    kept = topologies.engine_args("tiny", "time_slices", semi_pd={"kept_shares": ()})
    assert kept["semi_pd"] == {"sm_shares": False, "kept_shares": ()}
    assert [t for t in topologies.TOPOLOGIES if topologies.can_switch(t)] == ["semi_pd", "auto"]


def test_the_dynamic_point_aims_at_the_slo(engine: Engine, tmp_path, monkeypatch) -> None:
    steering = semi_pd_serving.Steering(None)
    mode = semi_pd_serving.Steering(None)
    options = SimpleNamespace(controller=steering, break_even=mode, kept_shares=PAIRS)
    seats = {phase: getattr(engine.topology, phase) for phase in ("prefill", "decode")}
    topology = SimpleNamespace(shares=Shares(50, 50), **seats)
    llm = SimpleNamespace(
        config=SimpleNamespace(
            semi_pd=options, max_num_batched_tokens=2048, max_num_mixed_tokens=2000
        ),
        stats=engine.coordinator.stats(),
        _engine=SimpleNamespace(topology=topology, coordinator=engine.coordinator),
    )
    began = []

    def sent(*args: object) -> list:
        if args[2] is None:  # the point's requests
            began.append(topology.shares)
        else:
            topology.shares = steering.inner.decide(Observation(now_s=0), topology.shares)
        return []

    monkeypatch.setattr(semi_pd_serving, "send", sent)
    aim = Slo(0.5, 0.05), 1.5, None
    records, fields = semi_pd_serving.run_point(llm, None, 0, "auto", *aim)
    assert records == []
    counts = ("preemptions", "recompiles", "executors_lost", "mode_changes", "switches")
    counts += ("kv_bytes_sent", "kv_wait_s")
    kept = [list(pair) for pair in PAIRS]
    assert fields == dict.fromkeys(counts, 0) | {"mode": "semi_pd", "kept_shares": kept}
    assert mode.inner.ratio == 1.5
    assert isinstance(steering.inner, SloController)
    assert (steering.inner.slo.ttft_s, steering.inner.max_num_batched_tokens) == (0.5, 2048)
    assert steering.inner.max_num_mixed_tokens == 2000
    assert steering.inner.allowed == [Shares(*pair) for pair in PAIRS]
    semi_pd_serving.run_point(llm, None, 0, "semi_pd_dynamic", *aim)
    assert isinstance(steering.inner, SloController)
    assert mode.inner.decide(None, "unified") == "semi_pd"
    log = tmp_path / "log.jsonl"
    semi_pd_serving.run_point(llm, None, 0, "semi_pd_mean", *aim[:2], log)
    assert steering.inner.decide(Observation(now_s=3.0), FULL) == FULL
    assert steering.inner.inner.slo is None
    assert [decision.observation.now_s for decision in decision_log.read(log)] == [3.0]
    semi_pd_serving.run_point(llm, None, 0, "semi_pd_mean_shortest", *aim)
    assert steering.inner.slo is None
    for impl, shares in (("semi_pd_100_100", (100, 100)), ("semi_pd_70_30_shortest", (70, 30))):
        semi_pd_serving.run_point(llm, None, 0, impl, *aim[:2], log)
        assert isinstance(steering.inner, decision_log.LoggedController)
        steering.inner = steering.inner.inner
        assert mode.inner.decide(None, "unified") == "semi_pd"
        assert steering.inner.decide(None, Shares(50, 50)) == Shares(*shares)
    assert began == [FULL] * 5 + [Shares(70, 30)]
    mode.inner = semi_pd_serving.Held()
    semi_pd_serving.run_point(llm, None, 0, "auto_mean_shortest", *aim)
    assert (steering.inner.slo, mode.inner.ratio, began[-1]) == (None, 1.5, FULL)
    semi_pd_serving.run_point(llm, None, 0, "auto_mean_512_shortest", *aim)
    assert (steering.inner.slo, steering.inner.max_num_mixed_tokens) == (None, 512)
    semi_pd_serving.run_point(llm, None, 0, "auto", aim[0], None, log)  # by the controller's word
    monkeypatch.setattr(SloController, "decide_mode", lambda self, *seen: (self, *seen))
    told = mode.inner.decide("seen", "unified")
    assert told == (steering.inner.inner, "seen", "unified")
    topology.shares = Shares(70, 30)
    monkeypatch.setattr(semi_pd_serving, "send", lambda *args: [])
    monkeypatch.setattr(semi_pd_serving, "SETTLE_S", 0.01)
    with pytest.raises(TimeoutError, match=r"auto: not under \(100, 100\) .* but \(70, 30\)"):
        semi_pd_serving.run_point(llm, None, 0, "auto", *aim)
