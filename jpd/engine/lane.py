"""A lane: one executor at a time, what it is to compute, and its steps in flight.

A topology is the lanes of an engine and what stands behind them: one executor in this process, or
several in processes of their own that come and go. No jax here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from jpd.engine.plan import Admission, StepPlan, StepResult
from jpd.engine.recent import Recent


class ExecutorLostError(Exception):
    """An executor ended, or failed, with its steps unfinished; others can go on."""


class PagesLostError(Exception):
    """All KV pages lost their content; every sequence must be computed again."""


class StepInFlight(Protocol):
    """A launched step."""

    plan: StepPlan

    def result(self) -> StepResult:
        """Blocks until the step has run.

        Raises:
          ExecutorLostError: it never will.
        """


class StepExecutor(Protocol):
    """Runs steps in the order of their launch."""

    recompiles: int
    """Step shapes that were compiled while requests waited."""

    def admit(self, admissions: list[Admission]) -> None:
        """Takes in rows that the next steps may hold, and returns without waiting for that."""

    def launch(self, plan: StepPlan) -> StepInFlight:
        """Starts a step and returns without waiting for it."""


@dataclass(frozen=True, slots=True)
class Switch:
    """A lane changed its executor. Times are of `time.monotonic`."""

    phase: str
    old_share: int | None
    """None where nobody served: at the beginning, and after a loss."""
    share: int
    asked_s: float
    """When this share was asked for, or the old executor was lost."""
    held_s: float
    """When the lane stopped launching steps on the old executor."""
    done_s: float
    """When it could launch on the new one."""


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """An executor in a process of its own."""

    phase: str
    """"prefill" or "decode"."""
    pid: int
    share: int
    """Percent of the SMs that it was started with."""
    units: int
    """SMs, or CPUs without a GPU, that it really got."""
    serves: bool
    """It runs the steps of its phase; others are kept ready."""


class Lane:
    """Steps of one executor, in order.

    Args:
      executor: runs the steps; None while there is none.
      num_rows: rows of the sequence table.
      depth: steps that may be in flight.
      prefill, decode: which phases its steps may hold.
    """

    def __init__(
        self,
        executor: StepExecutor | None,
        num_rows: int,
        *,
        depth: int,
        prefill: bool = True,
        decode: bool = True,
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.depth = depth
        self.in_flight: deque[StepInFlight] = deque()
        self._num_rows = num_rows
        self._admissions: dict[int, Admission] = {}
        """Newest of each row."""
        self._following: StepExecutor | None = None
        self._told: list[Admission] = []
        self.executor = executor

    @property
    def executor(self) -> StepExecutor | None:
        """Who runs the next steps. Only a lane without steps in flight may get another."""
        return self._executor

    @executor.setter
    def executor(self, executor: StepExecutor | None) -> None:
        assert not self.in_flight, "the old executor has steps in flight"
        self._executor = executor
        self._known = np.zeros(self._num_rows, np.int64)
        if executor is not None and executor is self._following:
            for admission in self._told:
                self._known[admission.row] = admission.serial
        self.release()

    def hold(self, following: StepExecutor) -> None:
        """Launches no step, so that those in flight come to an end and `following` can take over.

        There are some. It learns of the rows in flight meanwhile, which is most of what its first
        step would have to tell it. Rows whose tokens the sampler looks at will have more of them by
        then.
        """
        if following is self._following:
            return
        rows = self.in_flight[-1].plan.rows.tolist()
        self._told = [a for row in rows if (a := self._admissions[row]).tokens is None]
        self._following = following
        following.admit(self._told)

    def release(self) -> None:
        """Launches steps again."""
        self._following = None
        self._told = []

    @property
    def may_launch(self) -> bool:
        """There is somebody to run another step."""
        room = len(self.in_flight) < self.depth
        return self._executor is not None and room and self._following is None

    @property
    def has_chunks(self) -> bool:
        """A prompt chunk is in flight."""
        return any(step.plan.chunks for step in self.in_flight)

    @property
    def has_rows(self) -> bool:
        """A decoding row is in flight, or a chunk after which a row may decode here only."""
        return any(len(step.plan.rows) or step.plan.decodes_on for step in self.in_flight)

    def forget(self, plan: StepPlan) -> None:
        """Rows that grew in another lane: what the executor knows of them is out of date."""
        self._known[plan.rows] = 0
        self._known[[chunk.row for chunk in plan.chunks if chunk.last]] = 0

    def unknown_rows(self, plan: StepPlan) -> list[int]:
        """Rows of a plan that the executor has not seen in their present life."""
        rows = plan.rows[self._known[plan.rows] != plan.serials].tolist()
        return rows + [c.row for c in plan.chunks if self._known[c.row] != c.serial]

    def launch(self, plan: StepPlan, admissions: list[Admission]) -> None:
        """Starts a step; `admissions` are those of `unknown_rows`."""
        for admission in admissions:
            self._known[admission.row] = admission.serial
            self._admissions[admission.row] = admission
        plan.admissions = admissions
        self.in_flight.append(self._executor.launch(plan))


class Topology(Protocol):
    """The lanes of an engine and the executors behind them."""

    lanes: list[Lane]

    @property
    def executors(self) -> list[ExecutorInfo]:
        """Those in processes of their own."""

    @property
    def switches(self) -> list[Switch]:
        """All changes of executors, in the order of time."""

    @property
    def recompiles(self) -> int:
        """Step shapes that were compiled while requests waited."""

    def tend(self, recent: Callable[[], Recent]) -> None:
        """Called before each step: the moment to give a lane another executor or other phases.

        Args:
          recent: what happened to requests since it was last called.

        Raises:
          PagesLostError: no executor is left, and `renew` has to be called.
        """

    def renew(self) -> None:
        """Makes new pages, after `PagesLostError` and when no lane has steps in flight."""

    def wait(self, patience_s: float = math.inf) -> Lane | None:
        """Blocks until the oldest step of some lane has run, the executors changed, or `wake`.

        Args:
          patience_s: for so long at most, where steps run in other processes.

        Returns:
          The lane, None if no step has run.
        """

    def wake(self) -> None:
        """Ends a `wait` of another thread, or the next one."""

    @property
    def num_lost(self) -> int:
        """Executors that failed or were killed while others went on."""

    @property
    def break_even_estimate(self) -> float | None:
        """What decides between one executor and two (`topology="auto"`); None where nothing does,
        or nothing is known."""

    def lost(self, lane: Lane, error: ExecutorLostError) -> bool:
        """The executor of a lane failed.

        On return it touches no memory any more. Who runs the lane's next steps, `tend` decides.

        Returns:
          Its oldest step in flight may be to blame. False: it had none, or what failed before may
          have taken it along.

        Raises:
          ExecutorLostError: nothing can go on without it.
        """

    def close(self) -> None:
        """Waits for the devices and lets go of everything."""


class OneExecutor:
    """One executor in this process, which computes both phases in the order of the plans.

    Args:
      executor: owned from now on.
      num_rows: rows of the sequence table.
      depth: steps that may be in flight: with 2, the next step is launched before the tokens of the
        running one are read.
    """

    def __init__(self, executor: StepExecutor, num_rows: int, *, depth: int) -> None:
        self.executor = executor
        self.lanes = [Lane(executor, num_rows, depth=depth)]

    @property
    def recompiles(self) -> int:
        """Step shapes that were compiled while requests waited."""
        return self.executor.recompiles

    def tend(self, recent: Callable[[], Recent]) -> None:
        """Nothing ever changes."""

    def renew(self) -> None:
        """Its pages live as long as it does."""

    def wait(self, patience_s: float = math.inf) -> Lane | None:
        """Its only lane, if a step is in flight; whoever reads the result waits."""
        return self.lanes[0] if self.lanes[0].in_flight else None

    def wake(self) -> None:
        """Who reads a result waits for it."""

    num_lost = 0
    """The engine ends with it."""
    break_even_estimate = None
    """There is no choice."""
    executors: ClassVar[list[ExecutorInfo]] = []
    switches: ClassVar[list[Switch]] = []

    def lost(self, lane: Lane, error: ExecutorLostError) -> bool:
        """There is no other."""
        raise error

    def close(self) -> None:
        """Lets go of parameters and pages."""
        self.executor.release()
