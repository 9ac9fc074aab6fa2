"""Runs that end early, are killed, or continue an earlier file: what their results say."""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import benchmarks
from benchmarks import decode_step, device_time, flat_gemm, gemm_cases, gemm_runs, merging, peers
from benchmarks import report as report_module
from benchmarks.attention_cases import DECODE, Decode, select
from benchmarks.budget import Budget, spread
from benchmarks.gemm_cases import in_rounds
from benchmarks.options import add_bounds, planned
from benchmarks.ratios import put
from benchmarks.report import Report
from benchmarks.rows import NOT_REACHED, failed_row, load, make_row, skipped_row, write

ROOT = Path(benchmarks.__file__).parents[1]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def row(case, impl, us, **extra):
    return make_row(case, impl, [us], "us", **extra)


# --- time -----------------------------------------------------------------------------------


def test_no_case_is_begun_that_may_not_end_in_time():
    clock = Clock()
    budget = Budget(30, clock=clock)
    took = []
    for seconds in (5, 9, 2, 9, 9):
        if not budget.enough():
            break
        with budget.case():
            clock.now += seconds
        took.append(seconds)
    # 14 s were left after the third, 5 s after the fourth: less than the 9 s of the longest.
    assert took == [5, 9, 2, 9]
    assert budget.left_s == 5
    assert budget.longest_s == 9


def test_a_case_that_fails_counts_with_its_time():
    clock = Clock()
    budget = Budget(10, clock=clock)
    with contextlib.suppress(ValueError), budget.case():
        clock.now += 6
        raise ValueError("wrong")
    assert not budget.enough()


def test_without_a_limit_there_is_always_time():
    budget = Budget(None)
    assert budget.enough()
    assert budget.limit_s(300, 0.5) == 300
    assert not Budget(0, clock=Clock()).enough()


def test_a_limit_is_a_share_of_what_is_left():
    clock = Clock()
    budget = Budget(100, clock=clock)
    assert budget.limit_s(300, 0.5) == 50
    assert budget.limit_s(20, 0.5) == 20
    clock.now += 200
    assert budget.limit_s(300) == 0


@given(st.lists(st.integers(), unique=True))
def test_spread_keeps_every_value(values):
    assert sorted(spread(values)) == sorted(values)


def test_any_beginning_of_a_spread_covers_the_range():
    order = spread(range(100, 5, -5))
    assert order[:3] == [100, 10, 55]
    for count in range(2, 19):
        seen = sorted(order[:count])
        gaps = [b - a for a, b in itertools.pairwise(seen)]
        assert max(gaps) <= 2 * (90 / (count - 1)) + 5


def test_products_come_in_rounds_of_all_shapes():
    shapes = gemm_cases.shapes("llama2-7b")
    cases = in_rounds(shapes, spread(flat_gemm.ROWS))
    assert len(cases) == len(set(cases)) == len(shapes) * len(flat_gemm.ROWS)
    first = cases[: 2 * len(shapes)]
    assert {case[1:] for case in first} == set(shapes)
    assert {case.rows for case in first} == {1, 128}
    assert first[0][1:] == first[1][1:]


def test_selected_cases_come_in_the_order_of_their_names():
    assert select(DECODE, ["B=8 32/8 S=8192", "B=1 32/32 S=512"]) == [
        Decode(8, 32, 8, 8192),
        Decode(1, 32, 32, 512),
    ]


# --- rows that are missing ------------------------------------------------------------------


def test_what_was_not_run_is_in_the_file_and_claims_nothing(tmp_path):
    report = Report("x", "?", out=tmp_path)
    report.cases = ["a", "b", "c"]
    report.expect((case, impl) for case in "abc" for impl in ("ours", "peer"))
    report.add("b", "ours", [1.0], "us")
    report.add("b", "peer", [2.0], "us")
    report.add("a", "ours", [1.0], "us")
    report.summarise = lambda rows: {"measured": sum(r["status"] == "ok" for r in rows)}
    report.save()
    saved = load(report.path)
    assert saved["rows"][-1]["status"] == "not run: the run had not come to it"
    assert saved["summary"] == {"cases": "1 of 3", "measured": 3}
    doc = load(report.finish())
    assert [(r["case"], r["impl"]) for r in doc["rows"]] == [
        ("a", "ours"), ("a", "peer"), ("b", "ours"), ("b", "peer"), ("c", "ours"), ("c", "peer"),
    ]  # fmt: skip
    assert {r["status"] for r in doc["rows"]} == {"ok", "not run: out of time"}
    assert report.failures == 0
    assert "runs" not in doc
    assert not list(tmp_path.glob("*.part"))


def test_a_mean_of_some_cases_says_so():
    summary = {}
    put(summary, "all", {"a": 2.0, "b": 2.0}, of=2)
    put(summary, "some", {"a": 2.0}, of=2)
    assert summary == {"all": 2.0, "some_over": "1 of 2", "some": 2.0}


def test_flat_summary_of_a_part_is_marked():
    cases = in_rounds(gemm_cases.shapes("llama2-7b"), (1, 8, 128))
    rows = []
    for case in cases[:3]:
        rows += [row(case.name, "jpd", 1.0), row(case.name, "cublas", 2.0)]
    summary = flat_gemm.summarise(rows, cases)
    small = sum(case.rows <= 64 for case in cases[:3])
    assert summary["geomean_vs_cublas_m_le_64_over"] == f"{small} of 8"
    for case in cases[3:]:
        rows += [row(case.name, "jpd", 1.0), row(case.name, "cublas", 2.0)]
    summary = flat_gemm.summarise(rows, cases)
    assert summary["geomean_vs_cublas_m_le_64"] == pytest.approx(2.0)
    assert not [key for key in summary if key.endswith("_over")]


def test_a_killed_run_leaves_what_it_measured(tmp_path):
    code = f"""
        import os, pathlib, signal
        from benchmarks.report import Report
        report = Report("x", "?", out=pathlib.Path({str(tmp_path)!r}))
        report.cases = ["a", "b"]
        report.expect([("a", "ours"), ("b", "ours")])
        report.summarise = lambda rows: {{"n": len(rows)}}
        report.add("a", "ours", [1.0], "us")
        report.save()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=600).returncode == -9
    doc = load(tmp_path / "x.json")
    assert [r["status"] for r in doc["rows"]] == ["ok", "not run: the run had not come to it"]
    assert doc["summary"] == {"cases": "1 of 2", "n": 2}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    report = Report("x", "?", out=tmp_path)
    report.add("a", "ours", [1.0], "us")
    report.save()
    before = report.path.read_text()
    report.add("b", "ours", [1.0], "us")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        report.save()
    assert report.path.read_text() == before


# --- several runs in one file ---------------------------------------------------------------


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_bounds(parser)
    return parser.parse_args(words)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes reports of one benchmark, each of another commit."""
    commits = iter("abcdef")
    monkeypatch.setattr(report_module, "git_commit", lambda: next(commits))

    def new(folder="out"):
        return Report("x", "?", out=tmp_path / folder)

    return new


def plan(report, *words, chosen="abc"):
    cases = [SimpleNamespace(name=name) for name in chosen]
    report.summarise = lambda rows: {"n": sum(r["status"] == "ok" for r in rows)}
    todo = planned(report, arguments(*words), cases, [SimpleNamespace(name=n) for n in "abc"])
    return [case.name for case in todo]


def measure(report, cases, us):
    for case in cases:
        report.add(case, "ours", [us], "us")
        report.add(case, "peer", [us + 1], "us")


def times(doc):
    return {(r["case"], r["impl"]): r.get("us") for r in doc["rows"]}


def test_runs_fill_one_file(make):
    first = make()
    assert plan(first) == ["a", "c", "b"]
    first.expect([(case, "ours") for case in "abc"])
    measure(first, "a", 1.0)
    first.add("c", "peer", [9.0], "us")  # its process ended before ours had its turn
    first.finish()
    second = make()
    assert plan(second, "--missing") == ["b", "c"]
    measure(second, "c", 2.0)
    doc = load(second.finish())
    # b is "not run" from the first run; a of the first and c of the second run are whole.
    assert times(doc) == {
        ("a", "ours"): 1.0, ("a", "peer"): 2.0, ("b", "ours"): None,
        ("c", "ours"): 2.0, ("c", "peer"): 3.0,
    }  # fmt: skip
    assert doc["summary"] == {"cases": "2 of 3", "n": 4}
    assert [run["git"] for run in doc["runs"]] == ["a", "b"]
    assert [r.get("run") for r in doc["rows"]] == [0, 0, None, 1, 1]
    assert doc["git"] == "b"
    third = make()
    assert plan(third, "--missing") == ["b"]
    measure(third, "b", 3.0)
    doc = load(third.finish())
    assert [r["run"] for r in doc["rows"]] == [0, 0, 2, 2, 1, 1]
    assert doc["summary"] == {"cases": "3 of 3", "n": 6}


def test_a_case_comes_from_one_run(make):
    first = make()
    plan(first)
    measure(first, "abc", 1.0)
    first.finish()
    second = make()
    assert plan(second, "--merge", chosen="a") == ["a"]
    second.expect([("a", "ours"), ("b", "ours"), ("b", "peer")])
    second.add("a", "ours", [5.0], "us")  # no peer this time: the peer of the first run is gone
    second.add("b", "peer", [7.0], "us")  # not whole: the first run's stays
    doc = load(second.finish())
    found = times(doc)
    assert found["a", "ours"] == 5.0
    assert ("a", "peer") not in found
    assert (found["b", "ours"], found["b", "peer"]) == (1.0, 2.0)


def test_when_every_case_is_new_nothing_is_left_of_the_old_run(make):
    first = make()
    plan(first)
    measure(first, "abc", 1.0)
    first.finish()
    second = make()
    plan(second, "--merge")
    measure(second, "abc", 2.0)
    doc = load(second.finish())
    assert "runs" not in doc
    assert doc["git"] == "b"
    assert not any("run" in r for r in doc["rows"])


def test_files_can_be_merged_where_nothing_is_measured(make, tmp_path):
    files = []
    for name, us in (("a", 1.0), ("b", 2.0)):
        report = make(name)
        report.env = report.env | {"gpu": "NVIDIA H200"}
        plan(report, chosen="abc")
        measure(report, name, us)
        report.summary["copy_bytes_per_s"] = 4e12
        files.append(str(report.finish()))
    merged = make()
    assert merged.env["gpu"] != "NVIDIA H200"
    plan(merged, "--seconds", "0", "--merge", *files)
    merged.expect([("c", "ours")])
    doc = load(merged.finish())
    assert times(doc)["b", "peer"] == 3.0
    assert doc["env"]["gpu"] == "NVIDIA H200"
    assert [run["git"] for run in doc["runs"]] == ["a", "b"]
    assert doc["summary"] == {"copy_bytes_per_s": 4e12, "cases": "2 of 3", "n": 4}
    assert doc["rows"][-1]["status"] == "not run: out of time"
    # ... but not measured on another machine.
    with pytest.raises(ValueError, match="cannot merge rows of 'NVIDIA H200'"):
        plan(make(), "--merge", *files)


def test_other_questions_are_not_merged(make, tmp_path):
    other = Report("y", "something else?", out=tmp_path)
    other.add("a", "ours", [1.0], "us")
    with pytest.raises(ValueError, match="its question is 'something else"):
        plan(make(), "--merge", str(other.finish()))


def test_a_file_that_is_not_there_is_not_merged(make, tmp_path, capsys):
    with pytest.raises(SystemExit):
        plan(make(), "--merge", str(tmp_path / "nothing.json"))
    assert "nothing.json: there is no such file" in capsys.readouterr().err


def test_a_row_of_no_run_is_refused(make):
    report = make()
    report.add("a", "ours", [1.0], "us")
    doc = json.loads(report.finish().read_text())
    doc["rows"][0]["run"] = 3
    write(doc, report.path)
    with pytest.raises(ValueError, match="no run 3"):
        load(report.path)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.booleans())),
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.booleans())),
)
def test_no_case_is_lost_or_mixed(old, new):
    def rows(keys, run):
        done = {(case, impl): ok for case, impl, ok in keys}
        return [
            (row(c, i, 1.0) if ok else skipped_row(c, i)) | {"run": run}
            for (c, i), ok in done.items()
        ]

    before, after = rows(old, 0), rows(new, 1)
    found = merging.by_case(merging.replace(before, after))
    assert found.keys() == {r["case"] for r in [*before, *after]}
    for case, some in found.items():
        assert len({r["run"] for r in some}) == 1
        was = merging.complete(merging.by_case(before).get(case, []))
        now = merging.complete(merging.by_case(after).get(case, []))
        assert merging.complete(some) == (was or now)
        assert not now or some[0]["run"] == 1


# --- baselines ------------------------------------------------------------------------------


@pytest.fixture
def stopped_peer(tmp_path, monkeypatch):
    """A baseline that is stopped after its first case; returns the limits that it got."""
    limits, really = [], subprocess.run

    def run(command, *, timeout, **options):
        if "--json" not in command:  # what asks for the GPU's name
            return really(command, timeout=timeout, **options)
        limits.append(timeout)
        file = Path(command[command.index("--json") + 1])
        report = Report("peer", "?", out=tmp_path)
        report.rows = [row("a", "peer", 1.0), failed_row("b", "peer", NOT_REACHED)]
        write(report.document(), file)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(peers.subprocess, "run", run)
    return limits


KEYS = [("a", "peer"), ("b", "peer")]


def test_a_baseline_that_takes_the_run_s_time_was_not_run(tmp_path, stopped_peer):
    report = Report("x", "?", out=tmp_path)
    clock = Clock()
    peers.run_peer(report, "p", [], KEYS, timeout_s=300, budget=Budget(100, clock=clock))
    assert stopped_peer == [50]
    assert [r["status"] for r in report.all_rows()] == ["ok", "not run: out of time"]
    assert load(report.path)["rows"][0]["us"] == 1.0


def test_a_baseline_that_takes_longer_than_its_own_limit_failed(tmp_path, stopped_peer):
    report = Report("x", "?", out=tmp_path)
    peers.run_peer(report, "p", [], KEYS, timeout_s=7, budget=Budget(100, clock=Clock()))
    assert stopped_peer == [7]
    assert report.all_rows()[1]["status"] == "failed: the baseline was stopped after 7 s"


def test_without_time_no_baseline_is_started(tmp_path, stopped_peer):
    report = Report("x", "?", out=tmp_path)
    peers.run_peer(report, "p", [], KEYS, budget=Budget(0, clock=Clock()))
    assert stopped_peer == []
    assert {r["status"] for r in report.all_rows()} == {"not run: out of time"}


# --- compiling ahead and measuring ----------------------------------------------------------


def add_chains(lowered, count):
    def make(i):
        lowered.append(i)
        if i == 2:
            raise NotImplementedError("not this one")
        x = jnp.full((2,), float(i))
        return device_time.Chain(lambda a, b: a + b, x, x, 1)

    return {i: (lambda i=i: make(i)) for i in range(count)}


@pytest.mark.parametrize("searches", [False, True])
def test_chains_are_compiled_in_order_and_not_all_at_once(searches):
    lowered = []
    x = jnp.ones((2,))
    with device_time.CompileAhead(add_chains(lowered, 9), searches=searches, ahead=3) as ahead:
        compiled = ahead.take(0)
        assert float(compiled.first_output(x, [x])[0]) == 2.0
        so_far = [*lowered]
        assert so_far == [*range(len(so_far))]
        assert 1 <= len(so_far) <= 4
        assert isinstance(ahead.take(1), device_time.Compiled)
        assert isinstance(ahead.take(2), NotImplementedError)
        assert len(lowered) < 9
        assert isinstance(ahead.take(7), device_time.Compiled)
        with pytest.raises(KeyError):
            ahead.take(7)


def test_what_is_called_beside_chains_is_compiled_once_and_ahead_of_them():
    called = []
    x = jnp.ones((2,))
    chains = {
        (case, i): partial(device_time.Chain, jnp.add, x, x, 1) for case in "ab" for i in (0, 1)
    }
    beside = {case: [partial(called.append, case)] for case in "abc"}
    with device_time.CompileAhead(chains, ahead=1, beside=beside) as ahead:
        ahead.take(("a", 0))
        assert called[0] == "a"
        ahead.take(("a", 1))
        ahead.take(("b", 0))
    assert called == ["a", "b"]


class TickingBudget(Budget):
    """Every case takes a second."""

    def __init__(self, seconds):
        self.ticks = Clock()
        super().__init__(seconds, clock=self.ticks)

    def enough(self):
        self.ticks.now += 1
        return super().enough()


def test_products_are_measured_until_the_time_is_over(tmp_path):
    report = Report("x", "?", out=tmp_path)
    cases = in_rounds([(16, 32), (32, 16)], (1, 2, 3))
    report.cases = [case.name for case in cases]
    gemm_runs.run(report, cases, lambda case: ("xla",), names={}, budget=TickingBudget(4), calls=2)
    done = [r["case"] for r in report.rows]
    assert done == [case.name for case in cases[:3]]
    assert all(r["status"] == "ok" for r in report.rows)
    saved = load(report.path)
    assert saved["summary"]["cases"] == "3 of 6"
    assert [r["case"] for r in saved["rows"]] == report.cases


# --- decode_step ----------------------------------------------------------------------------


def test_shapes_of_decode_steps():
    assert decode_step.parse_shape("8:1024") == (8, 1024)
    for text, complaint in (("8", "not BATCH:CONTEXT"), ("0:512", "at least 1"), ("1:20", "21")):
        with pytest.raises(argparse.ArgumentTypeError, match=complaint):
            decode_step.parse_shape(text)


def test_decode_step_summary_names_the_benchmark_s_own_cases():
    rows = [
        make_row("llama2-7b B=1 S=512", "jpd", [4.0], nbytes=8e9, flops=1),
        make_row("llama2-7b B=1 S=512", "hf_eager", [12.0], nbytes=8e9, flops=1),
        make_row("llama2-7b B=1 S=512", "jpd_xla", [6.0], nbytes=8e9, flops=1),
        make_row("llama2-7b B=1 S=4096", "jpd", [5.0], nbytes=8e9, flops=1),
        skipped_row("llama2-7b B=8 S=512", "jpd"),
    ]
    shapes = {"llama2-7b": [(1, 512), (8, 512), (1, 4096)]}
    summary = decode_step.summarise(rows, shapes, 4e12)
    assert summary == {
        "ms_b1": 4.0,
        "pct_of_bound_b1": pytest.approx(50.0),
        "speedup_vs_hf_eager_b1": 3.0,
        "speedup_vs_xla_b1": 1.5,
        "ms_b1_s4096": 5.0,
        "pct_of_bound_b1_s4096": pytest.approx(40.0),
    }


def test_the_command_lines_of_bounded_runs_are_checked():
    for words, complaint in (
        (["flat_gemm", "--shapes", "7x7"], "'7x7' is none of"),
        (["flat_gemm", "--seconds", "-1"], "0 or more"),
        (["decode_step", "--hf", "none", "eager"], "goes with nothing else"),
        (["flat_gemm", "--models", "llama2-7b", "--shapes", "6144x4096"], "has none of"),
    ):
        command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]]
        done = subprocess.run(
            command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 2
        assert complaint in done.stderr


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("flat_gemm", 120),
        ("dense_gemm", 42),
        ("dataflow", 18),
        ("decode_attention", 21),
        ("prefill_attention", 15),
        ("decode_step", 6),
        ("sm_shares", None),
    ],
)
def test_a_run_without_time_writes_every_case_as_not_run(name, total, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--seconds", "0", "--out"]
    subprocess.run([*command, str(tmp_path)], cwd=ROOT, check=True, timeout=600)
    doc = load(tmp_path / f"{name}.json")
    assert {r["status"] for r in doc["rows"]} == {"not run: out of time"}
    done, _, cases = doc["summary"]["cases"].partition(" of ")
    assert int(done) == 0
    assert len({r["case"] for r in doc["rows"]}) == int(cases)
    assert total is None or int(cases) == total
