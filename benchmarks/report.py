"""What every benchmark uses: collect rows, then print, store and draw them.

A benchmark makes one :class:`Report`, adds a row per (case, implementation) and calls
:meth:`Report.finish`::

    report = Report("decode_step", "How long is one decode step?", out=args.out)
    report.add("llama2-7b B=1 S=512", "jpd", times_ms, unit="ms", nbytes=weights + kv)
    report.fail("llama2-7b B=1 S=512", "other", error)
    report.summary["speedup"] = 3.2
    report.finish()

A long one names its cases (`report.cases`, `report.expect`), sets `report.summarise` and calls
:meth:`Report.save` after each case, so that a run that is killed leaves what it measured;
:meth:`Report.merge` continues an earlier file.

``python -m benchmarks.report FILE.json ...`` prints stored results again (``--markdown`` for a
README, ``--svg`` to draw the chart on a machine that has matplotlib).

Needs NumPy and rich only; JAX, torch and CUDA are never imported.
"""

from __future__ import annotations

import argparse
import datetime
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import merging
from benchmarks.environment import capture_env, command_line, git_commit, gpu_slug
from benchmarks.render import print_table, to_markdown, write_svg
from benchmarks.rows import (
    OUT_OF_TIME,
    SCHEMA,
    failed_row,
    load,
    make_row,
    skipped_row,
    validate,
    validate_row,
    write,
)

RESULTS = Path(__file__).parent / "results"


class Report:
    """Collects the rows of one benchmark run and writes them.

    Args:
        name: benchmark's module name; names the files.
        question: the question the benchmark answers, one sentence.
        out: folder for the files; by default ``benchmarks/results/<gpu>``.
        host_only: the benchmark measures the CPU, so results belong to ``cpu`` on any machine.
    """

    def __init__(
        self, name: str, question: str, *, out: Path | None = None, host_only: bool = False
    ) -> None:
        self.name = name
        self.question = question
        self.env = capture_env()
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.cases: list[str] = []
        """Names of all cases of the benchmark, in the table's order; `cases` in the summary says
        how many of them were run."""
        self.summarise: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
        """Computes the summary's numbers from all rows, those of merged files too."""
        self._expected: dict[tuple[str, str], None] = {}
        self._earlier = merging.Earlier()
        self.folder = out or RESULTS / gpu_slug(None if host_only else self.env["gpu"])

    def add(self, case: str, impl: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adds a measured row; arguments as for :func:`make_row`. Returns the row."""
        self.rows.append(make_row(case, impl, *args, **kwargs))
        return self.rows[-1]

    def fail(self, case: str, impl: str, reason: str | BaseException, **extra: Any) -> None:
        """Adds a failed row with its reason."""
        self.rows.append(failed_row(case, impl, reason, **extra))

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows that another process made (a baseline's ``--json``)."""
        for row in rows:
            validate_row(row)
            self.rows.append(dict(row))

    def expect(self, keys: Iterable[tuple[str, str]]) -> None:
        """Promises rows of (case, impl); those that the run does not come to say "not run"."""
        self._expected |= dict.fromkeys(keys)

    def merge(self, files: Sequence[Path], *, measures: bool = True) -> None:
        """Keeps the cases of earlier runs that this one does not measure.

        Args:
            files: result files of this benchmark.
            measures: this run measures too, so that it must be on the same GPU.

        Raises:
            ValueError: a file answers another question, or was measured on another GPU.
        """
        self._earlier = merging.read(files, self.question)
        if measures:
            merging.check_gpu(self._earlier, self.env["gpu"])

    def earlier(self, key: str) -> Any:
        """What the summary of the merged files says; None where it has no such key."""
        return self._earlier.summary.get(key)

    def lacks(self, case: str) -> bool:
        """Whether no merged file holds this case as a whole."""
        return not merging.complete(merging.by_case(self._earlier.rows).get(case, []))

    def all_rows(self, reason: str = OUT_OF_TIME) -> list[dict[str, Any]]:
        """The rows of this run, those of merged files, and "not run" for what is missing."""
        have = {(row["case"], row["impl"]) for row in self.rows}
        skipped = [skipped_row(*key, reason) for key in self._expected if key not in have]
        rows = merging.replace(self._earlier.rows, [*self.rows, *skipped])
        place = {case: i for i, case in enumerate(self.cases)}
        return sorted(rows, key=lambda row: place.get(row["case"], len(place)))

    def find(self, case: str, impl: str) -> dict[str, Any] | None:
        """The row of this case and implementation if it was measured, None if not or failed."""
        match = (r for r in self.rows if (r["case"], r["impl"], r["status"]) == (case, impl, "ok"))
        return next(match, None)

    @property
    def failures(self) -> int:
        """Number of failed rows so far."""
        return sum(row["status"].startswith("failed") for row in self.rows)

    @property
    def path(self) -> Path:
        """The JSON file."""
        return self.folder / f"{self.name}.json"

    @functools.cached_property
    def _git(self) -> str | None:
        return git_commit()

    def document(self, reason: str = OUT_OF_TIME) -> dict[str, Any]:
        """The result file's content; `reason` is why promised rows are not there."""
        rows = self.all_rows(reason)
        computed = self.summarise(rows) if self.summarise else {}
        if self.cases:
            done = sum(map(merging.complete, merging.by_case(rows).values()))
            computed = {"cases": f"{done} of {len(self.cases)}"} | computed
        run = {
            "command": command_line(),
            "git": self._git,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "env": self.env,
        }
        rows, runs = merging.number_runs(rows, [*self._earlier.runs, run])
        doc = {
            "schema": SCHEMA,
            "question": self.question,
            **runs[-1],
            "rows": rows,
            "summary": self.summary | computed,
        }
        if len(runs) > 1:
            doc["runs"] = runs
        validate(doc)
        return doc

    def show(self) -> None:
        """Prints the table without writing a file."""
        print_table(self.document())

    def finish(self) -> Path:
        """Prints the table, writes ``NAME.json`` and ``NAME.svg``; returns the JSON's path."""
        doc = self.document()
        print_table(doc)
        self._write(doc)
        write_svg(doc, self.path.with_suffix(".svg"))
        print(f"wrote {self.path}")
        return self.path

    def save(self) -> None:
        """Writes ``NAME.json`` as it is now: a run that is killed leaves that."""
        self._write(self.document("the run had not come to it"))

    def _write(self, doc: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write(doc, self.path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all benchmarks have: ``--quick`` and ``--out DIR``."""
    parser.add_argument("--quick", action="store_true", help="few, small cases: does it run?")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results [benchmarks/results/<gpu>]"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Show results."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, for a README")
    parser.add_argument("--svg", action="store_true", help="draw the chart beside each file again")
    parser.add_argument("--metric", help="row key for --svg [the time]")
    args = parser.parse_args(argv)
    for path in args.files:
        doc = load(path)
        if args.markdown:
            print(to_markdown(doc), end="\n\n")
        else:
            print_table(doc)
        if args.svg and write_svg(doc, path.with_suffix(".svg"), args.metric):
            print(f"wrote {path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
