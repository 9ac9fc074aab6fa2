"""How results of many cases become one number. Pure arithmetic on rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def geomean(values: Iterable[float]) -> float:
    """Geometric mean.

    Raises:
        ValueError: no value, or one that is not positive.
    """
    values = list(values)
    if not values or min(values) <= 0:
        raise ValueError(f"a geometric mean needs positive values, got {values}")
    return math.exp(sum(map(math.log, values)) / len(values))


def times(rows: Sequence[Row], impl: str) -> dict[str, float]:
    """Median time in µs of every case that `impl` did without failing."""
    return {
        row["case"]: row["us"]
        for row in rows
        if row["impl"] == impl and row["status"] == "ok" and row.get("us") is not None
    }


def speedups(rows: Sequence[Row], ours: str, peers: Collection[str]) -> dict[str, float]:
    """Time of the best of `peers` over the time of `ours`, for every case that both sides did."""
    mine = times(rows, ours)
    theirs = [times(rows, peer) for peer in peers]
    out = {}
    for case, us in mine.items():
        best = [t[case] for t in theirs if case in t]
        if best:
            out[case] = min(best) / us
    return out


def put(
    summary: dict[str, Any],
    name: str,
    ratios: Mapping[str, float],
    *,
    low: str = "",
    of: int | None = None,
) -> None:
    """Stores the geometric mean as `name`, the least as `low`; nothing where there is no ratio.

    A mean over fewer than `of` cases says so in `NAME_over`: it may not stand for all of them.
    """
    if ratios:
        if of is not None and len(ratios) < of:
            summary[f"{name}_over"] = f"{len(ratios)} of {of}"
        summary[name] = geomean(ratios.values())
        if low:
            summary[low] = min(ratios.values())


def fill_bounds(rows: Sequence[dict[str, Any]], bytes_per_s: float | None) -> None:
    """Sets `pct_of_bound` of measured rows: their bytes at this rate, over their time.

    A rate that was not measured yet (None) leaves them as they are.
    """
    if bytes_per_s is None:
        return
    for row in rows:
        if row["status"] == "ok" and row.get("us") and row["bytes"]:
            row["pct_of_bound"] = 100 * row["bytes"] / bytes_per_s * 1e6 / row["us"]
