"""An MPS daemon of one's own: processes share the GPU, each on its share of the SMs.

Private folders keep it apart from any other daemon on the machine; it is stopped on every way out.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

CONTROL = "nvidia-cuda-mps-control"


class MpsDaemon:
    """Context manager: starts the daemon, and stops it.

    Raises:
        RuntimeError: there is no MPS here, or it does not start.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def env(self, percent: int | None = None) -> dict[str, str]:
        """Environment of a process that shares the GPU, on `percent` of the SMs (None: all)."""
        if self._folder is None:
            raise RuntimeError("the MPS daemon is not running")
        env = os.environ | {
            "CUDA_MPS_PIPE_DIRECTORY": str(self._folder / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(self._folder / "log"),
        }
        if percent is not None:
            env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(percent)
        return env

    def __enter__(self) -> MpsDaemon:
        if shutil.which(CONTROL) is None:
            raise RuntimeError(f"{CONTROL} is not installed")
        self._folder = Path(tempfile.mkdtemp(prefix="mps-"))
        for name in ("pipe", "log"):
            (self._folder / name).mkdir()
        atexit.register(self.stop)
        done = subprocess.run(
            [CONTROL, "-d"],
            env=self.env(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).strip()
            self.stop()
            raise RuntimeError(f"{CONTROL} -d exited with {done.returncode}: {reason}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Asks the daemon to quit; kills it if it does not within some seconds. Never fails."""
        if self._folder is None:
            return
        pid_file = self._folder / "pipe" / f"{CONTROL}.pid"
        pid = None
        with contextlib.suppress(OSError, ValueError):
            pid = int(pid_file.read_text())
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [CONTROL],
                input="quit\n",
                env=self.env(),
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        for _ in range(50):
            if pid is None or not _is_alive(pid):
                break
            time.sleep(0.1)
        else:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        folder, self._folder = self._folder, None
        shutil.rmtree(folder, ignore_errors=True)
        atexit.unregister(self.stop)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def run_bounded(
    command: Sequence[str], env: dict[str, str], timeout_s: float
) -> tuple[int | None, str]:
    """Runs a process that may hang.

    One that takes too long is asked to end, and killed if it does not: an MPS client that is
    killed at once may leave the server in a state that stops the others.

    Returns:
        Exit status (None after a time-out) and what it wrote to standard error.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            status: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        errors.seek(0)
        return status, errors.read()
