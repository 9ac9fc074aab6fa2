"""What every benchmark uses: collect rows, then print, store and draw them.

A benchmark makes one :class:`Report`, adds a row per (case, implementation) and calls
:meth:`Report.finish`::

    report = Report("decode_step", "How long is one decode step?", out=args.out)
    report.add("llama2-7b B=1 S=512", "jpd", times_ms, unit="ms", nbytes=weights + kv)
    report.fail("llama2-7b B=1 S=512", "other", error)
    report.summary["speedup"] = 3.2
    report.finish()

``python -m benchmarks.report FILE.json ...`` prints stored results again (``--markdown`` for a
README, ``--svg`` to draw the chart on a machine that has matplotlib).

Needs NumPy and rich only; JAX, torch and CUDA are never imported.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import capture_env, command_line, git_commit, gpu_slug
from benchmarks.render import print_table, to_markdown, write_svg
from benchmarks.rows import SCHEMA, failed_row, load, make_row, validate, validate_row

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

    def find(self, case: str, impl: str) -> dict[str, Any] | None:
        """The row of this case and implementation if it was measured, None if not or failed."""
        match = (r for r in self.rows if (r["case"], r["impl"], r["status"]) == (case, impl, "ok"))
        return next(match, None)

    @property
    def failures(self) -> int:
        """Number of failed rows so far."""
        return sum(row["status"] != "ok" for row in self.rows)

    def document(self) -> dict[str, Any]:
        """The result file's content."""
        doc = {
            "schema": SCHEMA,
            "question": self.question,
            "command": command_line(),
            "git": git_commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "env": self.env,
            "rows": self.rows,
            "summary": self.summary,
        }
        validate(doc)
        return doc

    def show(self) -> None:
        """Prints the table without writing a file."""
        print_table(self.document())

    def finish(self) -> Path:
        """Prints the table, writes ``NAME.json`` and ``NAME.svg``; returns the JSON's path."""
        doc = self.document()
        print_table(doc)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps(doc, indent=1, allow_nan=False) + "\n")
        write_svg(doc, path.with_suffix(".svg"))
        print(f"wrote {path}")
        return path


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
