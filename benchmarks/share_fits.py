"""What `benchmarks/sm_share_surface.py` measured, and how well models of it fit."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.curves import Panel
from jpd.semi_pd.controller import Shares
from jpd.semi_pd.share_models import (
    DecodeTimeModel,
    PrefillTimeModel,
    TpotModel,
    TtftModel,
    Work,
)
from jpd.simulate.fit import MeasuredStep


class Size(NamedTuple):
    """What a step computes."""

    rows: int
    """Decoding sequences; 0 for a prompt chunk."""
    tokens: int
    """Of the prompt chunk, or of each sequence's context to begin with."""
    context: int
    """Where the chunk ends; for decoding rows as `tokens`."""

    @property
    def phase(self) -> str:
        return "decode" if self.rows else "prefill"

    def __str__(self) -> str:
        if self.rows:
            return f"{self.rows} x {self.tokens}"
        return f"{self.tokens} up to {self.context}"


class Key(NamedTuple):
    """Steps that should take equally long."""

    size: Size
    shares: Shares
    beside: str | None
    """What the other phase was given; None if it had nothing."""

    @property
    def case(self) -> str:
        """As in result rows."""
        beside = "alone" if self.beside is None else f"beside {self.beside}"
        return f"{self.size.phase} {self.size} {self.shares} {beside}"


def typical(steps: Sequence[MeasuredStep]) -> MeasuredStep:
    """One step for those of one key: the median time, the mean of what ran beside."""
    middle = steps[len(steps) // 2]
    return dataclasses.replace(
        middle,
        other_busy=float(np.mean([step.other_busy for step in steps])),
        seconds=float(np.median([step.seconds for step in steps])),
    )


def fields_of(key: Key, steps: Sequence[MeasuredStep]) -> dict[str, Any]:
    """Fields of the row of a key, of which `steps_of` makes key and typical step again."""
    p10, p90 = np.percentile([step.seconds for step in steps], (10, 90))
    return {
        "phase": key.size.phase,
        **dataclasses.asdict(typical(steps)),
        "tokens": key.size.tokens,
        "context": key.size.context,
        "beside": key.beside,
        "p10_s": float(p10),
        "p90_s": float(p90),
        "steps": len(steps),
    }


def steps_of(rows: Iterable[Mapping[str, Any]]) -> dict[Key, MeasuredStep]:
    """The typical step of each row that was measured."""
    names = [field.name for field in dataclasses.fields(MeasuredStep)]
    found = {}
    for row in rows:
        if row["status"] == "ok":
            size = Size(row["rows"], row["tokens"], row["context"])
            shares = Shares(row["prefill_share"], row["decode_share"])
            step = MeasuredStep(**{name: row[name] for name in names})
            found[Key(size, shares, row["beside"])] = step
    return found


def model_errors(steps: Mapping[Key, MeasuredStep]) -> dict[str, list[float]]:
    """For each model, |predicted / measured - 1| at every step that it was fitted to."""
    errors: dict[str, list[float]] = defaultdict(list)
    groups: dict[tuple[str, int, int], dict[Key, MeasuredStep]] = defaultdict(dict)
    for key, step in steps.items():
        groups[key.size.phase, key.size.tokens, key.size.context][key] = step
    for (phase, *_), group in groups.items():
        # Each kind that ran beside another phase, with those that ran alone.
        for beside in {key.beside for key in group} - {None} or {None}:
            fitted = [(k, step) for k, step in group.items() if k.beside in (None, beside)]
            errors[f"{phase}_model"] += _step_model_errors(phase, fitted)
    alone = {key: step for key, step in steps.items() if key.beside is None}
    for phase, model in (("prefill", TtftModel), ("decode", TpotModel)):
        for size in {key.size for key in alone if key.size.phase == phase}:
            eq4, points = model(), []
            for key, step in alone.items():
                if key.size == size:
                    points.append((getattr(key.shares, phase) / 100, step.seconds))
                    eq4.update(*points[-1])
            if eq4.r_squared is not None:  # it has seen enough shares
                errors[f"paper_{phase}"] += [abs(eq4.predict(x) / s - 1) for x, s in points]
    return dict(errors)


def _step_model_errors(phase: str, steps: Sequence[tuple[Key, MeasuredStep]]) -> list[float]:
    model = PrefillTimeModel() if phase == "prefill" else DecodeTimeModel()
    points = []
    for key, step in steps:
        shares = key.shares
        if key.beside is None:
            # The other phase's share is of no account then. A value that is not used otherwise: a
            # model keeps one time for each pair of shares.
            other = "decode" if phase == "prefill" else "prefill"
            shares = dataclasses.replace(shares, **{other: 1})
        work = Work(shares=shares, other_busy=step.other_busy, sequences=max(1, step.rows))
        points.append((work, step.seconds))
        model.update(0.0, *points[-1])
    return [abs(model.predict(work) / seconds - 1) for work, seconds in points]


def summarise(steps: Mapping[Key, MeasuredStep]) -> dict[str, float]:
    """Mean and largest error of each model, and what the two phases cost each other at most."""
    summary = {}
    for name, errors in sorted(model_errors(steps).items()):
        summary |= {f"{name}_mean_error": float(np.mean(errors)), f"{name}_max_error": max(errors)}
    for phase in ("prefill", "decode"):
        ratios = [
            step.seconds / steps[key._replace(beside=None)].seconds
            for key, step in steps.items()
            if key.size.phase == phase
            and key.beside is not None
            and key._replace(beside=None) in steps
        ]
        if ratios:
            summary[f"{phase}_max_slowdown_beside"] = max(ratios)
    return summary


def clock_ratio(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The SMs' clock alone over that side by side, where prefill is slowed down most.

    Nothing where it is not known. If the clock is why prefill is slowed down, it is as much.
    """
    steps = steps_of(rows)
    clocks = {key: row.get("sm_mhz") for row in rows for key in steps_of([row])}
    found = {}
    for key, step in steps.items():
        alone = key._replace(beside=None)
        if key.size.phase == "prefill" and key.beside is not None and alone in steps:
            found[step.seconds / steps[alone].seconds] = clocks[alone], clocks[key]
    before, beside = found[max(found)] if found else (None, None)
    return {"prefill_max_slowdown_clock_ratio": before / beside} if before and beside else {}


def panels(steps: Mapping[Key, MeasuredStep]) -> list[list[Panel]]:
    """Time over the share of the phase, alone and side by side."""
    grid = []
    for phase in ("prefill", "decode"):
        alone: dict[str, list[tuple[float, float]]] = defaultdict(list)
        beside: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for key, step in steps.items():
            if key.size.phase == phase:
                share = getattr(key.shares, phase) if key.beside is None else key.shares.prefill
                name = str(key.size) + ("" if key.beside is None else f" beside {key.beside}")
                (alone if key.beside is None else beside)[name].append((share, 1e3 * step.seconds))
        labels = ((alone, "alone", phase), (beside, "side by side", "prefill"))
        grid.append(
            [
                Panel(
                    f"{phase}, {how}",
                    f"SM share of {whose} in %",
                    "ms a step",
                    {name: tuple(zip(*sorted(points), strict=True)) for name, points in of.items()},
                )
                for of, how, whose in labels
            ]
        )
    return grid
