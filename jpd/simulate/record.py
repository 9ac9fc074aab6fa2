"""Measures the steps of a real engine, and what its host adds, for `jpd.simulate.fit`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jpd.engine.build import Engine
from jpd.engine.lane import Lane, StepInFlight
from jpd.engine.plan import Admission, StepPlan, StepResult
from jpd.engine.shapes import ShapeTable, shape_table
from jpd.semi_pd.remote import RemoteStep
from jpd.simulate.fit import MeasuredStep, StepTimes, non_negative_least_squares
from jpd.simulate.latency import Overheads, StepWork


@dataclass(slots=True)
class _Record:
    """A step; times are of `time.monotonic`."""

    lane: int
    work: StepWork
    num_tokens: int
    """Rows of its result."""
    share: int
    """Of its executor."""
    other_share: int
    """Of the executor of the other lane."""
    alone: bool
    """No other step was in flight in its lane when it was launched."""
    launched_s: float
    """After the launch."""
    begun_s: float = 0.0
    ended_s: float = 0.0
    awaited_s: float = 0.0
    """Since then the coordinator had nothing to do but to wait."""
    known_s: float = 0.0


class _RecordedStep:
    """A step in flight that notes its times."""

    def __init__(self, step: StepInFlight, record: _Record, recorder: Recorder) -> None:
        self.plan = step.plan
        self._step, self._record, self._recorder = step, record, recorder

    def __getattr__(self, name: str) -> Any:
        """What else topologies know of their steps."""
        return getattr(self._step, name)

    def result(self) -> StepResult:
        """Of the step."""
        record = self._record
        record.awaited_s = self._recorder.waits(time.monotonic())
        result = self._step.result()
        record.known_s = time.monotonic()
        if isinstance(self._step, RemoteStep):
            record.begun_s, record.ended_s = self._step.report.begun_s, self._step.report.ended_s
        else:
            record.ended_s = record.known_s
            record.begun_s = max(record.launched_s, self._recorder.last_ended_s)
            self._recorder.last_ended_s = record.ended_s
        self._recorder.took_in(record)
        return result


class Recorder:
    """Watches the lanes of an engine from now on. Costs some µs a step.

    Args:
      engine: without requests, and with executors that stay.
    """

    def __init__(self, engine: Engine) -> None:
        self.last_ended_s = 0.0
        self.records: list[_Record] = []
        """Steps that have run; may be emptied while there are no requests."""
        self._topology = engine.topology
        self._ranks = engine.config.tensor_parallel_size
        self._lanes = list(engine.topology.lanes)
        # What the coordinator did one after the other, while it did not wait: seconds, steps
        # launched, steps taken in, tokens of those.
        self._host: list[tuple[float, int, int, int]] = []
        self._free_s: float | None = None
        self._waits_since_s: float | None = None
        self._taken_in: _Record | None = None
        self._watch_waits()
        for index, lane in enumerate(self._lanes):
            shapes = shape_table(engine.config, prefill=lane.prefill, decode=lane.decode)
            self._watch(index, lane, shapes)

    def clear(self) -> None:
        """Forgets all steps."""
        self.records.clear()
        self._host.clear()

    def _watch(self, index: int, lane: Lane, shapes: ShapeTable) -> None:
        launch = lane.launch

        def watched(plan: StepPlan, admissions: list[Admission]) -> None:
            work = StepWork.of(plan, shapes)
            alone = not lane.in_flight
            launch(plan, admissions)
            tokens = len(plan.rows) + len(plan.chunks)
            shares = self._share(index), self._share(1 - index)
            record = _Record(index, work, tokens, *shares, alone, time.monotonic())
            lane.in_flight[-1] = _RecordedStep(lane.in_flight[-1], record, self)
            self._worked(record.launched_s, launched=1)

        lane.launch = watched

    def _share(self, index: int) -> int:
        """Percent of the SMs that a lane's executor has; 100 where it is the only one."""
        lane = self._lanes[index] if index < len(self._lanes) else None
        return getattr(lane and lane.executor, "share", 100)

    def _watch_waits(self) -> None:
        wait = self._topology.wait

        def watched(patience_s: float) -> Lane | None:
            self.waits(time.monotonic())
            lane = wait(patience_s)
            if lane is None and any(each.in_flight for each in self._lanes):
                # Requests or executors came, or a time-out: there is something to do.
                self._free_s, self._waits_since_s = time.monotonic(), None
            return lane

        self._topology.wait = watched

    def waits(self, now_s: float) -> float:
        """The coordinator has nothing to do from now on; returns since when it has not."""
        if self._waits_since_s is None:
            self._worked(now_s, launched=0)
            self._free_s, self._waits_since_s = None, now_s
        return self._waits_since_s

    def _worked(self, now_s: float, launched: int) -> None:
        """The coordinator did something until now."""
        if self._free_s is not None:
            done = self._taken_in
            tokens = 0 if done is None else done.num_tokens
            self._host.append((now_s - self._free_s, launched, int(done is not None), tokens))
        self._free_s, self._taken_in = now_s, None

    def took_in(self, record: _Record) -> None:
        """Called by a step whose result is known."""
        self._waits_since_s = None
        self.records.append(record)
        self._taken_in = record
        # With nothing else in flight the engine may go on to wait for requests.
        more = sum(len(lane.in_flight) for lane in self._lanes) > 1
        self._free_s = record.known_s if more else None

    def times(self, source: str) -> StepTimes:
        """All that was measured since the start, or since `clear`."""
        return StepTimes(source, self._overheads(), list(self._steps()), self._ranks)

    def _steps(self) -> Iterable[MeasuredStep]:
        by_lane = [[r for r in self.records if r.lane == i] for i in range(len(self._lanes))]
        for own, records in enumerate(by_lane):
            busy = _Busy([r for other, rs in enumerate(by_lane) if other != own for r in rs])
            for record in records:
                seconds = record.ended_s - record.begun_s
                shares = record.share, record.other_share
                prefill, decode = shares if record.work.prompt_tokens else shares[::-1]
                yield MeasuredStep(
                    **{name: getattr(record.work, name) for name in StepWork.__slots__},
                    prefill_share=prefill,
                    decode_share=decode,
                    other_busy=busy.until(record.ended_s, record.begun_s) / seconds,
                    seconds=seconds,
                )

    def _overheads(self) -> Overheads:
        table = np.array(self._host, float).reshape(-1, 4)
        launch_s, deliver_s, token_s = non_negative_least_squares(table[:, 1:], table[:, 0])
        sent = [r.begun_s - r.launched_s for r in self.records if r.alone]
        came = [r.known_s - r.ended_s for r in self.records if r.awaited_s < r.ended_s]
        # In one process both are 0.
        messages = [np.mean(times) for times in (sent, came) if times]
        return Overheads(
            launch_s=float(launch_s),
            deliver_s=float(deliver_s),
            deliver_token_s=float(token_s),
            message_s=max(0.0, float(np.mean(messages))) if messages else 0.0,
        )


class _Busy:
    """When one lane's executor computed."""

    def __init__(self, records: list[_Record]) -> None:
        begun = np.array([r.begun_s for r in records])
        ended = np.array([r.ended_s for r in records])
        self._moments = np.ravel(np.column_stack([begun, ended]))
        sums = np.cumsum(ended - begun)
        before = np.concatenate([[0.0], sums[:-1]]) if len(records) else sums
        self._sums = np.ravel(np.column_stack([before, sums]))

    def until(self, end_s: float, begin_s: float) -> float:
        """Seconds between two moments."""
        if not len(self._moments):
            return 0.0
        sums = np.interp([begin_s, end_s], self._moments, self._sums)
        return float(np.clip(sums[1] - sums[0], 0.0, end_s - begin_s))
