"""Runs a baseline in a process of its own and takes over its rows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.budget import Budget
from benchmarks.options import PEER_SECONDS
from benchmarks.report import Report
from benchmarks.rows import NOT_REACHED, failed_row, load


def run_peer(
    report: Report,
    module: str,
    args: Sequence[str],
    expected: Iterable[tuple[str, str]],
    *,
    timeout_s: float = PEER_SECONDS,
    budget: Budget | None = None,
    share: float = 0.5,
) -> None:
    """Adds the rows of `benchmarks.baselines.<module>`.

    A baseline writes its file after every case, with the cases that it did not reach as failed
    rows, so that one that is stopped still leaves what it measured. What it did not reach because
    the time of the whole run was short is "not run".

    Args:
        report: gets the rows.
        module: name of the baseline.
        args: its command line, without `--json`.
        expected: (case, impl) of the rows that it should leave; failed rows if it leaves none.
        timeout_s: the process is killed after that long.
        budget: the run's.
        share: of the time that is left, the most that it may take.
    """
    expected = list(expected)
    report.expect(expected)
    limit_s = timeout_s if budget is None else budget.limit_s(timeout_s, share)
    if limit_s <= 0 or not expected:
        return
    stopped: str | None = None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{module}.json"
        command = [sys.executable, "-m", f"benchmarks.baselines.{module}", *args]
        try:
            done = subprocess.run(
                [*command, "--json", str(file)],
                env=os.environ | {"FLASHINFER_NO_DOWNLOAD": "1"},
                check=False,
                timeout=limit_s,
            )
            reason = f"the baseline exited with {done.returncode} and left no result"
        except subprocess.TimeoutExpired:
            stopped = f"the baseline was stopped after {limit_s:.0f} s"
            reason = f"{stopped} and left no result"
        rows = load(file)["rows"] if file.exists() else []
    out_of_time = stopped is not None and limit_s < timeout_s
    if not rows and not out_of_time:
        for case, impl in expected:
            report.fail(case, impl, reason)
    for row in rows:
        if stopped is None or row["status"] != f"failed: {NOT_REACHED}":
            report.extend([row])
        elif not out_of_time:
            report.extend([failed_row(row["case"], row["impl"], stopped)])
    report.save()
