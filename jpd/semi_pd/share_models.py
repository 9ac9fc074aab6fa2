"""How long each phase takes under an SM share, fitted to what a server sees while it serves.

`TtftModel` and `TpotModel` are the paper's Eq. 4 (arXiv 2504.19867 §5). `PrefillTimeModel` and
`DecodeTimeModel` are ours: they describe steps, not queues, and know that decode is bound by
memory bandwidth (it keeps its speed on half of the SMs) and that phases whose shares overlap wait
for each other. All show what they learned: `coefficients`, `r_squared`, `points`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from jpd.config import require
from jpd.semi_pd.controller import Shares, require_positive


class _Eq4Model:
    """T(s) = a / (s - lambda) + b with a, b, lambda >= 0, by least squares.

    The share `s` is relative, 0..1: Algorithm 1's x / (x + y). For each lambda of a grid the best
    a and b come in closed form; the best lambda of them wins.
    """

    min_shares: int
    """Distinct shares that must have been seen before the fit is used: one for each coefficient."""

    def __init__(self, max_points: int = 32) -> None:
        """Args: max_points: Windows remembered, latest ones; the load changes, so must the fit."""
        require(
            max_points >= self.min_shares, "max_points", max_points, f"at least {self.min_shares}"
        )
        self._points: deque[tuple[float, float]] = deque(maxlen=max_points)
        self._coefficients: tuple[float, float, float] | None = None
        self._r_squared: float | None = None

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """(relative share, seconds) that the fit rests on."""
        return tuple(self._points)

    @property
    def coefficients(self) -> dict[str, float] | None:
        """`a` (seconds times share), `b` (seconds), `lambda` (share); None before the first point.

        With fewer than `min_shares` distinct shares they are Eq. 1's proportionality through the
        last point: b = lambda = 0.
        """
        if self._coefficients is None:
            return None
        return dict(zip(("a", "b", "lambda"), self._coefficients, strict=True))

    @property
    def r_squared(self) -> float | None:
        """Share of the variance that the fit explains; None while Eq. 1 stands in for a fit."""
        return self._r_squared

    def update(self, share: float, seconds: float) -> None:
        """Adds an observed latency under a relative share (0..1) and fits again."""
        require(0 < share <= 1, "share", share, "above 0, at most 1")
        self._points.append((share, seconds))
        shares, times = np.array(self._points).T
        if len(np.unique(shares)) < self.min_shares:
            self._coefficients, self._r_squared = (share * seconds, 0.0, 0.0), None
            return
        fits = [(*_line(1 / (shares - low), times), low) for low in self._lambdas(shares.min())]
        a, b, low = min(fits, key=lambda fit: _squares(fit[0] / (shares - fit[2]) + fit[1], times))
        self._coefficients = (float(a), float(b), float(low))
        spread = _squares(times.mean(), times)
        left = _squares(a / (shares - low) + b, times)
        self._r_squared = 1 - left / spread if spread > 0 else 1.0

    def predict(self, share: float) -> float:
        """Seconds under a relative share; infinite at and below lambda.

        Raises:
            ValueError: Nothing has been observed.
        """
        if self._coefficients is None:
            raise ValueError("no latency has been observed yet: update() first")
        a, b, low = self._coefficients
        return a / (share - low) + b if share > low else math.inf

    def _lambdas(self, lowest_share: float) -> np.ndarray:
        raise NotImplementedError


class TtftModel(_Eq4Model):
    """Eq. 4: TTFT(x) = a1 / (x - lambda) + b1, an M/M/1 queue whose service rate follows x.

    `lambda` is the share at which the queue would grow without end. Three coefficients, so it is
    used once three distinct shares were seen.
    """

    min_shares = 3

    def _lambdas(self, lowest_share: float) -> np.ndarray:
        return np.linspace(0, 0.99 * lowest_share, 100)


class TpotModel(_Eq4Model):
    """Eq. 4: TPOT(y) = a2 / y + b2. Decode batches at once, so there is no queue and no lambda.

    Two coefficients, so it is used once two distinct shares were seen.
    """

    min_shares = 2

    def _lambdas(self, lowest_share: float) -> np.ndarray:
        return np.zeros(1)


def _line(inverse: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """Least squares of a * inverse + b with a, b >= 0; where one would be negative, it is 0."""
    centred = inverse - inverse.mean()
    a = (centred @ times) / (centred @ centred)
    b = times.mean() - a * inverse.mean()
    if a < 0:
        return 0.0, times.mean()
    if b < 0:
        return (inverse @ times) / (inverse @ inverse), 0.0
    return a, b


def _squares(predicted: np.ndarray | float, times: np.ndarray) -> float:
    return float(((predicted - times) ** 2).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """What the two phases do to each other, besides having fewer SMs. Measured once, not fitted.

    The defaults describe one H200 with Llama-3.1-8B and jpd's kernels: a prompt chunk of 2048
    tokens beside decode of 64 x 1024 and 32 x 1024 under (100, 100), (80, 20), (70, 30) and
    (60, 40), within 5 % of what `python -m benchmarks.sm_share_surface` measured, to which they
    were fitted (`benchmarks/results/h200/sm_share_surface.json`). What disjoint shares cost seems
    to be mostly the card's power limit: beside decode's products on 30 % of the SMs, products of
    2048 rows on 70 % took 1.29 to 1.33 times as long with the fastest tiles for each, and the SMs
    were clocked down from 1850 to 1439 MHz, 1.29 times, at 690 of 700 W (a trial whose script is
    not kept).

    Shares that overlap in part were not measured alone but for (100, 30), where the two took turns
    step by step, and decode took a quarter (64 rows) to a third (32) longer than this says.
    `overlap_offset` is of serving azure_conv at four rates with a controller that had (90, 100) and
    (80, 100), when decode steps were longer (a trial that is not kept).
    """

    prefill_slowdown: float = 1.18
    """Prefill's time beside decode over its time alone, when both have SMs in common: 1.20 beside
    64 rows, 1.15 beside 32. Under (100, 100) the phases do no more in sum than one of them alone:
    prefill 83 %, decode 18 %."""
    prefill_pull: float = 0.92
    """When they have none it is 1 + prefill_pull * y / 100: decode with more SMs leaves less of the
    power."""
    decode_slowdown: float = 1.27
    """The same for decode, when the shares have no SM in common."""
    overlap_wait: float = 218.0
    overlap_offset: float = 30.0
    """When they have, each of decode's kernels waits for SMs that prefill holds. A step has as many
    kernels whatever its rows (32 and 64 waited equally long), so it waits
    overlap_wait / (100 - x + overlap_offset) of the time that a step without rows takes alone at
    100 %; percent of the SMs."""

    def __post_init__(self) -> None:
        require(self.prefill_slowdown >= 1, "prefill_slowdown", self.prefill_slowdown, ">= 1")
        require(self.prefill_pull >= 0, "prefill_pull", self.prefill_pull, ">= 0")
        require(self.decode_slowdown >= 1, "decode_slowdown", self.decode_slowdown, ">= 1")
        require(self.overlap_wait >= 0, "overlap_wait", self.overlap_wait, ">= 0")
        require_positive("overlap_offset", self.overlap_offset)


H200 = Interference()
H200_SERVING = replace(H200, prefill_slowdown=1.25)
"""Nearer to a server, whose chunks are shorter and have as many kernels that wait for decode's.
Serving azure_conv, a prompt token took 1.18 to 1.20 times as long under (70, 30) as under
(100, 100) in three pairs of runs (a trial that is not kept), as with a `prefill_slowdown` of 1.31
to 1.34. This is between that and what steps of 2048 tokens took: with an SLO that (100, 100) just
keeps, a controller that knows 1.3 leaves it more often, and fewer requests keep it (simulated)."""


def prefill_curve(percent, parallel: float):
    """Prefill's time under a share over that at 100 %: 1 - p + p * 100 / share.

    `parallel` is the part p of the time that more SMs shorten; 0.55 is within 4 % of a chunk of
    2048 tokens at 80, 70 and 60 % (`Interference` says where). The real curve has steps, as
    products run in waves of tiles: 70 % is a little better than this, 60 % a little worse. 1 is the
    paper's Eq. 1.
    """
    return 1 - parallel + parallel * 100 / percent


def decode_curve(percent, knee: float):
    """Decode's time under a share over that on unlimited SMs: flat above the knee, 1/share below.

    (1 + (knee / share)^4)^(1/4). With the knee at 46.5 % it is within 3 % of decode of 64 x 1024 at
    40, 30 and 20 %, at 43 % within 4 % of 32 x 1024 (`Interference` says where), with a table that
    has products for the SMs of 40 and 30 % and none for those of 20 %. Fewer rows need fewer SMs.
    """
    return (1 + (knee / percent) ** 4) ** 0.25


def prefill_beside(shares: Shares, interference: Interference) -> float:
    """Prefill's time beside decode over its time alone."""
    if shares.prefill + shares.decode <= 100:
        return 1 + interference.prefill_pull * shares.decode / 100
    return interference.prefill_slowdown


def overlap_wait(shares: Shares, interference: Interference) -> float:
    """What a decode step waits for prefill's SMs, over the time of one without rows at 100 %."""
    if shares.prefill + shares.decode <= 100:
        return 0.0
    return interference.overlap_wait / (100 - shares.prefill + interference.overlap_offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step did, as far as its time depends on it."""

    shares: Shares
    other_busy: float
    """Part of the time, 0..1, in which the other phase worked."""
    sequences: float = 1.0
    """Sequences in a decode step; of no account for prefill, whose times are for a token."""


class _StepModel:
    """time = scale * shape(work, parameters), fitted in logarithms: 10 % off is the same anywhere.

    The scale (the model, the GPU, the contexts) is free. The shape's parameters come from a grid
    and are drawn to their priors: one time is enough to begin with, and the more different work
    has been seen, the less they pull. They pull the more, the more times of the same work differ
    (`noise`): a parameter a quarter of its grid from the prior counts like one time that is off by
    as much.
    """

    def __init__(
        self,
        grid: dict[str, np.ndarray],
        prior: dict[str, float],
        interference: Interference,
        memory_s: float,
        noise: float,
    ) -> None:
        require_positive("memory_s", memory_s)
        require_positive("noise", noise)
        self.interference = interference
        self.noise = noise
        self._memory_s = memory_s
        corners = np.meshgrid(*grid.values())
        self._grid = {name: c.ravel() for name, c in zip(grid, corners, strict=True)}
        offsets = [
            (self._grid[name] - prior[name]) / np.ptp(values) for name, values in grid.items()
        ]
        self._prior_cost = np.square(4 * noise) * np.sum(np.square(offsets), axis=0)
        self._parameters = dict(prior)
        self._scale_s: float | None = None
        self._r_squared: float | None = None
        # When, what, how long, and the shape's logarithm for each parameter of the grid.
        self._points: dict[tuple, tuple[float, Work, float, np.ndarray]] = {}

    @property
    def points(self) -> tuple[tuple[Work, float], ...]:
        """(work, seconds) that the fit rests on: the latest for each pair of shares and, in powers
        of two, number of sequences."""
        return tuple((work, seconds) for _, work, seconds, _ in self._points.values())

    @property
    def coefficients(self) -> dict[str, float]:
        """The shape's parameters (their priors at first) and `scale_s` once a time was seen."""
        scale = {} if self._scale_s is None else {"scale_s": self._scale_s}
        return self._parameters | scale

    @property
    def r_squared(self) -> float | None:
        """Part of the variance of the times that the fit explains; None while they do not vary."""
        return self._r_squared

    def update(self, now_s: float, work: Work, seconds: float) -> None:
        """Takes the time of some work, forgets those older than `memory_s`, and fits again."""
        require_positive("seconds", seconds)
        require(0 <= work.other_busy <= 1, "other_busy", work.other_busy, "0..1")
        shape = np.log(self._shape(work, self._grid))
        self._points[work.shares, math.frexp(work.sequences)[1]] = (now_s, work, seconds, shape)
        self._points = {
            key: point for key, point in self._points.items() if now_s - point[0] <= self._memory_s
        }
        logs = np.log([seconds for _, seconds in self.points])
        shapes = np.stack([shape for *_, shape in self._points.values()])  # [points, grid]
        left = logs[:, None] - shapes
        scales = left.mean(axis=0)
        best = int((np.square(left - scales).sum(axis=0) + self._prior_cost).argmin())
        self._parameters = {name: float(values[best]) for name, values in self._grid.items()}
        self._scale_s = math.exp(scales[best])
        times = np.exp(logs)
        spread = _squares(times.mean(), times)
        off = _squares(np.exp(shapes[:, best] + scales[best]), times)
        self._r_squared = 1 - off / spread if spread > 0 else None

    def predict(self, work: Work) -> float:
        """Seconds for this work.

        Raises:
            ValueError: Nothing has been observed.
        """
        if self._scale_s is None:
            raise ValueError("no time has been observed yet: update() first")
        return self._scale_s * float(self._shape(work, self._parameters))

    def _shape(self, work: Work, parameters: dict):
        raise NotImplementedError


class PrefillTimeModel(_StepModel):
    """Seconds a prompt token: `prefill_curve`, slower by a factor while decode works.

    Coefficient: `parallel`, the part of prefill's time at 100 % that SMs shorten, 0..1.
    """

    def __init__(
        self, interference: Interference = H200, memory_s: float = 60.0, noise: float = 0.05
    ) -> None:
        """Args:
        interference: of the two phases.
        memory_s: age at which a time is forgotten.
        noise: spread of the logarithm of the times of a token under the same shares; steps of
            other lengths, say, take another time for each.
        """
        super().__init__(
            {"parallel": np.linspace(0, 1, 21)}, {"parallel": 0.55}, interference, memory_s, noise
        )

    def _shape(self, work: Work, parameters: dict):
        beside = prefill_beside(work.shares, self.interference)
        slowdown = 1 + (beside - 1) * work.other_busy
        return slowdown * prefill_curve(work.shares.prefill, parameters["parallel"])


class DecodeTimeModel(_StepModel):
    """Seconds a decode step: `decode_curve`, longer for more sequences and, while prefill works,
    for its slowdown; then another `overlap_wait`, whatever the sequences. Where prefill works for
    a part of the time it is the mean over the steps of that time, most of which are short.

    Coefficients: `knee`, the share in percent below which decode slows down, 10..90; `log2_wait`,
    -3..3, what the overlap wait must be multiplied with, as a power of two (0: as measured);
    `log2_sequences`, 3..11, how many sequences double the time of a step with none.
    """

    def __init__(
        self, interference: Interference = H200, memory_s: float = 60.0, noise: float = 0.05
    ) -> None:
        """Args:
        interference: of the two phases.
        memory_s: age at which a time is forgotten.
        noise: spread of the logarithm of the times of the same work; what the other phase does
            beside it differs, say.
        """
        super().__init__(
            {
                "knee": np.linspace(10, 90, 17),
                "log2_wait": np.linspace(-3, 3, 7),
                "log2_sequences": np.linspace(3, 11, 9),
            },
            {"knee": 45.0, "log2_wait": 0.0, "log2_sequences": 7.0},
            interference,
            memory_s,
            noise,
        )

    def _shape(self, work: Work, parameters: dict):
        alone = decode_curve(work.shares.decode, parameters["knee"])
        wait = overlap_wait(work.shares, self.interference) * np.exp2(parameters["log2_wait"])
        batch = alone * (1 + work.sequences / 2 ** parameters["log2_sequences"])
        beside = batch * self.interference.decode_slowdown + wait
        return 1 / ((1 - work.other_busy) / batch + work.other_busy / beside)
