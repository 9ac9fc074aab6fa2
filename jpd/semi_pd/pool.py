"""Executors of one phase with different SM shares: ready ones, and those that are being started.

MPS cannot change the share of a running process (arXiv 2504.19867 §4.3), so another share is
another process. Those that are kept ready make a change of shares a hand-over between two steps;
one that is not there is started in the background while the old one serves (the paper's delayed
switch). Every one of them maps the same weights and pages.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from jpd.semi_pd.remote import RemoteExecutor
from native.shares import SmShares

logger = logging.getLogger(__name__)

MAX_FAILURES = 4
"""Executors of one share that may fail one after the other, none having finished a step, before no
other is started."""
_FIRST_DELAY_S = 0.5
"""Until the next start after the second failure; the first is made good at once."""
_END_TIMEOUT_S = 5.0
"""For sound executors to end by themselves: to run what they were sent and let go of the device."""
_COUNTED = ("busy_s", "copied_bytes", "overlapped_bytes", "copy_wait_s", "recompiles")
"""What is summed over executors, gone ones included."""


class ExecutorPool:
    """Starts, keeps and ends executors of one phase.

    Args:
      phase: for messages.
      start: starts the process of an executor with a share, and returns before it is ready.
      shares: what gave the processes their shares; None where they have none.
      kept: shares that always have a ready executor, in percent.
      start_timeout_s: an executor that is not ready so long after its start has failed.
      clock: seconds.
    """

    def __init__(
        self,
        phase: str,
        start: Callable[[int], RemoteExecutor],
        shares: SmShares | None,
        kept: frozenset[int],
        start_timeout_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phase = phase
        self.kept = kept
        self.num_lost = 0
        """Executors that failed or were killed."""
        self.last_failure: str | None = None
        self.start_times_s: list[float] = []
        """From the start of each process until it was ready."""
        self._start = start
        self._shares = shares
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._gone: Counter[str] = Counter()
        self._failures: Counter[int] = Counter()
        self._not_before_s: dict[int, float] = {}
        self._ready: dict[int, RemoteExecutor] = {}
        self._starting: dict[int, tuple[RemoteExecutor, float]] = {}
        self._ending: list[threading.Thread] = []

    # ---- who is there

    @property
    def num_ready(self) -> int:
        """Executors that run steps, or could."""
        return len(self._ready)

    @property
    def num_starting(self) -> int:
        """Executors that are not ready yet."""
        return len(self._starting)

    def ready(self) -> list[RemoteExecutor]:
        """Executors that run steps, or could."""
        return list(self._ready.values())

    def num_failures(self, share: int) -> int:
        """Executors of a share that failed since one of them finished a step."""
        return self._failures[share]

    def given_up(self, share: int) -> bool:
        """Nobody serves this phase any more, nor can anybody be started on this share."""
        nobody = not self._ready and not self._starting
        return nobody and self._failures[share] >= MAX_FAILURES

    def nearest(self, share: int) -> RemoteExecutor | None:
        """The ready executor whose share is nearest to the wanted one."""
        return min(self._ready.values(), key=lambda e: abs(e.share - share), default=None)

    def connections(self) -> Iterator[Connection]:
        """Of all executors: readable when one became ready, reported or ended."""
        yield from (e.connection for e in list(self._ready.values()))
        yield from (e.connection for e, _ in list(self._starting.values()))

    @property
    def next_due_s(self) -> float:
        """When `tend` has something to do though nothing happens, by the clock: a start that was
        put off after a failure, or the end of one that takes too long; infinite if there is none.
        """
        begun = (begun_s for _, begun_s in self._starting.values())
        too_late = min(begun, default=math.inf) + self._start_timeout_s
        return min([*self._not_before_s.values(), too_late])

    # ---- what they did, gone ones included

    @property
    def busy_s(self) -> float:
        """Time that executors had something to do."""
        return self._sum("busy_s")

    @property
    def copied_bytes(self) -> int:
        """KV that executors sent to another device."""
        return self._sum("copied_bytes")

    @property
    def overlapped_bytes(self) -> int:
        """Of that, what was there before the step that sent it had computed all."""
        return self._sum("overlapped_bytes")

    @property
    def copy_wait_s(self) -> float:
        """Time that steps had computed all and waited for what they sent to arrive."""
        return self._sum("copy_wait_s")

    @property
    def recompiles(self) -> int:
        """Step shapes that executors compiled while requests waited."""
        return self._sum("recompiles")

    def _sum(self, name: str) -> int | float:
        return self._gone[name] + sum(getattr(e, name) for e in self.ready())

    # ---- starts and ends

    def get(self, share: int) -> RemoteExecutor | None:
        """The executor with a share, if it is ready; else it is started as soon as it may be."""
        if share not in self._ready and share not in self._starting:
            now_s = self._clock()
            due = now_s >= self._not_before_s.get(share, now_s)
            if due and self._failures[share] < MAX_FAILURES:
                self._not_before_s.pop(share, None)
                try:
                    self._starting[share] = (self._start(share), now_s)
                except OSError as error:  # no process, no file descriptor
                    self._failed(share, f"{type(error).__name__}: {error}")
        return self._ready.get(share)

    def tend(self, in_use: RemoteExecutor | None, wanted: int) -> None:
        """Takes in who became ready or ended, replaces kept ones, ends those nobody needs."""
        for share, (executor, begun_s) in list(self._starting.items()):
            executor.poll()
            if executor.failure is not None:
                self.remove(executor, executor.failure)
            elif executor.ready is not None:
                del self._starting[share]
                self._ready[share] = executor
                self.start_times_s.append(self._clock() - begun_s)
                logger.info(
                    "%s executor on %d %% is ready after %.1f s: %d SMs or CPUs, process %d",
                    self.phase,
                    share,
                    self.start_times_s[-1],
                    executor.ready.units,
                    executor.pid,
                )
            elif share != wanted and share not in self.kept:
                self.remove(executor)
            elif self._clock() >= begun_s + self._start_timeout_s:
                reason = f"its process {executor.pid} was not ready after"
                self.remove(executor, f"{reason} {self._start_timeout_s:g} s")
        for share, executor in list(self._ready.items()):
            if executor.num_steps:
                self._failures.pop(share, None)
            if executor is in_use:
                continue
            executor.poll()
            if executor.failure is not None:
                self.remove(executor, executor.failure)
            elif share != wanted and share not in self.kept:
                self.remove(executor)
        for share in [s for s in self._not_before_s if s != wanted and s not in self.kept]:
            del self._not_before_s[share]
        for share in self.kept:
            self.get(share)

    def remove(
        self, executor: RemoteExecutor, failure: str | None = None, *, running: bool = False
    ) -> None:
        """Ends an executor.

        Args:
          executor: of this pool.
          failure: why, if it failed.
          running: it failed, perhaps in the middle of a step, and is gone, touching no memory, when
            this returns. One that is not seated touches nobody's pages: it ends in the background
            if it has a share, as that takes longer than a step.
        """
        until_s = None
        if failure is None and self._shares is not None and _is_sound(executor):
            executor.hang_up()
            until_s = time.monotonic() + _END_TIMEOUT_S
        if running:
            self._end(executor, until_s)
        elif self._shares is None:
            executor.kill(wait=False)
        else:
            thread = threading.Thread(
                target=self._end, args=(executor, until_s), name="jpd-end", daemon=True
            )
            thread.start()
            self._ending = [t for t in self._ending if t.is_alive()] + [thread]
        self._forget(executor)
        if failure is not None:
            self.num_lost += 1
            if executor.num_steps:
                self._failures.pop(executor.share, None)
            self._failed(executor.share, failure)

    def _end(self, executor: RemoteExecutor, until_s: float | None) -> None:
        """Ends it; it is gone when this returns.

        A sound client of MPS is left to end by itself until `until_s` of `time.monotonic`: MPS that
        had to stop clients in the middle of steps has hung, and others of its clients have failed.
        Any other (None) is stopped by MPS before it is killed: one that starts runs kernels, too,
        and one that has failed may still run some.
        """
        if self._shares is not None and not (until_s and _ends_by_itself(executor, until_s)):
            try:
                self._shares.terminate_client(executor.pid)
            except Exception:  # the daemon may have gone the same way as the executor
                logger.exception("MPS did not end its client %d", executor.pid)
        executor.kill(wait=True)

    def _forget(self, executor: RemoteExecutor) -> None:
        if self._ready.get(executor.share) is executor:
            del self._ready[executor.share]
            for name in _COUNTED:
                self._gone[name] += getattr(executor, name)
        if self._starting.get(executor.share, (None,))[0] is executor:
            del self._starting[executor.share]

    def _failed(self, share: int, reason: str) -> None:
        logger.warning("%s executor on %d %% is lost: %s", self.phase, share, reason)
        self.last_failure = reason
        self._failures[share] += 1
        count = self._failures[share]
        if count < MAX_FAILURES:
            delay_s = _FIRST_DELAY_S * (2 ** (count - 1) - 1)  # none after the first
            self._not_before_s[share] = self._clock() + delay_s

    def forgive(self) -> None:
        """Forgets failures: what they were due to has been replaced."""
        self._failures.clear()
        self._not_before_s.clear()

    def hang_up(self) -> None:
        """Lets all that are sound run what they were sent and end by themselves; `close` waits."""
        for executor in self._ready.values() if self._shares is not None else ():
            if _is_sound(executor):
                executor.hang_up()

    def close(self) -> None:
        """Ends all of them; they are gone when this returns.

        Also when the interpreter exits, and nobody can start a thread.
        """
        self.hang_up()
        until_s = time.monotonic() + _END_TIMEOUT_S
        for executor in [*self._ready.values(), *(e for e, _ in self._starting.values())]:
            self._end(executor, until_s if _is_sound(executor) else None)
            self._forget(executor)
        for thread in self._ending:
            thread.join()


def _is_sound(executor: RemoteExecutor) -> bool:
    return executor.ready is not None and executor.failure is None


def _ends_by_itself(executor: RemoteExecutor, until_s: float) -> bool:
    in_time = executor.ends_within(until_s - time.monotonic())
    if not in_time:
        logger.warning("executor %d did not end by itself in time", executor.pid)
    return in_time
