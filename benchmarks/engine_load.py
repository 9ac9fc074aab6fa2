"""Requests that are kept running on an engine of this process, and what became of its steps.

The engine is stepped by hand, so that a benchmark can switch shares or kill an executor between two
steps. Times are of `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jpd.engine.coordinator import Coordinator
from jpd.engine.plan import StepPlan, StepResult
from jpd.semi_pd.messages import StepReport
from jpd.semi_pd.remote import RemoteExecutor, RemoteStep
from jpd.types import Delta, RequestOutput, SamplingParams

_numbers = itertools.count()


class LoadRequest(NamedTuple):
    """A greedy request; it takes no end of sequence."""

    prompt: list[int]
    output_tokens: int


def random_requests(
    seed: int,
    vocab: int,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    *,
    common_tokens: int = 0,
) -> Iterator[LoadRequest]:
    """Endless requests of random token ids, the same ones for the same arguments.

    Args:
        seed: of everything.
        vocab: token ids are below it.
        prompt_tokens, output_tokens: least and most, both included.
        common_tokens: a random part of so many tokens is put before each prompt, from the front,
            so that prompts share beginnings.
    """
    random = np.random.default_rng(seed)
    common = random.integers(vocab, size=common_tokens).tolist()
    while True:
        prompt, output = (int(random.integers(a, b + 1)) for a, b in (prompt_tokens, output_tokens))
        shared = common[: int(random.integers(common_tokens + 1))]
        yield LoadRequest(shared + random.integers(vocab, size=prompt).tolist(), output)


@dataclass
class Load:
    """Keeps `at_once` requests on an engine for as long as there are more.

    Args:
        coordinator: of the engine.
        requests: what to send; may be endless, see `stop`.
        at_once: requests in the engine.
        logprobs: asked for with each token, or None.
    """

    coordinator: Coordinator
    requests: Iterable[LoadRequest]
    at_once: int
    logprobs: int | None = None

    sent: list[LoadRequest] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    """Of `sent`."""
    token_times_s: list[list[float]] = field(default_factory=list)
    """When each token of `sent` came."""

    def __post_init__(self) -> None:
        self._left: Iterator[LoadRequest] = iter(self.requests)
        self._more = True
        self._running: dict[str, int] = {}

    @property
    def running(self) -> bool:
        """A request is unfinished or to come."""
        return self._more or bool(self._running)

    @property
    def tokens(self) -> list[list[int]]:
        """Of each request of `sent`."""
        return [output.outputs[0].token_ids for output in self.outputs]

    @property
    def num_tokens(self) -> int:
        """Tokens that came."""
        return sum(map(len, self.token_times_s))

    @property
    def num_decoding(self) -> int:
        """Running requests that have a token."""
        return sum(bool(self.token_times_s[i]) for i in self._running.values())

    def stop(self) -> None:
        """Sends no more."""
        self._more = False

    def step(self) -> list[Delta]:
        """Fills up and steps the engine once."""
        while self._more and len(self._running) < self.at_once:
            request = next(self._left, None)
            if request is None:
                self._more = False
                break
            self._send(request)
        deltas = self.coordinator.step()
        now_s = time.monotonic()
        for delta in deltas:
            index = self._running.get(delta.request_id)
            if index is None:
                continue  # somebody else's
            self.token_times_s[index] += [now_s] * len(delta.token_ids)
            if delta.finish_reason is not None:
                del self._running[delta.request_id]
        return deltas

    def finish(self) -> None:
        """Steps until all requests have ended, those to come too, and no step runs."""
        while self.running or self.coordinator.has_work:
            self.step()

    def abort(self) -> None:
        """Ends all requests and waits for the steps that run."""
        for request_id in self._running:
            self.coordinator.abort(request_id)
        self._running.clear()
        self.stop()
        self.finish()

    def _send(self, request: LoadRequest) -> None:
        params = SamplingParams(
            temperature=0,
            ignore_eos=True,
            max_tokens=request.output_tokens,
            logprobs=self.logprobs,
        )
        name = f"load-{next(_numbers)}"
        self._running[name] = len(self.sent)
        self.outputs.append(self.coordinator.add(name, None, request.prompt, params))
        self.sent.append(request)
        self.token_times_s.append([])

    def gaps(self, since_s: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Times of all neighbouring tokens of a request, `[n]` each: the earlier and the later.

        Args:
            since_s: pairs whose earlier token came before are left out.
        """
        times = [np.array(each) for each in self.token_times_s]
        earlier = np.concatenate([np.zeros(0), *(each[:-1] for each in times)])
        later = np.concatenate([np.zeros(0), *(each[1:] for each in times)])
        return earlier[earlier >= since_s], later[earlier >= since_s]


@dataclass(eq=False, slots=True)
class LoggedStep:
    """A step of an executor in another process."""

    plan: StepPlan
    pid: int
    launched_s: float
    """When the coordinator sent it."""
    begun_s: float | None = None
    """When the device could begin; None if it never ran, or has not yet."""
    ended_s: float | None = None
    published_s: float | None = None
    """When the coordinator had its result."""

    @property
    def seconds(self) -> float:
        """On the device."""
        return self.ended_s - self.begun_s


class StepLog:
    """Records the steps of all executors in other processes while the block runs.

    `steps` is in the order of their launches, less those that `take` took.
    """

    def __init__(self) -> None:
        self.steps: list[LoggedStep] = []
        self._running: dict[int, LoggedStep] = {}
        self._report: StepReport | None = None

    def take(self) -> list[LoggedStep]:
        """The steps that have ended; the log does not keep them, since plans are large."""
        ended = [step for step in self.steps if step.ended_s is not None]
        self.steps = [step for step in self.steps if step.ended_s is None]
        return ended

    def __enter__(self) -> StepLog:
        launch, next_report, result = self._originals = (
            RemoteExecutor.launch,
            RemoteExecutor.next_report,
            RemoteStep.result,
        )

        def logged_launch(executor: RemoteExecutor, plan: StepPlan) -> RemoteStep:
            step = LoggedStep(plan, executor.pid, time.monotonic())
            launched = launch(executor, plan)
            self.steps.append(step)
            self._running[id(plan)] = step
            return launched

        def logged_report(executor: RemoteExecutor) -> StepReport:
            self._report = next_report(executor)
            return self._report

        def logged_result(launched: RemoteStep) -> StepResult:
            answer = result(launched)
            step = self._running.pop(id(launched.plan), None)
            if step is not None:  # else it was launched before the block
                step.begun_s, step.ended_s = self._report.begun_s, self._report.ended_s
                step.published_s = time.monotonic()
            return answer

        RemoteExecutor.launch, RemoteExecutor.next_report, RemoteStep.result = (
            logged_launch,
            logged_report,
            logged_result,
        )
        return self

    def __exit__(self, *_: object) -> None:
        RemoteExecutor.launch, RemoteExecutor.next_report, RemoteStep.result = self._originals


def seats(engine: Any) -> dict[str, Any]:
    """The seats of both phases of a semi-PD engine, by the phase."""
    return {"prefill": engine.topology.prefill, "decode": engine.topology.decode}
