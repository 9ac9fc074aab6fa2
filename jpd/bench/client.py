"""An open-loop load generator in the process of the engine: no HTTP between the two.

Each request is sent at its time whether or not earlier ones have finished, so a slow engine builds
a queue, as it would for users, instead of slowing its own load down. Times are those that a caller
sees, on the event loop; how late each request was sent is recorded, so that a slow client shows.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jpd.bench import report
from jpd.bench.slo import RequestRecord
from jpd.bench.workload import Workload
from jpd.config import require
from jpd.errors import JpdError
from jpd.types import Delta, SamplingParams

if TYPE_CHECKING:  # importing it takes seconds, and the command line needs the options only
    from jpd import AsyncLLM


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """How requests are made and watched."""

    num_warmups: int = 1
    """Requests before the measured ones: the workload's first, with other prompts, all at once."""
    timeout_s: float = 600.0
    """A request that takes longer is given up and counts as failed."""
    token_times: bool = False
    """Record when each token came."""
    temperature: float = 0.0
    """0 measures the greedy step, other values the one with the whole sampler."""
    seed: int = 0
    """Of the random prompts; another one gives prompts that no cache has seen."""


async def run(llm: AsyncLLM, workload: Workload, options: ClientOptions) -> list[RequestRecord]:
    """Sends the workload, each request at its own time.

    Prompts are random token ids, so that none begins like another, and the end of sequence is
    ignored: lengths are exactly those of the workload.

    Returns:
      A record of each request, in the workload's order. Those that fail are there, with the error.

    Raises:
      ConfigError: an option is out of range.
      JpdError: a warm-up request failed.
    """
    load = await _Load.prepare(llm, workload, options)
    async with asyncio.TaskGroup() as group:
        tasks = []
        for i, due_s in enumerate(workload.arrivals_s.tolist()):
            # Also when it is late: tokens that came in between must be seen.
            await asyncio.sleep(max(0.0, due_s - load.now_s()))
            tasks.append(group.create_task(load.send(i, due_s).follow()))
    return [task.result() for task in tasks]


async def run_alone(
    llm: AsyncLLM, workload: Workload, options: ClientOptions
) -> list[RequestRecord]:
    """Sends the workload one request at a time, whatever its arrival times are.

    As `run` otherwise; `slo.slo_from_unloaded` makes objectives of the records.
    """
    load = await _Load.prepare(llm, workload, options)
    return [await load.send(i, load.now_s()).follow() for i in range(len(workload))]


async def run_at_once(
    llm: AsyncLLM, workload: Workload, options: ClientOptions, until: int
) -> list[RequestRecord]:
    """Sends all requests at once, whatever their arrival times are, and aborts the others when
    some have ended.

    Args:
      until: how many are to end.

    Returns:
      Records of those, in the order in which they ended.
    """
    require(1 <= until <= len(workload), "until", until, f"1 to the {len(workload)} requests")
    load = await _Load.prepare(llm, workload, options)
    tasks = [asyncio.create_task(load.send(i, 0.0).follow()) for i in range(len(workload))]
    try:
        return [await ended for ended in itertools.islice(asyncio.as_completed(tasks), until)]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Load:
    """What the requests of one run share."""

    def __init__(self, llm: AsyncLLM, workload: Workload, options: ClientOptions) -> None:
        require(
            0 <= options.num_warmups <= len(workload),
            "num_warmups",
            options.num_warmups,
            f"0 to the {len(workload)} requests of the workload",
        )
        require(options.timeout_s > 0, "timeout_s", options.timeout_s, "greater than 0")
        self.llm, self.options = llm, options
        warmups = range(options.num_warmups)
        self._rows = [*range(len(workload)), *warmups]
        """Of the workload, for each prompt: those of the warm-up come last."""
        self._outputs = workload.output_tokens.tolist()
        lengths = workload.prompt_tokens[self._rows].tolist()
        self._prompts = report.random_prompts(llm, lengths, options.seed)
        self._start_s = time.perf_counter()

    @classmethod
    async def prepare(cls, llm: AsyncLLM, workload: Workload, options: ClientOptions) -> _Load:
        """Makes the prompts, warms up and starts the clock."""
        load = cls(llm, workload, options)
        requests = [load.send(i, 0.0) for i in range(len(workload), len(load._rows))]
        for record in await asyncio.gather(*(request.follow() for request in requests)):
            if not record.ok:
                tokens = f"{record.output_tokens} of {record.wanted_tokens} tokens came"
                raise JpdError(f"a warm-up request failed: {record.error or tokens}")
        load._start_s = time.perf_counter()
        return load

    def now_s(self) -> float:
        """Since the clock was started."""
        return time.perf_counter() - self._start_s

    def send(self, i: int, due_s: float) -> _Request:
        """Queues the request of the i-th prompt."""
        return _Request(self, self._prompts[i], self._outputs[self._rows[i]], due_s)


class _Request:
    """One request, queued by making it."""

    def __init__(self, load: _Load, prompt: list[int], wanted: int, due_s: float) -> None:
        self._load, self._prompt_tokens, self._wanted = load, len(prompt), wanted
        self._token_times_s: list[float] = []
        self._error: str | None = None
        self._stream: AsyncIterator[Delta] | None = None
        temperature = load.options.temperature
        params = SamplingParams(temperature=temperature, max_tokens=wanted, ignore_eos=True)
        self._due_s, self._sent_s = due_s, load.now_s()
        try:
            self._stream = load.llm.stream(prompt, params)
        except JpdError as error:
            self._error = _describe(error)

    async def follow(self) -> RequestRecord:
        """Waits for its end."""
        load, times = self._load, self._token_times_s
        timeout_s = load.options.timeout_s
        try:
            if self._stream is not None:
                async with asyncio.timeout(timeout_s):
                    async for delta in self._stream:
                        times += [load.now_s()] * len(delta.token_ids)
        except TimeoutError:  # leaving the stream has aborted the request
            self._error = f"not finished after timeout_s={timeout_s:g}"
        except JpdError as error:
            self._error = _describe(error)
        return RequestRecord(
            due_s=self._due_s,
            sent_s=self._sent_s,
            first_token_s=times[0] if times else None,
            finished_s=times[-1] if times and self._error is None else load.now_s(),
            prompt_tokens=self._prompt_tokens,
            wanted_tokens=self._wanted,
            output_tokens=len(times),
            error=self._error,
            token_times_s=tuple(times) if load.options.token_times else (),
        )


def _describe(error: JpdError) -> str:
    return f"{type(error).__name__}: {error}"
