"""From the points of `benchmarks/semi_pd_serving.py` to its summary and its chart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.curves import Panel
from benchmarks.serving_impls import (
    ALL_UNIFIED,
    AUTO,
    AUTO_MEAN,
    DIVIDED,
    DYNAMIC,
    MEAN,
    SHORTEST,
    STATIC,
    UNIFIED,
    with_mixed_tokens,
)
from jpd.bench import slo
from jpd.bench.slo import Goodput

SLOS = {"tight": slo.TIGHT, "loose": slo.LOOSE}
"""Times the unloaded latencies."""
GOODPUT_RATIOS = {
    "goodput_vs_prefill_first": ("prefill_first", 1),
    "goodput_vs_chunked": ("chunked", 1),
    "goodput_dynamic_vs_100_100": (STATIC, 1),
    "goodput_vs_disaggregated_per_gpu": ("disaggregated", 2),
}
"""Whose goodput, and on how many GPUs."""
VS_BEST_UNIFIED = "goodput_vs_best_unified"


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


def unified_rivals(measured: Collection[str], impl: str) -> list[str]:
    """The unified policies that were measured, smaller steps too; for a twin their twins too."""
    orders = ("", SHORTEST) if impl.endswith(SHORTEST) else ("",)
    return [of + order for order in orders for of in ALL_UNIFIED if of + order in measured]


def best_e2e_ms(curves: Mapping[str, Curve], impls: Iterable[str], rate: float) -> float:
    """Of those that were measured at the rate; infinite where none was."""
    of = [curves[impl] for impl in impls]
    return min((c.e2e_ms[c.rates.index(rate)] for c in of if rate in c.rates), default=math.inf)


def add_speedups(summary: dict[str, Any], curves: Mapping[str, Curve], impl: str) -> None:
    """Adds how much better its mean E2E is than that of the best unified policy.

    A twin is compared with the twins of those too, where they were measured.

    Args:
        summary: gets three keys, and entries of its `relations` and `null_because`.
        curves: of a workload.
        impl: whose speed-up.
    """
    highest, at_80, even = keys = (
        "mean_e2e_speedup_max",
        "mean_e2e_speedup_at_80pct_load",
        "break_even_rate",
    )
    summary |= dict.fromkeys(keys)
    missing = summary["null_because"]
    reason = absent(curves, (*UNIFIED, impl))
    common = [] if reason else common_rates(curves, impl)
    if not common:
        missing |= dict.fromkeys(keys, reason or "no rate was measured with all three")
        return
    ours, rivals = curves[impl], unified_rivals(curves, impl)
    speedups = [best_e2e_ms(curves, rivals, r) / best_e2e_ms(curves, [impl], r) for r in common]
    loads = [ours.loads[ours.rates.index(r)] for r in common]
    summary[highest] = max(speedups)
    if min(loads) - 0.005 <= 0.8 <= max(loads) + 0.005:  # rates have three digits
        summary[at_80] = float(np.interp(0.8, loads, speedups))
    else:
        missing[at_80] = f"loads {min(loads):.2f} to {max(loads):.2f} were measured"
    summary[even], relation = break_even(common, speedups)
    if summary[even] is None:
        missing[even] = f"no unified policy is better at a rate measured, from {common[0]:g} on"
    else:
        summary["relations"][even] = relation


def add_break_even_ratio(summary: dict[str, Any], curves: Mapping[str, Curve]) -> None:
    """Adds what `BreakEven` should be told, by the dynamic controller's break-even.

    Args:
        summary: of a workload, with its speed-ups; gets a key or an entry of `null_because`.
        curves: of a workload.
    """
    key, missing = "break_even_ratio", summary["null_because"]
    summary[key], rate = None, summary["break_even_rate"]
    if rate is None:
        missing[key] = missing["break_even_rate"]
        return
    rates = common_rates(curves, DYNAMIC)
    rivals = unified_rivals(curves, DYNAMIC)
    better = [curves[min(rivals, key=lambda u, r=r: best_e2e_ms(curves, [u], r))] for r in rates]
    if all(of.per_waiting is not None for of in better):
        ratios = [of.per_waiting[of.rates.index(r)] for of, r in zip(better, rates, strict=True)]
        summary[key] = float(np.interp(rate, rates, ratios))
    else:
        missing[key] = "saved_per_waiting was not counted"


def add_auto(
    summary: dict[str, Any], curves: Mapping[str, Curve], auto: str, controllers: Iterable[str]
) -> None:
    """Adds whether `topology="auto"` took the better one.

    Args:
        summary: gets a key and, where it is None, an entry of `null_because`.
        curves: of a workload.
        auto: which of them.
        controllers: on two executors; those that were measured count.
    """
    key = "auto_vs_better_min"
    summary[key] = None
    two = [impl for impl in controllers if impl in curves]
    reason = absent(curves, [*UNIFIED, auto]) or (None if two else "no controller was measured")
    rates = [] if reason else common_rates(curves, auto)
    rates = [r for r in rates if best_e2e_ms(curves, two, r) < math.inf]
    if not rates:
        summary["null_because"][key] = reason or f"{auto} not measured at a rate of the others"
        return
    others = [*unified_rivals(curves, auto), *two]
    ratios = [best_e2e_ms(curves, others, r) / best_e2e_ms(curves, [auto], r) for r in rates]
    summary[key] = min(ratios)


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
    others = {key: (impl + SHORTEST * twins, n) for key, (impl, n) in GOODPUT_RATIOS.items()}
    for key, (other, gpus) in others.items():
        reason = absent(goodputs, (ours, other))
        add_ratio(part, summary, label, key, reason or (goodputs[ours], goodputs[other], gpus))
    if not twins:
        rivals = unified_rivals(goodputs, ours)
        reason = absent(goodputs, (ours, *(rivals or UNIFIED)))
        best = reason or (goodputs[ours], most([goodputs[rival] for rival in rivals]), 1)
        add_ratio(part, summary, label, VS_BEST_UNIFIED, best)


def add_ratio(
    part: dict[str, Any],
    summary: dict[str, Any],
    label: str,
    key: str,
    of: str | tuple[Goodput, Goodput, int],
) -> None:
    """Adds one ratio, and its relation or why it is None: `of` says that, or whose it is."""
    part[key] = None
    ratio = of if isinstance(of, str) else divide(*of)
    if ratio is None:
        ratio = "both curves stay on the same side of 90 % at all rates measured"
    if isinstance(ratio, str):
        summary["null_because"][label + key] = ratio
    else:
        part[key], summary["relations"][label + key] = ratio


def most(goodputs: Sequence[Goodput]) -> Goodput:
    """The highest of some: a bound from below where one of them is, for that may be the highest.

    One that is below a rate may be the highest, too, if that is above what is known of the others.
    """
    known = [found for found in goodputs if found.relation != "<"]
    rate = max(found.rate for found in known or goodputs)
    if not known:
        return Goodput(rate, "<")
    higher = any(of.relation == ">=" or (of.relation == "<" and of.rate > rate) for of in goodputs)
    return Goodput(rate, ">=" if higher else "=")


def empty() -> dict[str, Any]:
    """A part of a summary with nothing in it yet."""
    return {"relations": {}, "null_because": {}}


def speedups_of(curves: Mapping[str, Curve], impl: str) -> dict[str, Any]:
    """What one implementation gains in mean E2E."""
    summary = empty()
    add_speedups(summary, curves, impl)
    return summary


def summarise_one(
    curves: Mapping[str, Curve], goodputs: Mapping[str, Goodput], impl: str
) -> dict[str, Any]:
    """What one implementation gains: mean E2E and goodput over those of the others."""
    summary = speedups_of(curves, impl)
    add_goodputs(summary, summary, goodputs, impl)
    return summary


def add_autos(
    summary: dict[str, Any],
    curves: Mapping[str, Curve],
    goodputs: Mapping[str, Goodput],
    order: str = "",
) -> None:
    """Adds what `auto` gains without an SLO and with smaller steps, where that was measured, and
    whether it took the better one.

    Args:
        summary: gets a part for each, by its name in order of arrival.
        curves: of a workload.
        goodputs: of each implementation.
        order: `SHORTEST` for their twins.
    """
    _, *smaller = with_mixed_tokens(AUTO)
    rivals = dict.fromkeys(smaller, (DYNAMIC + order,))
    rivals |= dict.fromkeys(with_mixed_tokens(AUTO_MEAN), (MEAN + order, DYNAMIC + order))
    for auto, controllers in rivals.items():
        if auto + order in curves:
            part = summary[auto] = summarise_one(curves, goodputs, auto + order)
            add_auto(part, curves, auto + order, controllers)


def summarise_shortest(
    curves: Mapping[str, Curve], goodputs: Mapping[str, Goodput]
) -> dict[str, Any]:
    """What the controllers' twins gain, with the tight SLO.

    Their mean E2E and goodput are compared with the best unified policy, goodput with each of the
    others, too, and, in `against_twins`, that of `semi_pd_dynamic_shortest` with each of their
    twins. `auto`s have parts of their own.
    """
    summary = summarise_one(curves, goodputs, DYNAMIC + SHORTEST)
    add_auto(summary, curves, AUTO + SHORTEST, [DYNAMIC + SHORTEST])
    twins = summary["against_twins"] = empty()
    add_goodputs(twins, twins, goodputs, DYNAMIC + SHORTEST, twins=True)
    summary["without_slo"] = speedups_of(curves, MEAN + SHORTEST)
    add_autos(summary, curves, goodputs, SHORTEST)
    return summary


def summarise_workload(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One workload's part of the summary, from its points that were measured."""
    curves = {
        impl: curve([row for row in rows if row["impl"] == impl])
        for impl in dict.fromkeys(row["impl"] for row in rows)
    }
    summary = speedups_of(curves, DYNAMIC)
    add_break_even_ratio(summary, curves)
    add_auto(summary, curves, AUTO, [DYNAMIC])
    summary["without_slo"] = speedups_of(curves, MEAN)
    goodputs = {
        scale: {i: slo.goodput(c.rates, c.attained[scale]) for i, c in curves.items()}
        for scale in SLOS
    }
    summary["loose"] = {}
    for scale, part in (("tight", summary), ("loose", summary["loose"])):
        part["goodput"] = {impl: list(found) for impl, found in goodputs[scale].items()}
        label = "" if scale == "tight" else f"{scale} "
        add_goodputs(part, summary, goodputs[scale], DYNAMIC, label)
    add_autos(summary, curves, goodputs["tight"])
    if fixed := [impl for impl in curves if impl in DIVIDED]:
        summary["fixed"] = {i: summarise_one(curves, goodputs["tight"], i) for i in fixed}
    steered = (DYNAMIC, MEAN, *with_mixed_tokens(AUTO), *with_mixed_tokens(AUTO_MEAN))
    if {impl + SHORTEST for impl in steered} & curves.keys():
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
