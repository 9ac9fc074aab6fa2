"""A workload as plain data: when requests come, and how many tokens they take and give.

Nothing is clipped: a request that does not fit is left out whole and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival.

    Raises:
      ValueError: columns differ in length, hold nothing, times fall or are negative, or a length is
        below one token.
    """

    name: str
    arrivals_s: np.ndarray
    """[n] float64; 0 is when the workload starts, which may be before the first request."""
    prompt_tokens: np.ndarray
    """[n] int64."""
    output_tokens: np.ndarray
    """[n] int64."""
    source: str
    """Where the numbers come from and what was done to them."""
    left_out: int = 0
    """Rows passed over because they do not fit. A result should name it: without its long requests
    a workload is easier than its source."""

    def __post_init__(self) -> None:
        for name, dtype in (
            ("arrivals_s", np.float64),
            ("prompt_tokens", np.int64),
            ("output_tokens", np.int64),
        ):
            column = np.array(getattr(self, name), dtype)
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        n = len(self.arrivals_s)
        if n == 0 or len(self.prompt_tokens) != n or len(self.output_tokens) != n:
            columns = (n, len(self.prompt_tokens), len(self.output_tokens))
            raise ValueError(f"columns must be equally long and not empty, got lengths {columns}")
        if not (self.arrivals_s[0] >= 0 and np.all(np.diff(self.arrivals_s) >= 0)):
            raise ValueError("arrivals_s must not be negative or fall")
        if self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1:
            raise ValueError("prompt_tokens and output_tokens must be at least 1")

    def __len__(self) -> int:
        return len(self.arrivals_s)

    @property
    def rate(self) -> float:
        """Requests/s between the first and the last one; nan for fewer than two moments."""
        span_s = self.arrivals_s[-1] - self.arrivals_s[0]
        return float((len(self) - 1) / span_s) if span_s > 0 else math.nan

    def describe(self) -> dict[str, Any]:
        """What a result should say of its workload."""
        return {
            "workload": self.name,
            "source": self.source,
            "num_prompts": len(self),
            "left_out": self.left_out,
            "rate": self.rate,
            "mean_prompt_tokens": float(self.prompt_tokens.mean()),
            "mean_output_tokens": float(self.output_tokens.mean()),
        }


def poisson(rate: float, n: int, seed: int) -> np.ndarray:
    """Arrival times [n] in s of a Poisson process: `gamma` with a burstiness of 1."""
    return gamma(rate, 1.0, n, seed)


def gamma(rate: float, burstiness: float, n: int, seed: int) -> np.ndarray:
    """Arrival times [n] in s as `vllm bench serve` makes them.

    Gaps, the one before the first request too, follow a Gamma distribution of shape `burstiness`;
    then all times are scaled so that the last is n / rate.

    Args:
      rate: mean requests/s.
      burstiness: the coefficient of variation of the gaps is 1 / sqrt(burstiness): 1 is Poisson,
        less is burstier, inf gives equal gaps.
      n: number of requests.
      seed: of the generator.

    Raises:
      ValueError: an argument is not positive.
    """
    _check_rate(rate)
    if not (burstiness > 0 and n >= 1):
        raise ValueError(f"burstiness and n must be positive, got {burstiness} and {n}")
    if math.isinf(burstiness):
        gaps = np.ones(n)
    else:
        gaps = generator(seed, "arrivals").gamma(burstiness, size=n)
    times = np.cumsum(gaps)
    return times * (n / rate / times[-1])


def select(
    workload: Workload,
    *,
    start_s: float = 0.0,
    duration_s: float = math.inf,
    n: int | None = None,
    max_total_tokens: int | None = None,
) -> Workload:
    """A part of a workload; its times count from `start_s`.

    Args:
      workload: what to take from.
      start_s: the first moment taken.
      duration_s: the part ends before `start_s + duration_s`.
      n: the first so many requests of the part; None takes all.
      max_total_tokens: requests with more prompt and output tokens are passed over, and counted in
        `left_out` if they come before the last one taken.

    Raises:
      ValueError: no request is left, or fewer than `n`.
    """
    inside = (workload.arrivals_s >= start_s) & (workload.arrivals_s < start_s + duration_s)
    limit = math.inf if max_total_tokens is None else max_total_tokens
    fits = workload.prompt_tokens + workload.output_tokens <= limit
    rows = np.flatnonzero(inside & fits)
    count = len(rows) if n is None else n
    check_count(count, len(rows))
    # Up to the last row taken, or to the end of the part.
    passed = inside if n is None else inside[: rows[count - 1] + 1]
    rows = rows[:count]
    notes = [] if start_s == 0 else [f"from {start_s:g} s on"]
    notes += [] if math.isinf(duration_s) else [f"{duration_s:g} s long"]
    notes += [] if n is None else [f"the first {n}"]
    notes += [] if max_total_tokens is None else [f"at most {max_total_tokens} tokens"]
    return replace(
        workload,
        arrivals_s=workload.arrivals_s[rows] - start_s,
        prompt_tokens=workload.prompt_tokens[rows],
        output_tokens=workload.output_tokens[rows],
        source="; ".join([workload.source, *notes]),
        left_out=workload.left_out + int(passed.sum()) - count,
    )


def rescale(workload: Workload, rate: float) -> Workload:
    """The same requests at another mean rate: times are scaled, lengths are not.

    Raises:
      ValueError: the rate is not positive, or all requests come at one moment.
    """
    _check_rate(rate)
    if math.isnan(workload.rate):
        raise ValueError("requests that all come at one moment cannot be rescaled")
    return replace(
        workload,
        arrivals_s=workload.arrivals_s * (workload.rate / rate),
        source=f"{workload.source}; times scaled from {workload.rate:.4g} to {rate:.4g} requests/s",
    )


def retime(workload: Workload, arrivals_s: np.ndarray) -> Workload:
    """The same requests in the same order at other times, one for each request."""
    source = f"{workload.source}; arrival times replaced"
    return replace(workload, arrivals_s=arrivals_s, source=source)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Arrivals and lengths drawn with one seed are independent of each other."""
    return np.random.default_rng([seed, ("arrivals", "lengths").index(purpose)])


def check_count(n: int, available: int) -> None:
    """Raises `ValueError` where `n` requests cannot be taken."""
    if not 1 <= n <= available:
        raise ValueError(f"n must be in 1..{available}, the requests there are to take, got {n}")


def _check_rate(rate: float) -> None:
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be positive and finite, got {rate}")
