"""Fits a latency model to steps that were measured, and says how far off it is.

A file of steps is a JSON object with `source` (text: what was measured on what), `overheads`
(fields of `Overheads`), `steps` (a list of objects with the fields of `MeasuredStep`) and
`tensor_parallel_size` (of the engine; 1 when not given).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jpd.checkpoint.config import read_json
from jpd.config import require
from jpd.errors import ConfigError
from jpd.semi_pd.controller import Shares
from jpd.semi_pd.share_models import H200, Interference, overlap_wait
from jpd.simulate.latency import DecodeTime, LatencyModel, Overheads, PromptTime, StepWork

_SLOWDOWN = np.linspace(1, 2.5, 61)
_GRIDS = {
    "parallel": np.linspace(0, 1, 41),
    "knee": np.linspace(5, 100, 39),
    "prefill_slowdown": _SLOWDOWN,
    "prefill_pull": np.linspace(0, 3, 61),
    "decode_slowdown": _SLOWDOWN,
    "overlap_wait": np.array([0, *np.geomspace(1, 256, 49)]),
}
_PASSES = 5
"""Over decode steps whose waiting depends on what is fitted."""
_BESIDE = 0.05
"""A step beside which the other phase was busy for less of the time tells nothing of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep(StepWork):
    """A step that ran on a real engine. It is of the prompt phase if it has prompt tokens."""

    prefill_share: int = 100
    """Of the executor that computes prompts, in percent of the SMs."""
    decode_share: int = 100
    other_busy: float = 0.0
    """Part of the step's time, 0..1, in which the executor of the other phase computed."""
    seconds: float

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, number = getattr(self, f.name), int if f.type == "int" else (int, float)
            ok = isinstance(value, number) and not isinstance(value, bool) and value >= 0
            require(ok, f.name, value, f"{f.type}, at least 0")
        for name in ("prefill_share", "decode_share"):
            require(1 <= getattr(self, name) <= 100, name, getattr(self, name), "1..100 percent")
        require(self.other_busy <= 1, "other_busy", self.other_busy, "0..1")
        require(self.seconds > 0, "seconds", self.seconds, "above 0")
        require(self.rows + self.prompt_tokens > 0, "rows", self.rows, "1 at least, or a prompt")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What was measured."""

    source: str
    overheads: Overheads
    steps: list[MeasuredStep]
    tensor_parallel_size: int = 1
    """Of the engine."""

    def __post_init__(self) -> None:
        size = self.tensor_parallel_size
        ok = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        require(ok, "tensor_parallel_size", size, "an int, at least 1")

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> StepTimes:
        """Of a file.

        Raises:
          ConfigError: it is no such file, or a value is out of range.
        """
        found = read_json(path)
        try:
            return cls(
                str(found["source"]),
                Overheads(**found["overheads"]),
                [MeasuredStep(**step) for step in found["steps"]],
                found.get("tensor_parallel_size", 1),
            )
        except (KeyError, TypeError, ConfigError) as error:
            raise ConfigError(f"{path} holds no step times: {error}") from error


@dataclass(frozen=True, slots=True)
class FitError:
    """Of the steps of one phase: |model - measured| / measured."""

    steps: int
    mean: float
    p95: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A model, and how well it describes what it was fitted to."""

    model: LatencyModel
    decode: FitError | None
    """None where no such step was measured."""
    prompt: FitError | None

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def fit(times: StepTimes, *, prior: Interference = H200, start_s: float = 15.0) -> Fit:
    """Least squares with coefficients that are not negative.

    Parameters of SM shares and interference are taken from a grid where the steps can tell them
    apart (different shares; the other phase busy more and less), and else are the defaults.

    Args:
      times: measured.
      prior: interference where it was not measured.
      start_s: of `LatencyModel`.

    Raises:
      ConfigError: there is no step.
    """
    require(len(times.steps) > 0, "steps", times.steps, "at least one")
    prompts = [step for step in times.steps if step.prompt_tokens]
    decodes = [step for step in times.steps if not step.prompt_tokens]
    model = LatencyModel(
        source=times.source,
        tensor_parallel_size=times.tensor_parallel_size,
        decode=DecodeTime(),
        prompt=PromptTime(),
        overheads=times.overheads,
        interference=prior,
        start_s=start_s,
    )
    for steps in (prompts, decodes):
        if steps:
            model = _fit_phase(model, steps)
    return Fit(model, _error(model, decodes), _error(model, prompts))


def predict(model: LatencyModel, steps: Sequence[MeasuredStep]) -> np.ndarray:
    """Seconds of measured steps of one phase, by the model."""
    full_s = np.array([model.full_s(step) for step in steps])
    return full_s * _stretches(model, steps, _fixed_parts(model, steps))


def _fixed_parts(model: LatencyModel, steps: Sequence[MeasuredStep]) -> np.ndarray:
    """Part of each decode step's time on the whole GPU that one without rows takes; 1 if unknown.

    It is what a step waits in proportion to, where shares overlap.
    """
    full_s = np.array([model.full_s(step) for step in steps])
    return np.divide(model.decode.step_s, full_s, out=np.ones_like(full_s), where=full_s > 0)


def _stretches(
    model: LatencyModel, steps: Sequence[MeasuredStep], fixed_parts: np.ndarray
) -> np.ndarray:
    """What the time on the whole GPU is multiplied with, for steps of one phase.

    A step that ran beside another for a part f of its time got (1 - f) / a + f / b of itself done
    in a second, if it takes a alone and b, in which waiting is, beside the other.
    """
    is_prompt = steps[0].prompt_tokens > 0
    shares = np.array([(step.prefill_share, step.decode_share) for step in steps])
    rows = [0 if is_prompt else step.padded_rows for step in steps]
    cases = np.column_stack([shares if is_prompt else shares[:, ::-1], rows])
    distinct, index = np.unique(cases, axis=0, return_inverse=True)
    alone = np.array([model.stretch(is_prompt, own, None, n) for own, _, n in distinct.tolist()])
    beside = np.array([model.stretch(is_prompt, *case) for case in distinct.tolist()])[index]
    if not is_prompt:
        pairs = [Shares(other, own) for own, other, _ in distinct.tolist()]
        waits = np.array([overlap_wait(pair, model.interference) for pair in pairs])
        beside += waits[index] * fixed_parts
    busy = np.array([step.other_busy for step in steps])
    return 1 / ((1 - busy) / alone[index] + busy / beside)


def _with(model: LatencyModel, parameters: dict[str, float]) -> LatencyModel:
    """With other parameters of shares and interference."""
    own = {name: v for name, v in parameters.items() if name in ("parallel", "knee")}
    others = {name: v for name, v in parameters.items() if name not in own}
    interference = dataclasses.replace(model.interference, **others)
    return dataclasses.replace(model, interference=interference, **own)


def _told(steps: Sequence[MeasuredStep]) -> list[str]:
    """The parameters that steps of one phase can tell."""
    is_prompt = steps[0].prompt_tokens > 0
    own = {step.prefill_share if is_prompt else step.decode_share for step in steps}
    sums = {s.prefill_share + s.decode_share for s in steps if s.other_busy > _BESIDE}
    told = (["parallel"] if is_prompt else ["knee"]) if len(own) > 1 else []
    # Where shares overlap only one of decode's two can be told; waiting is the one that must be.
    disjoint, overlap = (
        ("prefill_pull", "prefill_slowdown") if is_prompt else ("decode_slowdown", "overlap_wait")
    )
    told += [disjoint] * any(total <= 100 for total in sums)
    return told + [overlap] * any(total > 100 for total in sums)


def _fit_phase(model: LatencyModel, steps: list[MeasuredStep]) -> LatencyModel:
    """The model with this phase's coefficients and parameters fitted.

    What decode waits depends on the coefficients themselves: they are fitted again with those found
    until they stay as they are.
    """
    for _ in range(_PASSES if "overlap_wait" in _told(steps) else 1):
        before, model = model, _fit_pass(model, steps)
        if model == before:
            break
    return model


def _fit_pass(model: LatencyModel, steps: list[MeasuredStep]) -> LatencyModel:
    """One of them, with the fixed parts of steps as the model says."""
    is_prompt = steps[0].prompt_tokens > 0
    time = PromptTime if is_prompt else DecodeTime
    counts = np.array([time.counts(step) for step in steps], float)
    measured = np.array([step.seconds for step in steps])
    fixed_parts = _fixed_parts(model, steps)

    def stretches_of(parameters: dict[str, float]) -> np.ndarray:
        return _stretches(_with(model, parameters), steps, fixed_parts)

    def solve(scale: np.ndarray, parameters: dict[str, float]) -> tuple[float, np.ndarray]:
        """Loss and coefficients, with errors relative to `scale`."""
        rows = counts * (stretches_of(parameters) / scale)[:, None]
        coefficients = non_negative_least_squares(rows, measured / scale)
        return float(np.square(rows @ coefficients - measured / scale).sum()), coefficients

    def reweighted(scale: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
        """The scale that comes of errors relative to the model.

        Relative to a noisy time, they would pull towards its short ones and make means too short.
        """
        stretches = stretches_of(parameters)
        for _ in range(5):
            _, coefficients = solve(scale, parameters)
            scale = np.maximum(counts @ coefficients * stretches, 0.05 * measured.mean())
        return scale

    values = {**dataclasses.asdict(model.interference), "parallel": model.parallel}
    values["knee"] = model.knee
    parameters = {name: values[name] for name in _told(steps)}
    scale = reweighted(np.full(len(steps), measured.mean()), parameters)
    # For the parameters of shares the times themselves are the better scale, since the model is not
    # right yet; but where a host is late to notice an end, the next step seems to take no time.
    scale = np.maximum(measured, scale / 3)
    loss, coefficients = solve(scale, parameters)
    # One parameter after the other, until none gets better.
    better = True
    while better:
        better = False
        for name in parameters:
            for value in _GRIDS[name].tolist():
                tried = {**parameters, name: value}
                new_loss, new = solve(scale, tried)
                if new_loss < loss * (1 - 1e-6):
                    better, loss, coefficients, parameters = True, new_loss, new, tried
    _, coefficients = solve(reweighted(scale, parameters), parameters)
    model = _with(model, parameters)
    names = [f.name for f in dataclasses.fields(time)]
    fitted = time(**dict(zip(names, coefficients.tolist(), strict=True)))
    return dataclasses.replace(model, **{"prompt" if is_prompt else "decode": fitted})


def non_negative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |matrix x - target|, exactly: the best of all choices of zeros."""
    scale = np.abs(matrix).max(axis=0)
    used = np.flatnonzero(scale)
    columns = matrix[:, used] / scale[used]
    gram, projected = columns.T @ columns, columns.T @ target
    best, least = np.zeros(matrix.shape[1]), 0.0
    for size in range(1, len(used) + 1):
        for chosen in map(list, itertools.combinations(range(len(used)), size)):
            part = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], projected[chosen])[0]
            if (part < 0).any():
                continue
            # |Ax - b|^2 - |b|^2, which for a least squares solution is -x.A'b.
            loss = float(part @ gram[np.ix_(chosen, chosen)] @ part - 2 * part @ projected[chosen])
            if loss < least - 1e-12 * len(target):
                least = loss
                best = np.zeros(matrix.shape[1])
                best[used[chosen]] = part / scale[used[chosen]]
    return best


def _error(model: LatencyModel, steps: list[MeasuredStep]) -> FitError | None:
    if not steps:
        return None
    off = np.abs(predict(model, steps) / [step.seconds for step in steps] - 1)
    return FitError(len(off), float(off.mean()), float(np.percentile(off, 95)))
