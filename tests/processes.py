"""What tests do with processes: wait for their ends, stop them, and see what they leave open."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 300
"""For what takes seconds at most on a machine that has nothing else to do."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Waits until a condition holds; fails with `what` if that takes `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def wait_for_end(pid: int) -> None:
    """Waits for a process that need not be a child of this one."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(fd) as file:
        assert select.select([file], [], [], PATIENCE_S)[0], f"process {pid} still runs"


def stop(pid: int) -> None:
    """Stops a process; when this returns, none of its threads runs."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    wait_until(lambda: {state(task) for task in tasks.iterdir()} == {"T"}, f"{pid} does not stop")


def state(process: Path) -> str:
    """The letter of `/proc/PID/stat`, of a process or a thread."""
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def open_files() -> set[tuple[str, str]]:
    """Numbers of this process's open files, and what they are.

    Compare by difference: others, the collector among them, may close files at any time.
    """
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found
