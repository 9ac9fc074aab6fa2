"""Request lengths and arrival times from published traces (see data/README.md)."""

from __future__ import annotations

import csv
import io
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np

AZURE_CONV = Path(__file__).parent / "data" / "azure2023_conv.csv.xz"


class TracedRequest(NamedTuple):
    """One request of a trace; `timestamp_s` counts from the trace's first row."""

    timestamp_s: float
    prompt_tokens: int
    output_tokens: int


class Workload(NamedTuple):
    """Requests in order of arrival, and how many rows were passed over for their length.

    A result measured on a workload should name `left_out`: leaving long requests out makes the
    remaining ones look easier than the trace is.
    """

    requests: list[TracedRequest]
    left_out: int


def _read(path: Path) -> list[TracedRequest]:
    with lzma.open(path, "rt", newline="") as file:
        rows = list(csv.DictReader(io.StringIO(file.read())))
    # Stamps have seven decimals (100 ns), one more than datetime keeps.
    stamps = np.array([row["TIMESTAMP"] for row in rows], dtype="datetime64[ns]")
    seconds = (stamps - stamps[0]) / np.timedelta64(1, "s")
    return [
        TracedRequest(float(s), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for s, row in zip(seconds, rows, strict=True)
    ]


def azure_conv(n: int, *, max_total: int | None, seed: int | None = None) -> Workload:
    """Requests of the Azure 2023 conversation trace (19,366 rows over 58 minutes).

    Lengths are never clipped: a row with more than `max_total` tokens is passed over whole and
    counted, so the result has exactly `n` requests.

    Args:
        n: number of requests.
        max_total: most prompt + output tokens of a request; None keeps every row.
        seed: None takes the first `n` rows that fit, in order; a number draws `n` of all rows that
            fit at random, without replacement, and keeps them in order of arrival.

    Returns:
        The requests and `left_out`: rows passed over up to the last one taken (`seed=None`), or in
        the whole trace.

    Raises:
        ValueError: `n` is below 1 or above the number of rows that fit.
    """
    trace = _read(AZURE_CONV)
    fits = [max_total is None or r.prompt_tokens + r.output_tokens <= max_total for r in trace]
    index = np.flatnonzero(fits)
    if not 1 <= n <= len(index):
        raise ValueError(
            f"n must be in 1..{len(index)}, the rows with at most {max_total} tokens, got {n}"
        )
    if seed is None:
        taken = index[:n]
        left_out = int(taken[-1]) + 1 - n
    else:
        taken = np.sort(np.random.default_rng(seed).choice(index, size=n, replace=False))
        left_out = len(trace) - len(index)
    return Workload([trace[i] for i in taken], left_out)
