"""GPUs and their clock in virtual time: executors run side by side and slow each other down.

A step's remaining work goes on at another speed whenever a step of another executor begins or ends.
Nothing happens by itself: time passes when the coordinator works (`spend`) or waits.

The ranks of an executor take their steps together, so that one stands for all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np

from jpd.engine.lane import Lane
from jpd.engine.plan import Admission, StepPlan, StepResult
from jpd.engine.shapes import ShapeTable
from jpd.simulate.latency import LatencyModel, StepWork


class VirtualGpu:
    """Runs the first step of each executor, and tells the time.

    Args:
      model: how long everything takes.
    """

    def __init__(self, model: LatencyModel) -> None:
        self.model = model
        self.now_s = 0.0
        self.alarm_s = math.inf
        """No `wait` goes on beyond this."""
        self.executors: list[SimulatedExecutor] = []
        """Those with steps."""
        self._running: list[tuple[SimulatedStep, float]] = []
        """Steps, and when they end if all goes on as it is."""
        self._next_s = math.inf
        """When the next of them ends, or another begins."""
        self._updated_s = 0.0
        self._stretch: dict[tuple[bool, int, int | None, int], tuple[float, float]] = {}

    def clock(self) -> float:
        """The time, as a function for those who want one."""
        return self.now_s

    def spend(self, seconds: float) -> None:
        """The coordinator works this long; so do the executors."""
        self.advance_to(self.now_s + seconds)

    def advance_to(self, to_s: float) -> None:
        """Lets time pass."""
        while self.now_s < to_s:
            self.advance(to_s)

    def wait(self, lanes: Iterable[Lane], others_s: Iterable[float] = ()) -> Lane | None:
        """Lets time pass until the oldest step of a lane is known to have run.

        Args:
          lanes: the earlier one wins where several could be meant.
          others_s: moments at which something else happens.

        Returns:
          The lane; None if another moment, or the alarm, came first.

        Raises:
          RuntimeError: nothing will ever happen.
        """
        until_s = min(others_s, default=math.inf)
        until_s = min(until_s, self.alarm_s)
        running = [(lane.in_flight[0], lane) for lane in lanes if lane.in_flight]
        while True:
            for step, lane in running:
                if step.known_s <= self.now_s:
                    return lane
            if self.now_s >= until_s:
                return None
            self.advance(min([until_s, *(step.known_s for step, _ in running)]))

    def advance(self, to_s: float) -> None:
        """Lets time pass until a step begins or ends, at most to `to_s`."""
        if to_s < self._next_s:
            self.now_s = to_s
            return
        if self._next_s == math.inf:
            raise RuntimeError("the coordinator waits, but no step runs and nothing is to come")
        self.now_s = self._next_s
        for step, end_s in self._running:
            if end_s <= self.now_s:
                step.executor.ended(step, self.now_s)
        self.executors = [executor for executor in self.executors if executor.steps]
        self.update()

    def update(self) -> None:
        """Called when the first step of an executor is another one: what runs from now on."""
        for step, end_s in self._running:
            if end_s > self.now_s:
                step.left *= (end_s - self.now_s) / (end_s - self._updated_s)
        self._updated_s = self.now_s
        heads = [executor.steps[0] for executor in self.executors]
        running = [step for step in heads if step.begin_s <= self.now_s]
        self._running = [
            (step, self.now_s + step.left * self._duration_s(step, running)) for step in running
        ]
        moments = [end_s for _, end_s in self._running]
        moments += [step.begin_s for step in heads if step.begin_s > self.now_s]
        self._next_s = min(moments, default=math.inf)

    def _duration_s(self, step: SimulatedStep, running: list[SimulatedStep]) -> float:
        """Seconds of the whole step, if everything went on as it is now."""
        share, place, other = step.executor.share, step.executor.place, None
        for beside in running:
            if beside is not step and beside.executor.place == place:
                other = beside
        all_sms = other is not None and share == other.executor.share == 100
        if self.model.turns is not None and all_sms and step.has_prompt != other.has_prompt:
            return self.model.in_turns_s(step.has_prompt, step.full_s, other.full_s)
        who = (step.has_prompt, share, None if other is None else other.executor.share)
        case = (*who, step.padded_rows)
        if case not in self._stretch:
            self._stretch[case] = self.model.stretch(*case), self.model.wait_s(*who)
        stretch, wait_s = self._stretch[case]
        return step.full_s * stretch + wait_s


class SimulatedStep:
    """A step that was launched."""

    def __init__(
        self,
        plan: StepPlan,
        executor: SimulatedExecutor,
        full_s: float,
        begin_s: float,
        padded_rows: int,
    ) -> None:
        self.plan = plan
        self.executor = executor
        self.full_s = full_s
        """Seconds on the whole GPU."""
        self.has_prompt = bool(plan.chunks)
        self.padded_rows = padded_rows
        self.begin_s = begin_s
        """When it can begin: it was launched, and the step before it has ended."""
        self.left = 1.0
        """Part of its work that was still to be done when the GPU was last updated."""
        self.known_s = math.inf
        """When the coordinator can know that it has run."""

    def result(self) -> StepResult:
        """Lets time pass until the step has run and is taken in; its tokens mean nothing."""
        gpu, overheads = self.executor.gpu, self.executor.gpu.model.overheads
        while gpu.now_s < self.known_s:
            gpu.advance(self.known_s)
        rows = len(self.plan.rows) + len(self.plan.chunks)
        gpu.spend(overheads.deliver_s + rows * overheads.deliver_token_s)
        return StepResult(np.zeros(rows, np.int32), None)


class SimulatedExecutor:
    """Stands in for `jpd.semi_pd.remote.RemoteExecutor`, or for the executor of a unified engine.

    Args:
      gpu: where it runs.
      shapes: what its steps are padded to.
      share: percent of the SMs.
      place: which GPUs, one for each rank; only executors of one place slow each other down.
      ready_s: when it can serve.
      message_s: to and from the coordinator.
    """

    recompiles = 0
    copied_bytes = overlapped_bytes = copy_wait_s = 0
    failure: str | None = None
    pid = 0

    def __init__(
        self,
        gpu: VirtualGpu,
        shapes: ShapeTable,
        share: int,
        *,
        place: int = 0,
        ready_s: float = 0.0,
        message_s: float = 0.0,
    ) -> None:
        self.gpu = gpu
        self.share = share
        self.place = place
        self.steps: deque[SimulatedStep] = deque()
        """Those that have not ended."""
        self.ready_s = ready_s
        self.ready: SimulatedExecutor | None = None
        self.num_steps = 0
        self.busy_s = 0.0
        self._shapes = shapes
        self._message_s = message_s

    @property
    def units(self) -> int:
        """It says of itself that it is ready, and gets the SMs that it was promised."""
        return self.share

    @property
    def connection(self) -> SimulatedExecutor:
        """What the topology waits on."""
        return self

    def poll(self) -> None:
        """`ready` is up to date then."""
        if self.gpu.now_s >= self.ready_s:
            self.ready = self

    def admit(self, admissions: list[Admission]) -> None:
        """Takes no time."""

    def launch(self, plan: StepPlan) -> SimulatedStep:
        """Queues a step."""
        self.gpu.spend(self.gpu.model.overheads.launch_s)
        work = StepWork.of(plan, self._shapes)
        full_s = self.gpu.model.full_s(work)
        sent_s = self.gpu.model.page_copy_s * sum(len(copy.source) for copy in plan.copies)
        full_s = max(full_s, sent_s)  # each layer's beside what comes after it
        begin_s = self.gpu.now_s + self._message_s
        step = SimulatedStep(plan, self, full_s, begin_s, work.padded_rows)
        self.steps.append(step)
        if len(self.steps) == 1:
            self.gpu.executors.append(self)
            self.gpu.update()
        return step

    def ended(self, step: SimulatedStep, now_s: float) -> None:
        """Called by the GPU."""
        self.steps.popleft()
        step.known_s = now_s + self._message_s
        self.num_steps += 1
        self.busy_s += now_s - step.begin_s
        if self.steps:
            self.steps[0].begin_s = max(self.steps[0].begin_s, now_s)

    def kill(self, *, wait: bool) -> None:
        """It leaves nothing behind."""

    def release(self) -> None:
        """It has no memory."""
