"""From the points of `benchmarks/semi_pd_serving.py` to its summary and its chart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.curves import Panel
from jpd.bench import slo
from jpd.bench.slo import Goodput
from jpd.semi_pd.controller import FULL, Shares

UNIFIED = ("chunked", "prefill_first")
STATIC, DYNAMIC, MEAN = "semi_pd_100_100", "semi_pd_dynamic", "semi_pd_mean"
AUTO, AUTO_MEAN = "auto", "auto_mean"
SHORTEST = "_shortest"
"""Ends the name of an implementation that has `scheduling_policy="shortest"` instead of "fcfs"."""


def with_twins[T](values: Mapping[str, T]) -> dict[str, T]:
    """The values of implementations, each for its twin too."""
    return {twin: value for impl, value in values.items() for twin in (impl, impl + SHORTEST)}


DIVIDED = with_twins(
    {f"semi_pd_{x}_{100 - x}": Shares(x, 100 - x) for x in (90, 85, 80, 70, 60, 50, 40, 30)}
)
"""Shares that stay and have no SM in common."""
FIXED = with_twins({STATIC: FULL}) | DIVIDED
"""Shares that stay."""
SLOS = {"tight": slo.TIGHT, "loose": slo.LOOSE}
"""Times the unloaded latencies."""
GOODPUT_RATIOS = {
    "goodput_vs_prefill_first": ("prefill_first", 1),
    "goodput_vs_chunked": ("chunked", 1),
    "goodput_dynamic_vs_100_100": (STATIC, 1),
    "goodput_vs_disaggregated_per_gpu": ("disaggregated", 2),
}
"""Whose goodput, and on how many GPUs."""


class Curve(NamedTuple):
    """Means over the seeds of one workload and implementation, by rising rate."""

    rates: list[float]
    loads: list[float]
    e2e_ms: list[float]
    attained: dict[str, list[float]]
    """For each SLO."""
    per_waiting: list[float] | None
    """Requests that two executors would save for each one that waits; None where not counted."""
    spread: float | None
    """Largest difference of mean E2E between seeds, over their mean; None with one seed."""


def curve(rows: Sequence[Mapping[str, Any]]) -> Curve:
    """Of the points of one workload and implementation, at least one."""
    by_rate: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_rate[row["rate"]].append(row)
    rates = sorted(by_rate)

    def means(key: str) -> list[float]:
        return [float(np.mean([row[key] for row in by_rate[rate]])) for rate in rates]

    spreads = [
        float(np.ptp(values) / np.mean(values))
        for values in ([row["mean_e2el_ms"] for row in by_rate[rate]] for rate in rates)
        if len(values) > 1
    ]
    attained = {scale: means(scale) for scale in SLOS}
    counted = all("saved_per_waiting" in row for row in rows)
    per_waiting = means("saved_per_waiting") if counted else None
    spread = max(spreads, default=None)
    return Curve(rates, means("load"), means("mean_e2el_ms"), attained, per_waiting, spread)


def divide(ours: Goodput, theirs: Goodput, gpus: int = 1) -> tuple[float, str] | None:
    """Ratio of two goodputs and its relation to the true one; None if nothing can be said.

    Args:
        ours: on one GPU.
        theirs: on all of theirs together.
        gpus: how many those are.
    """
    relations = {ours.relation, theirs.relation}
    if relations == {"="}:
        relation = "="
    elif ours.relation != "<" and theirs.relation != ">=":
        relation = ">="
    elif ours.relation != ">=" and theirs.relation != "<":
        relation = "<="
    else:
        return None
    return gpus * ours.rate / theirs.rate, relation


def break_even(rates: Sequence[float], speedups: Sequence[float]) -> tuple[float | None, str]:
    """The highest rate with a speed-up below 1, and how it relates to the true one; None: none."""
    below = np.flatnonzero(np.array(speedups) < 1)
    if len(below) == 0:
        return None, "<"
    i = int(below[-1])
    if i == len(rates) - 1:
        return rates[i], ">="
    part = (1 - speedups[i]) / (speedups[i + 1] - speedups[i])
    return rates[i] + part * (rates[i + 1] - rates[i]), "="


def absent(measured: Iterable[str], impls: Iterable[str]) -> str | None:
    """What is said where some of these were not measured."""
    lacking = [impl for impl in impls if impl not in measured]
    return f"{', '.join(lacking)} not measured" if lacking else None


def common_rates(curves: Mapping[str, Curve], impl: str) -> list[float]:
    """At which it and both unified policies were measured, rising."""
    others = [set(curves[unified].rates) for unified in UNIFIED]
    return [rate for rate in curves[impl].rates if all(rate in rates for rates in others)]


def add_speedups(
    summary: dict[str, Any], missing: dict[str, str], curves: Mapping[str, Curve], impl: str
) -> str | None:
    """Adds how much better its mean E2E is than that of the better unified policy.

    A twin is compared with the twins of those too, where they were measured.

    Args:
        summary: gets two keys.
        missing: why one of them is None.
        curves: of a workload.
        impl: whose speed-up.

    Returns:
        Why nothing can be said of it; None: it can.
    """
    highest, at_80 = keys = ("mean_e2e_speedup_max", "mean_e2e_speedup_at_80pct_load")
    summary |= dict.fromkeys(keys)
    reason = absent(curves, (*UNIFIED, impl))
    common = [] if reason else common_rates(curves, impl)
    if not common:
        reason = reason or "no rate was measured with all three"
        missing |= dict.fromkeys(keys, reason)
        return reason
    e2e = {of: dict(zip(c.rates, c.e2e_ms, strict=True)) for of, c in curves.items()}
    others = [of for of in UNIFIED if of in curves]
    if impl.endswith(SHORTEST):
        others += [of + SHORTEST for of in UNIFIED if of + SHORTEST in curves]
    speedups = [min(e2e[of].get(r, math.inf) for of in others) / e2e[impl][r] for r in common]
    ours = curves[impl]
    loads = [ours.loads[ours.rates.index(r)] for r in common]
    summary[highest] = max(speedups)
    if min(loads) - 0.005 <= 0.8 <= max(loads) + 0.005:  # rates have three digits
        summary[at_80] = float(np.interp(0.8, loads, speedups))
    else:
        missing[at_80] = f"loads {min(loads):.2f} to {max(loads):.2f} were measured"
    return None


def add_break_even(
    summary: dict[str, Any], curves: Mapping[str, Curve], rates: Sequence[float]
) -> None:
    """Adds what says whether, and from which load on, two executors are better than one.

    Args:
        summary: of a workload; gets its three keys, `relations` and `null_because`.
        curves: of the unified policies and the dynamic controller at least.
        rates: at which all of those were measured, rising.
    """
    relations, missing = summary["relations"], summary["null_because"]

    def at(impl: str, rate: float, values: str = "e2e_ms") -> float:
        return getattr(curves[impl], values)[curves[impl].rates.index(rate)]

    better = [min(UNIFIED, key=lambda impl, r=rate: at(impl, r)) for rate in rates]
    speedups = [at(of, r) / at(DYNAMIC, r) for of, r in zip(better, rates, strict=True)]
    rate, relation = break_even(rates, speedups)
    summary["break_even_rate"] = rate
    if rate is None:
        never = f"no unified policy is better at a rate measured, from {rates[0]:g} on"
        missing |= dict.fromkeys(("break_even_rate", "break_even_ratio"), never)
    else:
        relations["break_even_rate"] = relation
        if all(curves[of].per_waiting is not None for of in better):
            ratios = [at(of, r, "per_waiting") for of, r in zip(better, rates, strict=True)]
            summary["break_even_ratio"] = float(np.interp(rate, rates, ratios))
        else:
            missing["break_even_ratio"] = "saved_per_waiting was not counted"
    both = [r for r in rates if AUTO in curves and r in curves[AUTO].rates]
    if both:
        summary["auto_vs_better_min"] = min(
            min(at(impl, r) for impl in (*UNIFIED, DYNAMIC)) / at(AUTO, r) for r in both
        )
    else:
        missing["auto_vs_better_min"] = "auto not measured at a rate of the others"


def add_goodputs(
    part: dict[str, Any],
    summary: dict[str, Any],
    goodputs: Mapping[str, Goodput],
    ours: str,
    label: str = "",
    twins: bool = False,
) -> None:
    """Adds what one goodput is over others.

    Args:
        part: gets the ratios.
        summary: gets their relations, and why one is None.
        goodputs: of each implementation.
        ours: whose it is.
        label: before the keys in `relations` and `null_because`.
        twins: those of the others.
    """
    for key, (other, gpus) in GOODPUT_RATIOS.items():
        other += SHORTEST * twins
        part[key], ratio = None, None
        reason = absent(goodputs, (ours, other))
        if reason is None:
            ratio = divide(goodputs[ours], goodputs[other], gpus)
            reason = "both curves stay on the same side of 90 % at all rates measured"
        if ratio is None:
            summary["null_because"][label + key] = reason
        else:
            part[key], summary["relations"][label + key] = ratio


def summarise_one(
    curves: Mapping[str, Curve], goodputs: Mapping[str, Goodput], impl: str
) -> dict[str, Any]:
    """What one implementation gains: mean E2E and goodput over those of the others."""
    summary: dict[str, Any] = {"relations": {}, "null_because": {}}
    add_speedups(summary, summary["null_because"], curves, impl)
    add_goodputs(summary, summary, goodputs, impl)
    return summary


def summarise_shortest(
    curves: Mapping[str, Curve], goodputs: Mapping[str, Goodput]
) -> dict[str, Any]:
    """What the controllers' twins gain, with the tight SLO.

    Their mean E2E is compared with the best unified policy, goodput with each of the others and, in
    `against_twins`, that of `semi_pd_dynamic_shortest` with each of their twins.
    """
    summary = summarise_one(curves, goodputs, DYNAMIC + SHORTEST)
    twins = summary["against_twins"] = {"relations": {}, "null_because": {}}
    add_goodputs(twins, twins, goodputs, DYNAMIC + SHORTEST, twins=True)
    without = summary["without_slo"] = {"null_because": {}}
    add_speedups(without, without["null_because"], curves, MEAN + SHORTEST)
    if AUTO_MEAN + SHORTEST in curves:
        summary[AUTO_MEAN] = summarise_one(curves, goodputs, AUTO_MEAN + SHORTEST)
    return summary


def summarise_workload(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One workload's part of the summary, from its points that were measured."""
    curves = {
        impl: curve([row for row in rows if row["impl"] == impl])
        for impl in dict.fromkeys(row["impl"] for row in rows)
    }
    summary: dict[str, Any] = {"relations": {}, "null_because": {}}
    missing = summary["null_because"]

    keys = ("break_even_rate", "break_even_ratio", "auto_vs_better_min")
    summary |= dict.fromkeys(keys)
    reason = add_speedups(summary, missing, curves, DYNAMIC)
    if reason is None:
        add_break_even(summary, curves, common_rates(curves, DYNAMIC))
    else:
        missing |= dict.fromkeys(keys, reason)
    summary["without_slo"] = {"null_because": {}}
    add_speedups(summary["without_slo"], summary["without_slo"]["null_because"], curves, MEAN)
    goodputs = {
        scale: {i: slo.goodput(c.rates, c.attained[scale]) for i, c in curves.items()}
        for scale in SLOS
    }
    summary["loose"] = {}
    for scale, part in (("tight", summary), ("loose", summary["loose"])):
        part["goodput"] = {impl: list(found) for impl, found in goodputs[scale].items()}
        label = "" if scale == "tight" else f"{scale} "
        add_goodputs(part, summary, goodputs[scale], DYNAMIC, label)
    if AUTO_MEAN in curves:
        summary[AUTO_MEAN] = summarise_one(curves, goodputs["tight"], AUTO_MEAN)
    if fixed := [impl for impl in curves if impl in DIVIDED]:
        summary["fixed"] = {i: summarise_one(curves, goodputs["tight"], i) for i in fixed}
    if {impl + SHORTEST for impl in (DYNAMIC, MEAN, AUTO_MEAN)} & curves.keys():
        summary["shortest"] = summarise_shortest(curves, goodputs["tight"])
    spreads = [c.spread for c in curves.values() if c.spread is not None]
    summary["seed_spread"] = max(spreads, default=None)
    return summary


def points_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Measured points of each workload, without its unloaded row."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok" and row.get("workload") is not None:
            found[row["workload"]].append(row)
    return dict(found)


def panels(rows: Iterable[Mapping[str, Any]]) -> list[list[Panel]]:
    """Mean latencies and attainment over the rate, a column for each workload."""
    grid: list[list[Panel]] = [[], []]
    for workload, points in points_of(rows).items():
        e2e, tight = {}, {}
        for impl in dict.fromkeys(row["impl"] for row in points):
            of = curve([row for row in points if row["impl"] == impl])
            e2e[impl] = of.rates, of.e2e_ms
            tight[impl] = of.rates, of.attained["tight"]
        twins = {impl: impl.removesuffix(SHORTEST) for impl in e2e if impl.endswith(SHORTEST)}
        rate, time, part = "requests/s", "mean E2E in ms", "part within the tight SLO"
        grid[0].append(Panel(workload, rate, time, e2e, log_y=True, variants=twins))
        grid[1].append(Panel(workload, rate, part, tight, variants=twins))
    return grid
