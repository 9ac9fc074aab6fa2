"""Runs a baseline in a process of its own and takes over its rows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.report import Report
from benchmarks.rows import load


def run_peer(
    report: Report,
    module: str,
    args: Sequence[str],
    expected: Iterable[tuple[str, str]],
    *,
    timeout_s: float = 300,
) -> None:
    """Adds the rows of `benchmarks.baselines.<module>`.

    A baseline writes its file after every case, with the cases that it did not reach as failed
    rows, so that one that is stopped still leaves what it measured.

    Args:
        report: gets the rows.
        module: name of the baseline.
        args: its command line, without `--json`.
        expected: (case, impl) of the rows that it should leave; failed rows if it leaves none.
        timeout_s: the process is killed after that long.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{module}.json"
        command = [sys.executable, "-m", f"benchmarks.baselines.{module}", *args]
        try:
            done = subprocess.run(
                [*command, "--json", str(file)],
                env=os.environ | {"FLASHINFER_NO_DOWNLOAD": "1"},
                check=False,
                timeout=timeout_s,
            )
            reason = f"the baseline exited with {done.returncode} and left no result"
        except subprocess.TimeoutExpired:
            reason = f"the baseline was stopped after {timeout_s:.0f} s and left no result"
        if file.exists():
            report.extend(load(file)["rows"])
        else:
            for case, impl in expected:
                report.fail(case, impl, reason)
