"""Latencies of requests, and the share of them that keeps a service-level objective (SLO).

TTFT is the time from sending a request to its first token, E2E to its last one, and
TPOT = (E2E - TTFT) / (output tokens - 1), as in `vllm bench serve`. A request of one token has no
TPOT: statistics leave it out, and for an SLO its TPOT counts as 0, which is vLLM's goodput rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

PERCENTILES = (50, 90, 99)
TIGHT, LOOSE = 7.5, 10.0
"""SLO over unloaded latency, of semi-PD (arXiv:2504.19867, table 2)."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request; times in s from the start of sending."""

    due_s: float
    """When it was to be sent."""
    sent_s: float
    """When it was."""
    first_token_s: float | None
    """None if no token came."""
    finished_s: float
    """When its last token came, or when it failed."""
    prompt_tokens: int
    wanted_tokens: int
    output_tokens: int
    error: str | None = None
    token_times_s: tuple[float, ...] = ()
    """When each token came, if that was asked for."""

    @property
    def ok(self) -> bool:
        """It did not fail and gave every token that it was to give."""
        return self.error is None and self.output_tokens == self.wanted_tokens

    @property
    def lateness_s(self) -> float:
        """How much later than due it was sent: more than a few ms says that the client is slow."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float | None:
        """None if no token came."""
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def e2e_s(self) -> float:
        """From sending it to its end."""
        return self.finished_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None below two tokens."""
        if self.output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Slo:
    """Longest times with which a request is good; a request that takes just as long is."""

    ttft_s: float
    tpot_s: float


class Attainment(NamedTuple):
    """Shares of all requests sent; one that failed or was cut short keeps no SLO."""

    joint: float
    """Both kept."""
    ttft: float
    tpot: float


class Goodput(NamedTuple):
    """A rate in requests/s and how the goodput relates to it."""

    rate: float
    relation: str
    """`=`; `>=` where the highest measured rate still passes; `<` where the lowest does not."""


def slo_from_unloaded(records: Sequence[RequestRecord], scale: float) -> Slo:
    """`scale` times the mean latencies of requests that had the engine to themselves.

    Args:
      records: requests sent one at a time (`client.run_alone`).
      scale: such as `TIGHT` and `LOOSE`.

    Raises:
      ValueError: a request failed or was cut short, or none has a TPOT.
    """
    bad = sum(not r.ok for r in records)
    tpots = [r.tpot_s for r in records if r.tpot_s is not None]
    if bad or not tpots:
        raise ValueError(
            "unloaded requests must all succeed, and one must have two tokens: "
            f"{bad} of {len(records)} did not, {len(tpots)} have a TPOT"
        )
    return Slo(scale * float(np.mean([r.ttft_s for r in records])), scale * float(np.mean(tpots)))


def attainment(records: Sequence[RequestRecord], slo: Slo) -> Attainment:
    """Shares of requests that keep the SLO, of all that were sent.

    Raises:
      ValueError: there are no records.
    """
    if not records:
        raise ValueError("records must not be empty: no request was sent")
    ok = np.array([r.ok for r in records])
    ttft = np.array([math.inf if r.ttft_s is None else r.ttft_s for r in records])
    tpot = np.array([0.0 if r.tpot_s is None else r.tpot_s for r in records])
    keeps_ttft, keeps_tpot = ok & (ttft <= slo.ttft_s), ok & (tpot <= slo.tpot_s)
    shares = (keeps_ttft & keeps_tpot, keeps_ttft, keeps_tpot)
    return Attainment(*(float(share.mean()) for share in shares))


def goodput(
    rates: Sequence[float], joint_attainments: Sequence[float], threshold: float = 0.9
) -> Goodput:
    """The rate at which joint attainment falls below the threshold.

    Linear interpolation between measured rates at the first crossing, as in DistServe (OSDI 2024,
    artifact `plot.ipynb`). Where that returns the lowest rate because nothing crosses, this says on
    which side the goodput lies; a curve that starts below the threshold is not searched for a later
    rise, which can only be noise.

    Args:
      rates: requests/s, rising.
      joint_attainments: of each rate, in [0, 1].
      threshold: attainment that passes, in (0, 1].

    Raises:
      ValueError: the rates do not rise, the lengths differ, or a share is out of range.
    """
    rate, share = np.asarray(rates, float), np.asarray(joint_attainments, float)
    if rate.ndim != 1 or rate.shape != share.shape or len(rate) == 0:
        raise ValueError(f"as many attainments as rates, got {share.shape} and {rate.shape}")
    if not (rate[0] > 0 and np.all(np.diff(rate) > 0)):
        raise ValueError(f"rates must be positive and rise, got {rate.tolist()}")
    if not (np.all((share >= 0) & (share <= 1)) and 0 < threshold <= 1):
        raise ValueError(
            f"attainments must be in [0, 1] and the threshold in (0, 1], got {share.tolist()} "
            f"and {threshold}"
        )
    failing = np.flatnonzero(share < threshold)
    if len(failing) == 0:
        return Goodput(float(rate[-1]), ">=")
    i = failing[0]
    if i == 0:
        return Goodput(float(rate[0]), "<")
    passed = (share[i - 1] - threshold) / (share[i - 1] - share[i])
    return Goodput(float(rate[i - 1] + passed * (rate[i] - rate[i - 1])), "=")


def summarize(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Numbers of a run, with vLLM's names where it has one.

    Returns:
      What `rates` and `latencies` give over the requests that are ok; `num_prompts`, `failed` and
      `truncated` (no error, but too few tokens) over all; and `p50_lateness_ms`,
      `p99_lateness_ms`, `max_lateness_ms` of sending. The duration is that from the start of
      sending to the end of the last request, so it includes the drain.

    Raises:
      ValueError: there are no records.
    """
    if not records:
        raise ValueError("records must not be empty: no request was sent")
    good = [r for r in records if r.ok]
    late_ms = [1e3 * r.lateness_s for r in records]
    return {
        "num_prompts": len(records),
        "failed": sum(r.error is not None for r in records),
        "truncated": sum(r.error is None and not r.ok for r in records),
        **rates(
            len(good),
            sum(r.prompt_tokens for r in good),
            sum(r.output_tokens for r in good),
            max(r.finished_s for r in records),
        ),
        **latencies(
            {
                "ttft": [r.ttft_s for r in good],
                "tpot": [r.tpot_s for r in good if r.tpot_s is not None],
                "e2el": [r.e2e_s for r in good],
            }
        ),
        "p50_lateness_ms": float(np.percentile(late_ms, 50)),
        "p99_lateness_ms": float(np.percentile(late_ms, 99)),
        "max_lateness_ms": max(late_ms),
    }


def rates(
    completed: int, prompt_tokens: int, output_tokens: int, duration_s: float
) -> dict[str, float]:
    """Counts, `duration` in s, and requests and tokens per second."""
    return {
        "completed": completed,
        "duration": duration_s,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": completed / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration_s,
    }


def latencies(times_s: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """`mean_NAME_ms` and `pNN_NAME_ms` (linear interpolation) of each; None where there is none."""
    result: dict[str, float | None] = {}
    for name, values in times_s.items():
        result[f"mean_{name}_ms"] = 1e3 * float(np.mean(values)) if values else None
        for p in PERCENTILES:
            value = 1e3 * float(np.percentile(values, p)) if values else None
            result[f"p{p}_{name}_ms"] = value
    return result
