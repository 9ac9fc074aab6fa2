"""Runs processes that share the GPU and may hang."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from native.mps import Mps, MpsError


def run_bounded(
    command: Sequence[str], env: dict[str, str], timeout_s: float, daemon: Mps | None = None
) -> tuple[int | None, str]:
    """Runs a process that may hang.

    One that takes too long is stopped, see `stop`.

    Returns:
        Exit status (None after a time-out) and what it wrote to standard error.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            status: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
            stop(process, daemon)
        errors.seek(0)
        return status, errors.read()


def stop(process: subprocess.Popen[Any], daemon: Mps | None = None) -> None:
    """Asks a process to end, and kills it if it does not.

    As a client of `daemon` it loses its work on the GPU first: one that is killed in the middle of
    it may leave the server in a state that stops the others.
    """
    if daemon is not None:
        with contextlib.suppress(MpsError):  # it must end all the same
            daemon.terminate_client(process.pid)
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
