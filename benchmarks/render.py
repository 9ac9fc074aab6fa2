"""Result files for people: a terminal table, a Markdown table, an SVG bar chart."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import ROW_KEYS, TIME_UNITS


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys to show: fixed order first, extras in order of appearance, empty ones dropped."""
    order = ["case", "impl", *TIME_UNITS, *ROW_KEYS[2:-1]]
    for row in rows:
        order += [key for key in row if key not in order and key != "status"]
    return [k for k in order if any(r.get(k) is not None for r in rows)] + ["status"]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) and abs(value) < 1_000_000:
        return str(value)
    if isinstance(value, int | float):
        return f"{value:.4g}"
    return json.dumps(value)


def to_markdown(doc: Mapping[str, Any]) -> str:
    """The result as a Markdown table, its summary and one line that says where it was measured."""
    rows, columns = doc["rows"], _columns(doc["rows"])

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    text = [
        isinstance(next((r[c] for r in rows if r.get(c) is not None), ""), str) for c in columns
    ]
    out = [line(columns), "|" + "|".join("---" if t else "---:" for t in text) + "|"]
    out += [line(_cell(row.get(column)) for column in columns) for row in rows]
    if doc["summary"]:
        out += ["", " · ".join(f"{key} = {_cell(v)}" for key, v in doc["summary"].items())]
    return "\n".join([*out, "", f"`{doc['command']}` · {_provenance(doc)}"])


def _provenance(doc: Mapping[str, Any]) -> str:
    env = doc["env"]
    versions = [f"{key} {env[key]}" for key in ("driver", "jax", "torch") if env.get(key)]
    parts = [env.get("gpu") or env.get("cpu") or "unknown machine", *versions, doc["date"][:10]]
    if doc["git"]:
        commit, dirty, _ = doc["git"].partition("-dirty")
        parts.append(commit[:10] + dirty)
    if "runs" in doc:
        parts.append(f"rows of {len(doc['runs'])} runs")
    return ", ".join(parts)


def print_table(doc: Mapping[str, Any]) -> None:
    """Prints the question, the rows and the summary to standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Piped into a log there is no terminal width to respect, and wrapped cells are hard to read.
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(title=doc["question"], caption=_provenance(doc), box=box.SIMPLE)
    columns = _columns(doc["rows"])
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "impl", "status") else "right")
    for row in doc["rows"]:
        style = "" if row["status"] == "ok" else "red"
        table.add_row(*(Text(_cell(row.get(name)), style=style) for name in columns))
    console.print(table)
    for key, value in doc["summary"].items():
        console.print(Text(f"  {key} = {_cell(value)}"))


def write_svg(doc: Mapping[str, Any], path: Path, metric: str | None = None) -> bool:
    """Draws one group of bars per case and one bar per implementation.

    Args:
        metric: row key to draw; by default the time. p10 to p90 become error bars on times.

    Returns:
        False, with a line on standard output, where matplotlib (extra ``bench``) is missing or no
        row has the metric.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is not installed (extra `bench`): {path.name} was not drawn")
        return False
    import matplotlib
    from matplotlib.figure import Figure

    rows = doc["rows"]
    units = [metric] if metric else [u for u in TIME_UNITS if any(r.get(u) for r in rows)]
    if not units or not any(row.get(units[0]) is not None for row in rows):
        print(f"no row has {metric or 'a time'}: {path.name} was not drawn")
        return False
    if len(units) > 1:
        raise ValueError(f"one chart needs one unit, the rows have {units}: name a metric")
    unit = units[0]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    by_key = {(row["case"], row["impl"]): row for row in rows}
    figure = Figure(figsize=(max(5.0, 1.2 + 0.45 * len(cases) * (len(impls) + 1)), 3.6))
    axes = figure.add_subplot()
    width = 0.8 / len(impls)
    for i, impl in enumerate(impls):
        for x, case in enumerate(cases):
            row = by_key.get((case, impl))
            if row is None:
                continue
            at = x + (i - (len(impls) - 1) / 2) * width
            value = row.get(unit)
            if value is None:
                word = " failed" if row["status"].startswith("failed") else " not run"
                axes.text(at, 0, word, rotation=90, ha="center", va="bottom", color="C3")
                continue
            top, spread = value, None
            if unit in TIME_UNITS:
                top = max(row["p90"], value)
                spread = [[max(value - row["p10"], 0)], [top - value]]
            axes.bar(at, value, width * 0.92, color=f"C{i}", yerr=spread, ecolor="0.3", capsize=2)
            label = f"{value:.3g}"
            axes.annotate(label, (at, top), (0, 2), textcoords="offset points", ha="center", size=7)
        axes.bar(0, 0, color=f"C{i}", label=impl)  # legend entry also for all-failed impls
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", size=8)
    axes.set_ylabel(f"median {unit} (whiskers: p10 to p90)" if unit in TIME_UNITS else unit)
    axes.set_title(doc["question"], size=9, wrap=True)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    # Fixed ids and no date: the same numbers give the same file, so a diff means new numbers.
    with matplotlib.rc_context({"svg.hashsalt": "jpd"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    return True
