"""What the rows of the benchmark of FlashOverlap amount to. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.overlap_cases import ALONE, GEMM, LINKS, Case
from benchmarks.ratios import geomean, put, speedups, times
from jpd.overlap import Work, bound

OURS, IN_ORDER = "jpd", "jpd_rows"
SEQUENTIAL = ("xla", "cupy", "torch")
"""Product, then collective: the fastest of these is what speed-ups are against."""
OTHERS = (
    "jpd_sequential",
    "xla_latency_hiding",
    "xla_chunks2",
    "xla_chunks4",
    "xla_windowed",
    "torch_async_tp",
)
SMS = 132
_TILE = (128, 256)
Row = Mapping[str, Any]
Curve = Callable[[float], float]


def bound_us(case: Case, gemm_us: float, collective_us: float, curve: Curve | None = None) -> float:
    """The paper's bound (section 6.4) of one case, from the product and the collective alone.

    Both as fast as they are alone on the whole GPU: neither gives the other SMs, which is stricter
    than what an overlapped GEMM could reach. The paper takes the time for everything at once,
    which is a bound only if parts take no less together; without P2P they do: theirs is taken.

    Args:
        case: which.
        gemm_us: of the fastest GEMM.
        collective_us: of everything at once.
        curve: least seconds of the collective by bytes, in any parts; None: in proportion.
    """
    m, n, _ = case.shape
    tile_m, tile_n = _TILE
    tiles = -(-m // tile_m) * -(-n // tile_n)
    whole, total = collective_us * 1e-6, tiles * tile_m * tile_n * 2
    if curve is not None:
        whole = min(whole, float(curve(total)))

    def collective_s(size: float) -> float:
        if size >= total or curve is None:
            return whole * min(1.0, size / total)
        return min(whole, float(curve(size)))

    work = Work(tiles, SMS, tile_m * tile_n * 2, gemm_us * 1e-6, collective_s)
    return bound(work) * 1e6


def fill_bounds(
    rows: Sequence[dict[str, Any]], curve_of: Callable[[Case], Curve | None] = lambda case: None
) -> None:
    """Sets `pct_of_bound` where product and collective alone were measured too.

    Args:
        rows: of the report.
        curve_of: bandwidth curve for a case.
    """
    alone = times(rows, "collective")
    products: dict[str, float] = {}
    for name in ("cublas", "signal_gemm"):
        for case, us in times(rows, name).items():
            products[case] = min(us, products.get(case, us))
    bounds = {}
    for name, collective_us in alone.items():
        case = Case.parse(name)
        gemm_us = products.get(case._replace(op=GEMM).name)
        if gemm_us is not None and case.link in LINKS:
            bounds[name] = bound_us(case, gemm_us, collective_us, curve_of(case))
    for row in rows:
        measured = row["status"] == "ok" and row.get("us") and row["impl"] != "collective"
        if measured and row["case"] in bounds:
            row["pct_of_bound"] = 100 * bounds[row["case"]] / row["us"]


def summarise(rows: Sequence[Row], cases: Sequence[Case]) -> dict[str, Any]:
    """The summary's numbers from all rows, `pct_of_bound` filled.

    Args:
        rows: of the report.
        cases: all that the benchmark has.
    """
    summary: dict[str, Any] = {}
    shapes = {case.shape for case in cases if case.op == GEMM}
    versus = _by_shape(speedups(rows, "signal_gemm", ["cublas"]))
    put(summary, "gemm_vs_cublas_geomean", versus, low="gemm_vs_cublas_min", of=len(shapes))
    signalled = _by_shape(speedups(rows, "signal_gemm", ["dense_gemm"]))
    if signalled:
        # The time of the GEMM that signals over that of the one that does not.
        summary["signal_cost_pct"] = 100 * (1 / geomean(signalled.values()) - 1)
        if len(signalled) < len(shapes):
            summary["signal_cost_pct_over"] = f"{len(signalled)} of {len(shapes)}"
    for link in LINKS:
        summary |= _of_link(rows, link, [c for c in cases if c.link == link and c.op != GEMM])
    return summary


def _by_shape(ratios: Mapping[str, float]) -> dict[str, float]:
    """Ratios of products by shape: on one GPU, else the mean of the cases on several."""
    found: dict[str, list[float]] = {}
    alone: dict[str, float] = {}
    for name, ratio in ratios.items():
        case = Case.parse(name)
        found.setdefault(case.shape.name, []).append(ratio)
        if case.link == ALONE:
            alone[case.shape.name] = ratio
    return {shape: geomean(of) for shape, of in found.items()} | alone


def _of_link(rows: Sequence[Row], link: str, cases: Sequence[Case]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    names = {case.name: case for case in cases}
    ours = [row for row in rows if row["case"] in names]
    gains = speedups(ours, OURS, SEQUENTIAL)
    put(
        summary,
        f"{link}_geomean_speedup",
        gains,
        low=f"{link}_min_speedup",
        of=len(cases),
    )
    if gains:
        most, least = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
        summary |= {
            f"{link}_max_speedup": gains[most],
            f"{link}_max_speedup_case": most,
            f"{link}_min_speedup_case": least,
        }
        for group in sorted({(names[name].op, names[name].ranks) for name in gains}):
            some = [r for name, r in gains.items() if (names[name].op, names[name].ranks) == group]
            summary[f"{link}_geomean_speedup_{group[0]}_{group[1]}"] = geomean(some)
    in_order = speedups(ours, IN_ORDER, SEQUENTIAL)
    put(summary, f"{link}_rows_geomean_speedup", in_order, low=f"{link}_rows_min_speedup")
    for peer in (*SEQUENTIAL, *OTHERS):
        put(summary, f"{link}_geomean_vs_{peer}", speedups(ours, OURS, [peer]))
    done = [row for row in ours if row["impl"] == OURS and row["status"] == "ok"]
    shares = [row["pct_of_bound"] for row in done if row.get("pct_of_bound") is not None]
    if shares:
        summary[f"{link}_pct_of_bound_median"] = statistics.median(shares)
    hidden = [row["hidden"] for row in done if row.get("hidden") is not None]
    if hidden:
        summary[f"{link}_hidden_median"] = statistics.median(hidden)
    errors = [
        100 * abs(row["predicted_us"] / row["us"] - 1) for row in done if row.get("predicted_us")
    ]
    if errors:
        summary[f"{link}_predictor_error_pct"] = statistics.mean(errors)
    return summary


def summarise_tuning(rows: Sequence[Row]) -> dict[str, Any]:
    """How well the predictor did, from the rows of `--tune`."""
    summary: dict[str, Any] = {}
    for link in LINKS:
        done = [row for row in rows if row["case"].startswith(f"{link} ") and row["status"] == "ok"]
        plans = [row for row in done if row.get("predicted_us")]
        if plans:
            errors = [row["error_pct"] for row in plans]
            summary[f"{link}_tune_predictor_error_pct"] = statistics.mean(errors)
            summary[f"{link}_tune_plans_timed"] = len(plans)
        searched = [row["searched_pct"] for row in done if row["impl"] == "exhaustive"]
        if searched:
            summary[f"{link}_searched_vs_exhaustive_pct"] = statistics.mean(searched)
            summary[f"{link}_exhaustive_cases"] = len(searched)
    return summary
