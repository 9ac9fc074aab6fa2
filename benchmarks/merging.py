"""Result files of several runs as one: which rows count, and where each comes from.

A case is taken whole from one run, so that an implementation is never held against one that was
measured on another day. Pure functions on rows and result files.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import load, was_run

RUN_KEYS = ("command", "git", "date", "env")
"""What a result file says about a run."""
Row = dict[str, Any]


@dataclasses.dataclass
class Earlier:
    """What the runs before this one measured."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    """Each with the index of its `run`."""
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of all files, the last one's first."""


def read(files: Iterable[Path], question: str) -> Earlier:
    """The rows of these files; of a case that several hold, those of the last.

    Raises:
        ValueError: a file answers another question, or was measured on another GPU.
    """
    earlier = Earlier()
    for file in files:
        doc = load(file)
        if doc["question"] != question:
            raise ValueError(f"{file}: its question is {doc['question']!r}, not {question!r}")
        first = len(earlier.runs)
        runs = doc.get("runs") or [{key: doc[key] for key in RUN_KEYS}]
        earlier.runs += [dict(run) for run in runs]
        check_gpu(earlier, earlier.runs[0]["env"]["gpu"])
        rows = [row | {"run": first + row.get("run", 0)} for row in doc["rows"]]
        earlier.rows = replace(earlier.rows, rows)
        earlier.summary |= doc["summary"]
    return earlier


def check_gpu(earlier: Earlier, gpu: str | None) -> None:
    """Raises `ValueError` if a run was made on another GPU than this."""
    for run in earlier.runs:
        if run["env"]["gpu"] != gpu:
            raise ValueError(f"cannot merge rows of {run['env']['gpu']!r} with rows of {gpu!r}")


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each case, in order."""
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["case"]].append(row)
    return dict(grouped)


def complete(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are rows of a case, and every implementation had its turn."""
    return bool(rows) and all(map(was_run, rows))


def replace(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All cases: as in `new` if that is complete or the old one is not, else as in `old`."""
    cases = by_case(old)
    for case, rows in by_case(new).items():
        before = cases.get(case, [])
        measured = any(map(was_run, rows))
        if complete(rows) or not before or (measured and not complete(before)):
            cases[case] = rows
    return [row for rows in cases.values() for row in rows]


def number_runs(
    rows: Sequence[Row], runs: Sequence[dict[str, Any]]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Copies of the rows with `run` indices into the runs that are left, and those.

    A row without `run` is of the last run. With one run left, rows have no index.
    """
    index = [row.get("run", len(runs) - 1) for row in rows]
    used = sorted({i for i, row in zip(index, rows, strict=True) if was_run(row)})
    if len(used) < 2:
        plain = [{k: v for k, v in row.items() if k != "run"} for row in rows]
        return plain, [runs[i] for i in used] or [runs[-1]]
    place = {i: n for n, i in enumerate(used)}
    numbered = []
    for i, row in zip(index, rows, strict=True):
        copy = {k: v for k, v in row.items() if k not in ("run", "status")}
        copy |= {"run": place[i]} if was_run(row) else {}
        numbered.append(copy | {"status": row["status"]})
    return numbered, [runs[i] for i in used]
