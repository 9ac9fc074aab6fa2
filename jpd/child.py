"""Processes of one's own: `python -m MODULE`, a connection to it, and no way to outlive the parent.

Not multiprocessing's spawn, which imports the user's script again in every child: a script has no
main guard. The child finds modules where the parent does, talks over one end of a socketpair by
pickles, and ends in one of three ways: it returns when its connection reaches its end, the parent
kills it, or the kernel kills it when the parent is gone, however that went.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1
# Several processes share a GPU: none may take most of its memory when it starts.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclass(frozen=True)
class Child:
    """A child process and the parent's end of the connection to it."""

    process: subprocess.Popen[bytes]
    connection: Connection

    def hang_up(self) -> None:
        """Says that nothing more will be sent; the child's own messages still come."""
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            end.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Ends the process at once, waits until it is gone, and closes the connection."""
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for the end of the process, see `subprocess.Popen.wait`.

        Returns:
          Its exit code; negative where a signal ended it.

        Raises:
          subprocess.TimeoutExpired: it still runs after `timeout_s`.
        """
        return self.process.wait(timeout_s)


def spawn(module: str, *, fds: Iterable[int] = (), env: Mapping[str, str] | None = None) -> Child:
    """Starts `python -m module`; the module's first act is `connect()`.

    What the child prints goes to the parent's stderr, and it reads an empty stdin. The caller
    closes the connection and waits for the process, or kills it.

    Args:
      module: Name of a module with a main guard.
      fds: Open files that the child gets under the same numbers.
      env: Variables beside, or in place of, this process's own. JAX takes no memory in advance.
    """
    ours, theirs = socket.socketpair()
    with theirs, ours:
        command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())]
        process = _start(
            lambda: subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(), *fds),
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": _search_path()} | dict(env or {}),
                # A Ctrl-C of the terminal reaches a child before it has come to `connect`.
                process_group=0,
            )
        )
        return Child(process, Connection(ours.detach()))


def connect() -> Connection:
    """The child's end of its connection; called once, before anything that takes time.

    From here on the process ends when its parent does, and ignores SIGINT: a Ctrl-C is the
    parent's business. It is still the caller's to return when the connection reaches its end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd, parent = map(int, sys.argv[1:])
    os.set_inheritable(fd, False)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent ended before this process was ready")
    return Connection(fd)


def _search_path() -> str:
    """Where this process looks for modules, so that a child runs the same code."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _start(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Starts a process from a thread that lasts as long as the process.

    The kernel sends PR_SET_PDEATHSIG when the *thread* that made the child ends. Made by a thread
    that only starts executors in the background, a child would die with that thread.
    """
    answer: Future[subprocess.Popen[bytes]] = Future()

    def attend() -> None:
        try:
            process = start()
        except BaseException as error:
            answer.set_exception(error)
        else:
            answer.set_result(process)
            process.wait()

    threading.Thread(target=attend, name="jpd-child", daemon=True).start()
    return answer.result()
