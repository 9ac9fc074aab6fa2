"""Rows and result files: how they are made and what makes them valid.

A row is a plain dict, so that a baseline in a process of its own can hand its rows over as JSON.
A failed measurement is a row too, with its reason: a table never looks complete by leaving things
out. benchmarks/README.md explains the fields.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

SCHEMA = 1
TIME_UNITS = ("us", "ms")
# Keys that every row has, in the order in which tables show them.
ROW_KEYS = (
    "case",
    "impl",
    "p10",
    "p90",
    "n",
    "bytes",
    "flops",
    "pct_of_bound",
    "rel_err",
    "status",
)
OUT_OF_TIME = "out of time"
NOT_REACHED = "the process ended before this case"
"""Why a baseline's row failed that it had not come to yet."""
DOC_KEYS = ("schema", "question", "command", "git", "date", "env", "rows", "summary")


def stats(samples: Iterable[float]) -> tuple[float, float, float, int]:
    """Median, 10th and 90th percentile (linear interpolation) and number of samples.

    Raises:
        ValueError: no sample, or one that is not finite.
    """
    values = np.asarray(list(samples), dtype=np.float64)
    if values.size == 0:
        raise ValueError("no samples: record the case with fail() instead")
    if not np.isfinite(values).all():
        raise ValueError(f"samples must be finite, got {values[~np.isfinite(values)][0]}")
    p10, median, p90 = np.percentile(values, (10, 50, 90))
    return float(median), float(p10), float(p90), int(values.size)


def bound_ms(
    nbytes: float, flops: float, *, bytes_per_s: float, flops_per_s: float | None = None
) -> float:
    """Shortest possible time in ms: the larger of moving `nbytes` and computing `flops`."""
    times = [nbytes / bytes_per_s]
    if flops_per_s is not None:
        times.append(flops / flops_per_s)
    return max(times) * 1e3


def make_row(
    case: str,
    impl: str,
    samples: Iterable[float] | None = None,
    unit: Literal["us", "ms"] = "ms",
    *,
    nbytes: float | None = None,
    flops: float | None = None,
    bound: float | None = None,
    rel_err: float | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One measured row.

    Args:
        case: what was measured, e.g. "llama2-7b B=1 S=512".
        impl: who did it; the same names in every case, they become the chart's legend.
        samples: times in `unit`; None for a row whose result is in `extra` only.
        nbytes: fewest bytes the case must move through device memory.
        flops: operations the case must do.
        bound: shortest possible time in `unit` (see :func:`bound_ms`); gives pct_of_bound.
        rel_err: ‖out − ref‖ / ‖ref‖ against a reference of higher precision.
        **extra: further results (``tokens_per_s=...``), shown as columns of their own.

    Raises:
        ValueError: a sample or result is not finite, or the row holds no result at all.
    """
    if unit not in TIME_UNITS:
        raise ValueError(f"unit must be one of {TIME_UNITS}, got {unit!r}")
    row: dict[str, Any] = dict.fromkeys(ROW_KEYS)
    row |= {"case": case, "impl": impl, "bytes": nbytes, "flops": flops, "rel_err": rel_err}
    if samples is not None:
        row[unit], row["p10"], row["p90"], row["n"] = stats(samples)
        if bound is not None:
            row["pct_of_bound"] = 100.0 * bound / row[unit]
    elif bound is not None:
        raise ValueError("a bound needs samples to compare it with")
    row |= {**extra, "status": "ok"}
    validate_row(row)
    return row


def failed_row(case: str, impl: str, reason: str | BaseException, **extra: Any) -> dict[str, Any]:
    """A row for a measurement that gave no usable result, with the reason."""
    if isinstance(reason, BaseException):
        reason = f"{type(reason).__name__}: {reason}"
    # The first lines say what went wrong; a whole traceback would drown the table.
    short = " ".join(reason.split())[:500] or "no reason given"
    row: dict[str, Any] = dict.fromkeys(ROW_KEYS)
    row |= {"case": case, "impl": impl, **extra, "status": f"failed: {short}"}
    validate_row(row)
    return row


def skipped_row(case: str, impl: str, reason: str = OUT_OF_TIME, **extra: Any) -> dict[str, Any]:
    """A row for a measurement that was not begun: it says nothing about the implementation."""
    row: dict[str, Any] = dict.fromkeys(ROW_KEYS)
    row |= {"case": case, "impl": impl, **extra, "status": f"not run: {reason}"}
    validate_row(row)
    return row


def was_run(row: Mapping[str, Any]) -> bool:
    """Whether it was measured or failed."""
    return not row["status"].startswith("not run: ")


def validate_row(row: Mapping[str, Any]) -> None:
    """Checks one row against the schema.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    where = f"row {row.get('case')!r} / {row.get('impl')!r}"
    missing = [key for key in ROW_KEYS if key not in row]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    for key in ("case", "impl", "status"):
        if not isinstance(row[key], str) or not row[key]:
            raise ValueError(f"{where}: {key} must be a non-empty string, got {row[key]!r}")
    numbers = {k: v for k, v in row.items() if isinstance(v, float | int)}
    for key, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{where}: {key} must be finite, got {value}; record a failed row")
    timed = [unit for unit in TIME_UNITS if row.get(unit) is not None]
    if row["status"] == "ok":
        if len(timed) > 1:
            raise ValueError(f"{where}: one time unit only, got {timed}")
        if timed and any(row[key] is None for key in ("p10", "p90", "n")):
            raise ValueError(f"{where}: a time needs p10, p90 and n")
        if not numbers:
            raise ValueError(f"{where}: status ok, but no result")
    elif not row["status"].startswith(("failed: ", "not run: ")):
        raise ValueError(
            f"{where}: status must be 'ok', 'failed: REASON' or 'not run: REASON', "
            f"got {row['status']!r}"
        )
    elif timed:
        raise ValueError(f"{where}: a row that is not ok must not show a time")


def validate(doc: Mapping[str, Any]) -> None:
    """Checks a whole result file.

    Raises:
        ValueError: naming what is missing or wrong.
    """
    missing = [key for key in DOC_KEYS if key not in doc]
    if missing:
        raise ValueError(f"not a result file: missing {', '.join(missing)}")
    if doc["schema"] != SCHEMA:
        raise ValueError(f"schema {doc['schema']!r} is not supported, only {SCHEMA}")
    if not doc["rows"]:
        raise ValueError("a result file needs at least one row")
    for row in doc["rows"]:
        validate_row(row)
        if not 0 <= row.get("run", 0) < len(doc.get("runs", [None])):
            raise ValueError(f"row {row['case']!r} / {row['impl']!r}: no run {row['run']}")


def write(doc: Mapping[str, Any], path: Path) -> None:
    """Writes a result file, all or nothing: a process killed meanwhile leaves the one before."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(doc, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def load(path: Path) -> dict[str, Any]:
    """Reads and checks a result file."""
    doc = json.loads(path.read_text())
    try:
        validate(doc)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return doc
