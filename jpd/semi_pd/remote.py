"""The coordinator's side of an executor in another process."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections import deque
from multiprocessing.connection import Connection

from jpd.child import Child
from jpd.engine.lane import ExecutorLostError
from jpd.engine.plan import Admission, StepPlan, StepResult
from jpd.semi_pd.messages import Failure, Ready, StepReport

SEND_TIMEOUT_S = 5.0
"""An executor that takes nothing of a message for so long is lost. A thread of it does nothing but
take messages in. The coordinator waits meanwhile if the message is larger than what the kernel
holds of a connection (some 200 kB), up to twice as long if a part of it was taken at first."""


class RemoteStep:
    """A step that was sent to an executor."""

    def __init__(self, plan: StepPlan, executor: RemoteExecutor) -> None:
        self.plan = plan
        self.launched_s = time.monotonic()
        self.report: StepReport | None = None
        """Once `result` has returned; when the step ran, for those who measure."""
        self._executor = executor

    def result(self) -> StepResult:
        """Blocks until the executor reports it; reports come in the order of the launches.

        Raises:
          ExecutorLostError: it never will.
        """
        self.report = self._executor.next_report()
        return self.report.result


class RemoteExecutor:
    """Sends plans to a process and takes its reports.

    Args:
      child: the process, which was sent its `WorkerSpec`.
      share: percent of the SMs that it was started with.
    """

    def __init__(self, child: Child, share: int) -> None:
        self.share = share
        self.ready: Ready | None = None
        self.recompiles = 0
        self.num_steps = 0
        """Steps that it finished."""
        self.proven = False
        """It became ready or finished a step, so its memory was sound then, since a step was last
        blamed for the end of an executor; see `TwoPhases.lost`."""
        self.copied_bytes = 0
        """KV that it sent to another device."""
        self.overlapped_bytes = 0
        """Of that, what was there before the step that sent it had computed all."""
        self.copy_wait_s = 0.0
        """Time that steps had computed all and waited for what they sent to arrive."""
        self.busy_s = 0.0
        """Time that its device had something to do."""
        self._child = child
        self._reports: deque[StepReport] = deque()
        self._lost: str | None = None

    @property
    def connection(self) -> Connection:
        """To wait on: readable when there is news, the end of the process included."""
        return self._child.connection

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.process.pid

    @property
    def failure(self) -> str | None:
        """Why it is lost, as far as that is known; None while it lives."""
        return self._lost

    @property
    def has_report(self) -> bool:
        """A report has come that nobody has taken."""
        return bool(self._reports)

    def admit(self, admissions: list[Admission]) -> None:
        """Tells it of rows; if the process is gone or hangs, `failure` says so."""
        with contextlib.suppress(ExecutorLostError):
            self._send(admissions)

    def launch(self, plan: StepPlan) -> RemoteStep:
        """Sends a step.

        Raises:
          ExecutorLostError: the process is gone, or hangs.
        """
        self._send(plan.without_sequences())
        return RemoteStep(plan, self)

    def _send(self, message: object) -> None:
        if self._lost is not None:  # perhaps in the middle of a message
            raise self._lost_error()
        try:
            self._child.connection.send(message)
        except OSError as error:
            self.poll()  # perhaps it said why
            hangs = isinstance(error, BlockingIOError)
            why = f"took nothing for {SEND_TIMEOUT_S:g} s" if hangs else "takes no more steps"
            self._lost = self._lost or f"its process {self.pid} {why}"
            raise self._lost_error() from error

    def next_report(self) -> StepReport:
        """The oldest report that nobody has taken; waits for it."""
        while not self._reports:
            self._receive()
        return self._reports.popleft()

    def poll(self) -> None:
        """Takes in what has come, without waiting; `ready` and `failure` are up to date then."""
        try:
            while self._lost is None and self._child.connection.poll():
                self._receive()
        except ExecutorLostError:
            pass  # `failure` says so

    def hang_up(self) -> None:
        """Lets the process run what it was sent and end by itself; nobody reads what it reports."""
        with contextlib.suppress(OSError):  # it is gone
            self._child.hang_up()

    def ends_within(self, timeout_s: float) -> bool:
        """Whether the process ends by itself in time; waits for it."""
        try:
            self._child.wait(max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, *, wait: bool) -> None:
        """Ends the process, if it still runs; with `wait`, returns when it is gone."""
        self._lost = self._lost or "it was ended"
        if wait:
            self._child.kill()
        else:
            self._child.process.kill()
            self._child.connection.close()

    def give_up(self, reason: str) -> None:
        """Takes it for lost, although its process runs."""
        self._lost = self._lost or reason

    def _receive(self) -> None:
        if self._lost is not None:
            raise self._lost_error()
        try:
            message = self._child.connection.recv()
        except Exception as error:  # its end, or half a message
            code = self._child.process.poll()
            how = "" if code is None else f", exit code {code}"
            self._lost = f"its process {self.pid} ended{how} ({type(error).__name__})"
            raise self._lost_error() from error
        if isinstance(message, Ready):
            self.ready = message
            self.proven = True
            _limit_sends(self._child.connection, SEND_TIMEOUT_S)
        elif isinstance(message, Failure):
            self._lost = message.text
            if message.fatal:
                raise RuntimeError(message.text)
            raise self._lost_error()
        else:
            self._reports.append(message)
            self.recompiles = message.recompiles
            self.busy_s += message.ended_s - message.begun_s
            if message.arrival is not None:
                self.copied_bytes += message.arrival.nbytes
                self.overlapped_bytes += message.arrival.overlapped_bytes
                self.copy_wait_s += message.arrival.late_s
            self.num_steps += 1
            self.proven = True

    def _lost_error(self) -> ExecutorLostError:
        return ExecutorLostError(f"an executor on {self.share} % of the SMs: {self._lost}")


def _limit_sends(connection: Connection, timeout_s: float) -> None:
    """Lets a send of which the other end takes nothing for so long end in `BlockingIOError`."""
    seconds, rest_s = divmod(timeout_s, 1)
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        limit = struct.pack("ll", int(seconds), int(1e6 * rest_s))  # a timeval
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
