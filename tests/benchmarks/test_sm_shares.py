"""The processes of `benchmarks.sm_shares`: when they run, and what is left of those that do not.

The children are fakes: they note what they do and when, and end as they are told to.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks import sm_shares
from benchmarks.budget import Budget
from benchmarks.report import Report
from benchmarks.rows import load

ROOT = Path(benchmarks.__file__).parents[1]
NAMES = ["norm", "product"]
FAKE = """
import json, os, pathlib, sys, time

share, file, how, with_model = int(sys.argv[1]), pathlib.Path(sys.argv[2]), *sys.argv[3:]

def note(what):
    with file.with_name("notes").open("a") as notes:
        notes.write(json.dumps([share, what, time.monotonic()]) + chr(10))

def end_if(when):
    if how == "dies " + when:
        sys.exit("boom")
    if how == "hangs " + when:
        time.sleep(600)

found = {"checked": {"norm": 0.001}, "rows": {}, "model": None}
file.write_text(json.dumps(found))
end_if("preparing")
if how == "slow":
    time.sleep(1)
found["checked"]["product"] = 0.002
if with_model == "True":
    found["model"] = {"tokens": [[1, 2]], "logprobs": [[-1.0, -1.0]]}
file.write_text(json.dumps(found))
note("ready")
file.with_suffix(".ready").touch()
if how == "dies waiting":
    os._exit(3)
sys.stdin.readline() or os._exit(1)
note("begin")
for name, error in found["checked"].items():
    found["rows"][name] = {
        **dict.fromkeys(["bytes", "flops", "pct_of_bound"]), "case": f"{name} @ {share} %",
        "impl": "jpd", "us": 5.0, "p10": 5.0, "p90": 5.0, "n": 1, "rel_err": error,
        "share": share, "status": "ok",
    }
    file.write_text(json.dumps(found))
    end_if("timing")
    time.sleep(0.1)
if found["model"]:
    found["model"]["step_us"] = 9.0
    file.write_text(json.dumps(found))
note("end")
"""


class Fakes(sm_shares.Children):
    """Children that end as `how` says, by their shares."""

    def __init__(self, args, how, budget):
        super().__init__(args, None, budget)
        self.how, self.budget = how, budget

    def start(self, share, file):
        how, model = self.how.get(share, "well"), str(share in self.with_model)
        command = [sys.executable, "-c", FAKE, str(share), str(file), how, model]
        return sm_shares.Child(command, dict(os.environ), file, None, self.budget)


def run(folder, shares, how=(), *, budget=None, no_model=False):
    """(rows by case, notes) of one batch."""
    args = argparse.Namespace(no_model=no_model, model_shares=None, shares=shares)
    report = Report("sm_shares", "?", out=folder)
    report.summarise = sm_shares.summarise
    children = Fakes(args, dict(how), budget or Budget())
    sm_shares.run_batch(report, children, folder, shares, NAMES, None)
    notes = folder / "notes"
    found = list(map(json.loads, notes.read_text().splitlines())) if notes.exists() else []
    assert len({row["case"] for row in report.rows}) == len(report.rows)
    return {row["case"]: row for row in report.rows}, found


def status(rows, share):
    return [rows[f"{name} @ {share} %"]["status"] for name in (*NAMES, "model step")]


RIGHT = ["ok"] * 3
HUNG = f"failed: hung: {sm_shares.NOT_TIMED}"


def test_one_times_at_a_time_and_when_all_are_ready(tmp_path):
    shares = (100, 50, 10)
    rows, notes = run(tmp_path, shares, {10: "slow"})
    assert all(status(rows, share) == RIGHT for share in shares)
    ready = [at for _, what, at in notes if what == "ready"]
    timed = [note for note in notes if note[1] != "ready"]
    assert max(ready) < min(at for *_, at in timed)
    timed.sort(key=lambda note: note[2])
    assert [note[:2] for note in timed] == [
        [share, what] for share in shares for what in ("begin", "end")
    ]
    assert len(ready) == len(shares)


def test_one_that_dies_while_it_prepares_costs_its_own_rows_only(tmp_path):
    rows, _ = run(tmp_path, (100, 50, 10), {50: "dies preparing"})
    assert status(rows, 100) == status(rows, 10) == RIGHT
    assert status(rows, 50) == [
        f"failed: boom: {sm_shares.NOT_TIMED}", "failed: boom", "failed: boom",
    ]  # fmt: skip
    assert rows["norm @ 50 %"]["rel_err"] == 0.001


def test_one_that_hangs_while_it_prepares_is_stopped_and_the_others_may_wait_longer(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sm_shares, "PREPARE_TIMEOUT_S", 5)
    rows, notes = run(tmp_path, (100, 50), {50: "hangs preparing"})
    assert status(rows, 100) == RIGHT
    assert status(rows, 50) == [HUNG, "failed: hung", "failed: hung"]
    at = {what: at for share, what, at in notes if share == 100}
    assert at["begin"] - at["ready"] > 3


def test_one_that_hangs_while_it_times_keeps_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(sm_shares, "TIMED_TIMEOUT_S", 3)
    rows, notes = run(tmp_path, (100, 50, 10), {100: "hangs timing"})
    # Its tokens are there all the same: the others are compared with them.
    assert status(rows, 50) == status(rows, 10) == RIGHT
    assert status(rows, 100) == ["ok", HUNG, HUNG]
    assert rows["product @ 100 %"]["rel_err"] == 0.002
    began = {share: at for share, what, at in notes if what == "begin"}
    assert began[50] - began[100] > 2.9
    assert sm_shares.summarise([*rows.values()])["hangs"] == 1


def test_one_that_dies_while_it_waits_or_times(tmp_path):
    rows, _ = run(tmp_path, (100, 50, 10), {50: "dies waiting", 10: "dies timing"})
    died = f"failed: exited with 3: {sm_shares.NOT_TIMED}"
    assert status(rows, 100) == RIGHT
    assert status(rows, 50) == [died] * 3
    died = f"failed: boom: {sm_shares.NOT_TIMED}"
    assert status(rows, 10) == ["ok", died, died]


def test_without_tokens_on_all_sms_no_model_is_compared(tmp_path):
    rows, _ = run(tmp_path, (100, 50), {100: "dies preparing"})
    assert status(rows, 50) == ["ok", "ok", f"not run: {sm_shares.NO_WHOLE}"]


def test_without_models_there_is_no_row_of_one(tmp_path):
    rows, _ = run(tmp_path, (50,), no_model=True)
    assert {*rows} == {f"{name} @ 50 %" for name in NAMES}


@pytest.mark.parametrize("how", ["hangs preparing", "hangs timing"])
def test_what_the_time_of_the_run_cut_short_was_not_run(tmp_path, how):
    budget = Budget(3)
    rows, _ = run(tmp_path, (100,), {100: how}, budget=budget)
    assert {row["status"] for row in rows.values()} <= {"ok", "not run: out of time"}
    assert rows["model step @ 100 %"]["status"] == "not run: out of time"
    assert budget.left_s == 0


def test_no_process_is_left_when_the_parent_fails(tmp_path, monkeypatch):
    started = []
    really = subprocess.Popen

    def popen(*args, **options):
        started.append(really(*args, **options))
        return started[-1]

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sm_shares.subprocess, "Popen", popen)
    monkeypatch.setattr(sm_shares.Child, "finish", fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, (100, 50))
    assert [process.poll() is None for process in started] == [False, False]


@pytest.mark.parametrize("go", [True, False])
def test_a_child_waits_until_it_may_time_or_the_parent_is_gone(tmp_path, go):
    code = "import sys; from pathlib import Path; from benchmarks.share_worker import wait_for_go; "
    code += "wait_for_go(Path(sys.argv[1])); sys.exit(7)"
    command = [sys.executable, "-c", code, str(tmp_path / "share50.json")]
    text = "go\n" if go else ""
    done = subprocess.run(command, cwd=ROOT, input=text, text=True, check=False, timeout=600)
    assert done.returncode == (7 if go else 1)
    assert (tmp_path / "share50.ready").exists()


def test_batches_begin_while_there_is_time(tmp_path, monkeypatch):
    budget, begun = Budget(), []
    results = iter([{"tokens": []}, None])
    report = Report("sm_shares", "?", out=tmp_path)

    def batch(report, children, folder, shares, names, whole):
        begun.append((shares, whole))
        budget.enough = lambda: len(begun) < 2
        return next(results)

    monkeypatch.setattr(sm_shares, "run_batch", batch)
    monkeypatch.setattr(sm_shares.share_problems, "save", lambda *_: None)
    args = argparse.Namespace(
        quick=True, problems=tmp_path, shares=[100, 50, 10, 90, 20], at_once=2, no_peers=True,
        no_model=False, model_shares=None,
    )  # fmt: skip
    sm_shares.run_shares(report, None, args, budget)
    assert begun == [((100, 50), None), ((10, 90), {"tokens": []})]


def test_quick_mode_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.sm_shares", "--quick", "--no-peers"]
    command += ["--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    rows = load(tmp_path / "sm_shares.json")["rows"]
    names = [*sm_shares.problems_of(quick=True), sm_shares.MODEL]
    assert [row["case"] for row in rows] == [f"{name} @ 100 %" for name in names]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["us"] > 0 for row in rows)
    assert rows[-1]["tokens_agree"] == 1.0
