"""Workloads on simulated engines: open loop, one or several replicas behind a router."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jpd.bench.slo import RequestRecord
from jpd.bench.workload import Workload, retime
from jpd.errors import RequestError
from jpd.simulate.engine import SimulatedEngine
from jpd.types import RequestOutput, SamplingParams

Router = Literal["round_robin", "least_tokens"]
"""Which replica a request goes to: the next one, or the one with the fewest tokens still to be
computed, prompt and output; only a simulation knows outputs beforehand."""


@dataclass(slots=True)
class _Request:
    due_s: float
    prompt_tokens: int
    output_tokens: int
    output: RequestOutput | None = None
    error: str | None = None

    @property
    def left(self) -> int:
        """Tokens still to be computed; a prompt counts until its first token is there."""
        done = 0 if self.output is None else self.output.metrics.num_generated_tokens
        return (self.prompt_tokens if done == 0 else 0) + self.output_tokens - done

    def record(self) -> RequestRecord:
        """Seen from outside: it was sent when it was due."""
        metrics = None if self.output is None else self.output.metrics
        return RequestRecord(
            due_s=self.due_s,
            sent_s=self.due_s,
            first_token_s=None if metrics is None else metrics.first_token_s,
            finished_s=self.due_s if metrics is None else metrics.finished_s,
            prompt_tokens=self.prompt_tokens,
            wanted_tokens=self.output_tokens,
            output_tokens=0 if metrics is None else metrics.num_generated_tokens,
            error=self.error,
        )


class Replica:
    """An engine, and the thread that `jpd.engine.thread` would run it on.

    A request that arrives ends a wait for executors in other processes. On one in its own process
    the engine sees it when the step that it waits for has run.
    """

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self._inbox: deque[_Request] = deque()
        self._unfinished: list[_Request] = []
        self._count = 0

    def send(self, request: _Request) -> None:
        """Puts a request into the inbox."""
        self._inbox.append(request)

    @property
    def tokens_left(self) -> int:
        """Of all requests that were sent here."""
        self._unfinished = [r for r in self._unfinished if not r.output.finished]
        return sum(r.left for r in (*self._unfinished, *self._inbox))

    def run_until(self, until_s: float) -> None:
        """Goes on to a moment, or to the end of a step that must be waited for.

        With an infinite one, until all requests are finished.
        """
        gpu, coordinator = self.engine.gpu, self.engine.coordinator
        gpu.alarm_s = until_s
        while gpu.now_s < until_s:
            while self._inbox:
                self._add(self._inbox.popleft())
            if not coordinator.has_work:
                if until_s < math.inf:
                    gpu.advance_to(until_s)
                return
            coordinator.step()

    def _add(self, request: _Request) -> None:
        self._count += 1
        params = SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True)
        try:
            request.output = self.engine.coordinator.add(
                str(self._count), None, [0] * request.prompt_tokens, params
            )
        except RequestError as error:
            request.error = f"{type(error).__name__}: {error}"
            return
        self._unfinished.append(request)


def simulate(
    workload: Workload,
    engines: Sequence[SimulatedEngine],
    *,
    router: Router = "round_robin",
) -> list[RequestRecord]:
    """Sends each request at its time, whether or not earlier ones have finished.

    Args:
      workload: arrival times and lengths.
      engines: fresh ones, each a replica of its own.
      router: to which of them a request goes.

    Returns:
      A record of each request, in the workload's order.
    """
    replicas = [Replica(engine) for engine in engines]
    requests = _requests(workload)
    for i, request in enumerate(requests):
        if router == "round_robin":
            replica = replicas[i % len(replicas)]
            replica.run_until(request.due_s)
        else:
            for replica in replicas:
                replica.run_until(request.due_s)
            replica = min(replicas, key=lambda r: r.tokens_left)
        replica.send(request)
    for replica in replicas:
        replica.run_until(math.inf)
    return [request.record() for request in requests]


def simulate_alone(workload: Workload, engine: SimulatedEngine) -> list[RequestRecord]:
    """Sends one request at a time, each when the one before it has finished."""
    replica = Replica(engine)
    requests = _requests(retime(workload, np.zeros(len(workload))))
    for request in requests:
        request.due_s = engine.gpu.now_s
        replica.send(request)
        replica.run_until(math.inf)
    return [request.record() for request in requests]


def _requests(workload: Workload) -> list[_Request]:
    columns = (workload.arrivals_s, workload.prompt_tokens, workload.output_tokens)
    return [_Request(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
