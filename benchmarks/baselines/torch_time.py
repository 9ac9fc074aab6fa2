"""Device times of torch operations: a CUDA graph over rotated operands, timed by events.

The twin of `benchmarks/device_time.py`, which explains the method; the numbers are the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report
from benchmarks.rows import NOT_REACHED, failed_row, write

ROTATED_BYTES = 400_000_000
WARM_S, MIN_SAMPLE_S = 0.04, 0.02
"""Replays ahead of a sample and of the sample itself, without a pause between them: after a rest
the clocks are higher for a while."""
SAMPLES = 5


def rotations(nbytes: int, *, least: int = 8, most: int = 64) -> int:
    """Operand sets that together exceed :data:`ROTATED_BYTES`, `nbytes` each."""
    return min(most, max(least, -(-ROTATED_BYTES // nbytes)))


def call_us(calls: Sequence[Callable[[], Any]], *, samples: int = SAMPLES) -> list[float]:
    """Samples in µs a call of these calls, one after another.

    On a CPU (to see that a baseline works) the host's time of one pass over the calls.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        return [(time.perf_counter() - start) * 1e6 / len(calls)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, tunes and allocates outside the graph
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # so that no two calls share their output's memory
    graph.replay()

    def replay_s(runs: int, warm: int = 0) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(warm):
            graph.replay()
        start.record()
        for _ in range(runs):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    runs = 3
    for _ in range(2):
        runs = max(1, round(MIN_SAMPLE_S * runs / replay_s(runs)))
    warm = round(runs * WARM_S / MIN_SAMPLE_S)
    times = [replay_s(runs, warm) * 1e6 / (runs * len(calls)) for _ in range(samples)]
    del kept
    return times


def best_mode(
    modes: dict[str, Callable[[], tuple[Sequence[Callable[[], Any]], float]]], limit: float
) -> tuple[str, list[float], float]:
    """Times every mode of an implementation in short, then the fastest one in full.

    Args:
        modes: by name, functions that make the calls and check them: (calls, relative error).
        limit: largest relative error of a mode that counts.

    Returns:
        Name, samples in µs, and relative error of the fastest mode.

    Raises:
        RuntimeError: no mode works; with the reason of each.
    """
    reasons: list[str] = []
    found: list[tuple[float, str, Sequence[Callable[[], Any]], float]] = []
    for name, make in modes.items():
        try:
            calls, error = make()
            if not error <= limit:
                raise RuntimeError(f"relative error {error:.2e} > {limit:.0e}")
            found.append((statistics.median(call_us(calls, samples=1)), name, calls, error))
        except Exception as problem:  # the other modes may do
            reasons.append(f"{name}: {type(problem).__name__} {problem}"[:160])
    if not found:
        raise RuntimeError("; ".join(reasons))
    _, name, calls, error = min(found, key=lambda entry: entry[0])
    return name, call_us(calls), error


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest ‖got − want‖ / ‖want‖ of any row (first axis)."""
    got, want = got.flatten(1).float(), want.flatten(1).float()
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()


class Rows:
    """Rows of a baseline, written to a file after each; those not reached count as failed."""

    def __init__(self, name: str, keys: Sequence[tuple[str, str]], file: Path | None) -> None:
        self._report = Report(name, f"How fast is {name}?")
        self._report.rows = [failed_row(case, impl, NOT_REACHED) for case, impl in keys]
        self._index = {key: i for i, key in enumerate(keys)}
        self._file = file
        self._write()

    def set(self, row: dict[str, Any]) -> None:
        """Puts a row in its place."""
        self._report.rows[self._index[row["case"], row["impl"]]] = row
        self._write()

    def _write(self) -> None:
        if self._file is not None and self._report.rows:
            write(self._report.document(), self._file)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows."""
        return self._report.rows

    def finish(self) -> int:
        """Prints the table; returns the exit status."""
        self._report.show()
        return 1 if self._report.failures else 0
