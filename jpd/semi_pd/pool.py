"""Executors of one phase with different SM shares: ready ones, and those that are being started.

MPS cannot change the share of a running process (arXiv 2504.19867 §4.3), so another share is
another process. Those that are kept ready make a change of shares a hand-over between two steps;
one that is not there is started in the background while the old one serves (the paper's delayed
switch). Every one of them maps the same weights and pages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from jpd.semi_pd.remote import RemoteExecutor
from native.shares import SmShares

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Executors that may fail one after the other, none having served, before no other is started."""


class ExecutorPool:
    """Starts, keeps and ends executors of one phase.

    Args:
      phase: for messages.
      start: starts the process of an executor with a share, and returns before it is ready.
      shares: what gave the processes their shares; None where they have none.
      kept: shares that always have a ready executor, in percent.
      clock: seconds.
    """

    def __init__(
        self,
        phase: str,
        start: Callable[[int], RemoteExecutor],
        shares: SmShares | None,
        kept: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phase = phase
        self.kept = kept
        self.failures: list[str] = []
        """Why executors ended, since the last one that served."""
        self.start_times_s: list[float] = []
        """From the start of each process until it was ready."""
        self._start = start
        self._shares = shares
        self._clock = clock
        self._busy_before_s = 0.0
        self._recompiles_before = 0
        self._copied_before = 0
        self._ready: dict[int, RemoteExecutor] = {}
        self._starting: dict[int, tuple[RemoteExecutor, float]] = {}

    @property
    def given_up(self) -> bool:
        """Nobody serves this phase any more."""
        return len(self.failures) >= MAX_FAILURES and not self._ready and not self._starting

    def get(self, share: int) -> RemoteExecutor | None:
        """The executor with a share, if it is ready; else it is being started from now on."""
        known = share in self._ready or share in self._starting
        if not known and len(self.failures) < MAX_FAILURES:
            self._starting[share] = (self._start(share), self._clock())
        return self._ready.get(share)

    def nearest(self, share: int) -> RemoteExecutor | None:
        """The ready executor whose share is nearest to the wanted one."""
        return min(self._ready.values(), key=lambda e: abs(e.share - share), default=None)

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
        for share, executor in list(self._ready.items()):
            if executor is in_use:
                continue
            executor.poll()
            if executor.failure is not None:
                self.remove(executor, executor.failure)
            elif share != wanted and share not in self.kept:
                self.remove(executor)
        for share in self.kept:
            self.get(share)

    def remove(self, executor: RemoteExecutor, failure: str | None = None) -> None:
        """Ends an executor, because of a failure if there was one; no memory is touched by it then.

        A client of MPS that has work in flight must be told to stop before it is killed.
        """
        if failure is not None:
            logger.warning("%s executor on %d %% is lost: %s", self.phase, executor.share, failure)
            self.failures.append(failure)
        if self._shares is not None:
            self._shares.terminate_client(executor.pid)
        executor.kill()
        if self._ready.get(executor.share) is executor:
            del self._ready[executor.share]
            self._busy_before_s += executor.busy_s
            self._recompiles_before += executor.recompiles
            self._copied_before += executor.copied_bytes
        if self._starting.get(executor.share, (None,))[0] is executor:
            del self._starting[executor.share]

    def connections(self) -> Iterator[Connection]:
        """Of all executors: readable when one became ready, reported or ended."""
        yield from (e.connection for e in self._ready.values())
        yield from (e.connection for e, _ in self._starting.values())

    @property
    def num_ready(self) -> int:
        """Executors that run steps, or could."""
        return len(self._ready)

    @property
    def num_starting(self) -> int:
        """Executors that are not ready yet."""
        return len(self._starting)

    @property
    def busy_s(self) -> float:
        """Time that executors, gone ones included, had something to do."""
        return self._busy_before_s + sum(e.busy_s for e in self._ready.values())

    @property
    def copied_bytes(self) -> int:
        """KV that was brought to executors, gone ones included, from another device."""
        return self._copied_before + sum(e.copied_bytes for e in self._ready.values())

    @property
    def recompiles(self) -> int:
        """Step shapes that executors, gone ones included, compiled while requests waited."""
        return self._recompiles_before + sum(e.recompiles for e in self._ready.values())

    def close(self) -> None:
        """Ends all of them."""
        for executor in [*self._ready.values(), *(e for e, _ in self._starting.values())]:
            self.remove(executor)
