"""An MPS control daemon seen from outside: its processes, and questions through its pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
SHARE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"

_POLL_S = 0.01
# Names of the daemon and of its servers, as far as the kernel keeps them (15 characters).
_PROCESS_NAME = "nvidia-cuda-mps"


class MpsError(RuntimeError):
    """MPS is not there, is somebody else's, or does not answer."""


@dataclass(frozen=True)
class MpsProcess:
    """A daemon, a server, or a control program that is asking a question."""

    pid: int
    started: int
    """Clock tick at which it started: with the pid, its identity, as pids are used again."""
    parent: int
    user_id: int
    environment: Mapping[str, str]
    """As it was started; empty where it may not be read."""

    @property
    def is_alive(self) -> bool:
        now = read_process(self.pid)
        return now is not None and now.started == self.started

    def kill(self) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def read_process(pid: int) -> MpsProcess | None:
    """The MPS process with this pid; None where there is none, or it has ended (zombies too)."""
    folder = Path("/proc", str(pid))
    try:
        if not (folder / "comm").read_text().startswith(_PROCESS_NAME):
            return None
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        user_id = folder.stat().st_uid
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in "ZX":
        return None
    environment = {}
    with contextlib.suppress(OSError):
        pairs = (folder / "environ").read_bytes().split(b"\0")
        environment = dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)
    return MpsProcess(pid, int(fields[19]), int(fields[1]), user_id, environment)


def processes_of(pipe: Path) -> list[MpsProcess]:
    """The daemon of `pipe` and its servers; servers also when the daemon is gone."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    found = [process for pid in pids if (process := read_process(pid))]
    own = {p.pid for p in found if p.environment.get(PIPE_VARIABLE) == str(pipe)}
    return [process for process in found if process.pid in own or process.parent in own]


def daemon_of(pipe: Path) -> MpsProcess | None:
    """The live daemon that wrote its pid into `pipe`, whoever started it.

    Raises:
        PermissionError: the directory may not be read.
    """
    try:
        pid = int((pipe / f"{CONTROL}.pid").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return read_process(pid)


def end(processes: Iterable[MpsProcess], patience_s: float) -> None:
    """Waits until `processes` have ended, and kills those that have not after `patience_s`.

    Raises:
        MpsError: one cannot be killed.
    """
    left = list(processes)
    for _ in polls(patience_s):
        left = [process for process in left if process.is_alive]
        if not left:
            return
    for process in left:
        try:
            process.kill()
        except PermissionError as error:
            raise MpsError(f"MPS process {process.pid} may not be killed: {error}") from error
    for _ in polls(5):
        left = [process for process in left if process.is_alive]
        if not left:
            return
    pids = [process.pid for process in left]
    raise MpsError(f"MPS processes {pids} were killed but do not end")


def polls(timeout_s: float) -> Iterator[None]:
    """Yields at once, then every few milliseconds until `timeout_s` has passed, and once after."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(_POLL_S)
    yield


def ask(environment: Mapping[str, str], command: str, timeout_s: float) -> str:
    """What the control daemon that `environment` names answers to one command.

    Raises:
        MpsError: no answer within `timeout_s`, or the control program fails.
    """
    try:
        done = subprocess.run(
            [CONTROL],
            input=f"{command}\n",
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MpsError(f"{CONTROL} did not answer {command!r} within {timeout_s:g} s") from error
    except OSError as error:
        raise MpsError(f"{CONTROL} cannot be run: {error}") from error
    if done.returncode != 0:
        reason = (done.stderr + done.stdout).strip() or "no reason given"
        raise MpsError(f"{CONTROL} failed on {command!r} (status {done.returncode}): {reason}")
    return done.stdout


def ask_pids(environment: Mapping[str, str], command: str, timeout_s: float) -> list[int]:
    """What the control daemon answers to a command that lists processes."""
    answer = ask(environment, command, timeout_s)
    # Anything else is a message, and no answer must not pass for "there are none".
    if not all(word.isdecimal() for word in answer.split()):
        raise MpsError(f"{CONTROL} answered {command!r} with {answer.strip()!r}, not with pids")
    return [int(word) for word in answer.split()]


def launch(environment: Mapping[str, str], timeout_s: float) -> None:
    """Starts a daemon; it may not answer yet.

    Raises:
        MpsError: it does not start.
    """
    # A file, not a pipe: what stays behind may keep its end open, and reading would never end.
    with tempfile.TemporaryFile("w+") as output:
        try:
            status = subprocess.run(
                [CONTROL, "-d"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the process that uses it
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise MpsError(f"{CONTROL} -d did not return within {timeout_s:g} s") from error
        except OSError as error:
            raise MpsError(f"{CONTROL} cannot be run: {error}") from error
        output.seek(0)
        if status != 0:
            reason = output.read().strip() or "no reason given"
            raise MpsError(f"{CONTROL} -d failed (status {status}): {reason}")
