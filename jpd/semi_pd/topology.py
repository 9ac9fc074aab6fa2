"""One lane of prefill executors, one of decode executors, and who serves in each.

semi-PD has both on one device, disaggregation each on its own. As in semi-PD (arXiv 2504.19867
§4.3) a lane changes its executor at the end of its own step, whatever the other does, and serves on
until the next executor is ready. Shares may sum to more than 100 %, so an old executor of one phase
and a new one of the other may serve together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait as wait_for_any

from jpd.config import require
from jpd.engine.lane import ExecutorInfo, ExecutorLostError, Lane, PagesLostError, Switch
from jpd.engine.recent import Recent
from jpd.errors import EngineDeadError
from jpd.semi_pd.controller import Controller, Observation, Shares
from jpd.semi_pd.mode import UNIFIED_SHARE, Mode, ModePolicy
from jpd.semi_pd.pool import ExecutorPool
from jpd.semi_pd.remote import RemoteExecutor
from jpd.semi_pd.shared_model import SharedModel

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 3600.0
"""The kernel takes no more than some days."""


class Seat:
    """Who serves in a lane, who is to, and since when.

    Args:
      lane: of one phase.
      pool: executors of that phase.
      share: percent of the SMs to serve with.
    """

    def __init__(
        self, lane: Lane, pool: ExecutorPool, share: int, clock: Callable[[], float]
    ) -> None:
        self.lane = lane
        self.pool = pool
        self.switches: list[Switch] = []
        self._clock = clock
        self._wanted_since_s = clock()
        self._held_s: float | None = None
        self._share = share

    @property
    def share(self) -> int:
        """Percent of the SMs to serve with as soon as it can be."""
        return self._share

    @share.setter
    def share(self, share: int) -> None:
        if share != self._share:
            self._share, self._wanted_since_s = share, self._clock()

    @property
    def executor(self) -> RemoteExecutor | None:
        """Who serves."""
        return self.lane.executor

    def tend(self) -> None:
        """Seats who is to serve, if the lane is between steps."""
        if self.executor is not None and not self.lane.in_flight:
            self.executor.poll()
            if self.executor.failure is not None:
                self.lost(self.executor.failure)
                self.lane.executor = None
        self.pool.tend(self.executor, self._share)
        wanted = self.pool.get(self._share)
        if self.executor is None:
            # Anybody is better than nobody, until the wanted one is there.
            wanted = wanted or self.pool.nearest(self._share)
        if wanted is None or wanted is self.executor:
            self.lane.release()
            self._held_s = None
            return
        if self._held_s is None:
            self._held_s = self._clock()
        if self.lane.in_flight:
            self.lane.hold(wanted)
            return
        old = None if self.executor is None else self.executor.share
        now_s = self._clock()
        since_s = self._wanted_since_s
        self.switches.append(
            Switch(self.pool.phase, old, wanted.share, since_s, self._held_s, now_s)
        )
        self.lane.executor = wanted
        self._held_s = None

    def lost(self, reason: str) -> None:
        """Ends the executor, which failed."""
        self._wanted_since_s = self._clock()
        self.pool.remove(self.executor, reason, running=True)


class TwoPhases:
    """Prefill and decode executors in processes of their own.

    Args:
      models: what the executors map: one that all share, or one of each phase.
      prefill, decode: pools of the two phases.
      shares: to begin with.
      num_rows: rows of the sequence table.
      depth: steps that may be in flight in a lane.
      controller: asked for shares; None keeps them.
      mode_policy: asked whether the decode executor is to compute prompts too; None: it is not.
      control_interval_s: between two questions.
      step_timeout_s: an executor that has not reported a step for so long is lost.
      on_close: called when all executors have ended.
    """

    def __init__(
        self,
        models: Sequence[SharedModel],
        prefill: ExecutorPool,
        decode: ExecutorPool,
        shares: Shares,
        num_rows: int,
        *,
        depth: int,
        controller: Controller | None,
        mode_policy: ModePolicy | None = None,
        control_interval_s: float,
        step_timeout_s: float,
        on_close: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lanes = [
            Lane(None, num_rows, depth=depth, decode=False),
            Lane(None, num_rows, depth=depth, prefill=False),
        ]
        self.prefill = Seat(self.lanes[0], prefill, shares.prefill, clock)
        self.decode = Seat(self.lanes[1], decode, shares.decode, clock)
        self._seats = (self.prefill, self.decode)
        self._models = models
        self._controller = controller
        self._mode_policy = mode_policy
        # Nobody is held up before the first requests come.
        self._mode: Mode = "semi_pd" if mode_policy is None else "unified"
        self._apart = shares
        self._share_out()
        self._interval_s = control_interval_s
        self._asked_s = clock()
        self._clock = clock
        self._prefill_busy_s = 0.0
        self._step_timeout_s = step_timeout_s
        self._resources = contextlib.ExitStack()
        self._resources.callback(on_close)
        self._woken, self._waker = (
            self._resources.enter_context(end) for end in socket.socketpair()
        )
        self._waker.setblocking(False)
        for seat in self._seats:
            self._resources.callback(seat.pool.close)
        self._resources.callback(self._hang_up)
        self._renewed = False

    @property
    def shares(self) -> Shares:
        """What serves now; of a phase without an executor, what is to serve."""
        prefill, decode = (
            seat.share if seat.executor is None else seat.executor.share for seat in self._seats
        )
        return Shares(prefill, decode)

    @shares.setter
    def shares(self, shares: Shares) -> None:
        self._apart = shares
        self._share_out()

    def _share_out(self) -> None:
        self.prefill.share = self._apart.prefill
        self.decode.share = UNIFIED_SHARE if self._mode == "unified" else self._apart.decode

    @property
    def recompiles(self) -> int:
        """Step shapes that were compiled while requests waited."""
        return sum(seat.pool.recompiles for seat in self._seats)

    def tend(self, recent: Callable[[], Recent]) -> None:
        """Asks policy and controller, and seats executors where a lane is between steps.

        A phase that moves to the other lane does so between two steps: the coordinator launches
        none there before the last one here has run. While the executor of a phase is replaced the
        phase waits: the other's executors would have to compile steps of another kind first, which
        takes longer. Where one phase has been given up, the other serves both, if it has the same
        pages.

        Raises:
          ConfigError: a controller or policy of the user's answered what is not allowed.
          EngineDeadError: nobody can serve a phase.
          PagesLostError: the memory is gone, or nobody could be started on it.
        """
        now_s = self._clock()
        serving = all(seat.executor is not None for seat in self._seats)
        due = now_s - self._asked_s >= self._interval_s
        steered = self._controller is not None or self._mode_policy is not None
        if steered and due and serving:
            self._asked_s = now_s
            self._steer(self._observation(recent()))
        self.seat()
        given_up = self._given_up()
        if len(given_up) == 2 or (given_up and len(self._models) == 2):
            last = ", ".join(f"{s.pool.phase}: {s.pool.last_failure}" for s in given_up)
            raise EngineDeadError(f"no executor is left; what the last ones failed with: {last}")

    def _given_up(self) -> list[Seat]:
        """Those of phases that nobody can be started for."""
        return [seat for seat in self._seats if seat.pool.given_up(seat.share)]

    def _steer(self, observation: Observation) -> None:
        """Asks who is to serve and, of two executors, with which shares."""
        unified = self.decode.lane.prefill
        if self._mode_policy is not None:
            mode = self._mode_policy.decide(observation, "unified" if unified else "semi_pd")
            require(mode in Mode.__args__, "mode", mode, f"one of {list(Mode.__args__)}")
            if mode != self._mode:
                logger.info("%s from now on; estimate: %s", mode, self.break_even_estimate)
                self._mode = mode
                self._share_out()
        if self._controller is not None and self._mode == "semi_pd" and not unified:
            shares = self._controller.decide(observation, self.shares)
            allowed = "Shares(prefill, decode), as a controller's `decide` is to answer"
            require(isinstance(shares, Shares), "shares", shares, allowed)
            self.shares = shares

    def seat(self) -> None:
        """Seats executors where a lane is between steps, and says which phases lanes compute.

        Raises:
          PagesLostError: the memory is gone, or nobody could be started on it.
        """
        for seat in self._seats:
            seat.tend()
            if seat.executor is not None:
                self._renewed = False
        if any(model.is_lost for model in self._models) or self._memory_is_suspect():
            self._hang_up()
            for seat in self._seats:
                seat.pool.close()
            raise PagesLostError
        given_up = self._given_up()
        # Only an executor on all SMs was prepared for steps of both phases.
        serves_both = self.decode.executor is not None and self.shares.decode == UNIFIED_SHARE
        unified = self._mode == "unified" and serves_both
        self.prefill.lane.prefill = not unified
        self.prefill.lane.decode = self.decode in given_up
        self.decode.lane.prefill = unified or self.prefill in given_up

    def _memory_is_suspect(self) -> bool:
        """Nobody is there, and in both phases a start failed: a fault of the GPU takes all its
        clients and their memory along, and shows like this. New memory on which nobody could be
        started is not replaced again: the failures are not the memory's.
        """
        nobody = not any(seat.pool.num_ready for seat in self._seats)
        failed = all(seat.pool.num_failures(seat.share) > 1 for seat in self._seats)
        return nobody and failed and not self._renewed

    def renew(self) -> None:
        """New memory with the weights in it; executors are started on it by `tend`."""
        self._renewed = True
        logger.warning("the KV pages are lost: loading the model again")
        for model in self._models:
            model.renew()
        for seat in self._seats:
            seat.pool.forgive()

    def _observation(self, recent: Recent) -> Observation:
        before_s, self._prefill_busy_s = self._prefill_busy_s, self.prefill.pool.busy_s
        busy_s = self._prefill_busy_s - before_s
        return Observation(prefill_busy_s=busy_s, **dataclasses.asdict(recent))

    def wait(self, patience_s: float = math.inf) -> Lane | None:
        """Waits for the oldest step of a lane, or for news of any executor."""
        for lane in self.lanes:
            if lane.in_flight and lane.executor.has_report:
                return lane
        connections = [c for seat in self._seats for c in seat.pool.connections()]
        connections += [model.connection for model in self._models]
        patience_s = min(patience_s, self._patience_s())
        readable = wait_for_any([*connections, self._woken], patience_s)
        if self._woken in readable:
            self._woken.recv(4096)
        for lane in self.lanes:
            if lane.in_flight and lane.executor.connection in readable:
                return lane
        for lane in self.lanes:
            if lane.in_flight and self._due_s(lane) <= time.monotonic():
                lane.executor.give_up(f"no report of a step for {self._step_timeout_s:g} s")
                return lane
        return None

    def _due_s(self, lane: Lane) -> float:
        """When the oldest step of a lane is to be reported at the latest, by `time.monotonic`."""
        return lane.in_flight[0].launched_s + self._step_timeout_s

    def _patience_s(self) -> float:
        """How long nothing has to be done while nothing happens."""
        now_s = time.monotonic()
        patience = [self._due_s(lane) - now_s for lane in self.lanes if lane.in_flight]
        patience += [seat.pool.next_due_s - self._clock() for seat in self._seats]
        return max(min([*patience, _LONGEST_WAIT_S]), 0.0)

    def wake(self) -> None:
        """Ends a `wait` of another thread, or the next one."""
        with contextlib.suppress(OSError):  # closed, or woken often enough
            self._waker.send(b"1")

    @property
    def executors(self) -> list[ExecutorInfo]:
        """Those that are ready."""
        return [
            ExecutorInfo(seat.pool.phase, e.pid, e.share, e.ready.units, e is seat.executor)
            for seat in self._seats
            for e in seat.pool.ready()
        ]

    @property
    def switches(self) -> list[Switch]:
        """All changes of executors, in the order of time."""
        found = [switch for seat in self._seats for switch in list(seat.switches)]
        return sorted(found, key=lambda switch: switch.done_s)

    @property
    def num_lost(self) -> int:
        """Executors that failed or were killed."""
        return sum(seat.pool.num_lost for seat in self._seats)

    @property
    def break_even_estimate(self) -> float | None:
        """Of jpd's own mode policies."""
        return getattr(self._mode_policy, "estimate", None)

    def lost(self, lane: Lane, error: ExecutorLostError) -> bool:
        """Ends the executor; another will be seated.

        After a fault of the GPU those that are kept ready look alive until each fails in its first
        step. So a loss is blamed on the step only if the executor became ready, or finished another
        step, after the last loss that was; and on none that could not be sent.
        """
        seat = self._seats[self.lanes.index(lane)]
        blamed = seat.executor.proven and bool(lane.in_flight)
        if blamed:
            for executor in (e for s in self._seats for e in s.pool.ready()):
                executor.proven = False
        seat.lost(str(error))
        return blamed

    def _hang_up(self) -> None:
        """Both phases' executors end at the same time."""
        for seat in self._seats:
            seat.pool.hang_up()

    def close(self) -> None:
        """Ends all executors. Does nothing the second time."""
        self._resources.close()
