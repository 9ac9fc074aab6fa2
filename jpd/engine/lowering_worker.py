"""Lowers steps for another process: `python -m jpd.engine.lowering_worker` (`lowering_pool`)."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1
_NICE = 5
"""Whoever serves or compiles meanwhile goes first."""


def _connect() -> Connection:
    """The connection to the parent. From here on this process ends with it, however that goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd, parent = map(int, sys.argv[1:])
    os.set_inheritable(fd, False)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent ended before this process was ready")
    return Connection(fd)


def _main() -> None:
    connection = _connect()
    os.nice(_NICE)
    # What is passed over is said by the parent, once.
    logging.getLogger("jpd").setLevel(logging.ERROR)
    import jax

    from jpd.engine.lowering import fingerprint
    from jpd.engine.lowering import settings as settings_here

    source, settings, expected = connection.recv()
    here = settings_here()
    for name, value in settings.items():
        if here.get(name) != value:
            jax.config.update(name, value)
    same = fingerprint() == expected
    connection.send("" if same else "another process sees other code or other settings of jax")
    while same:
        try:
            shape, inputs = connection.recv()
        except EOFError:
            return
        try:
            answer = source.export(shape, inputs)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        connection.send(answer)


if __name__ == "__main__":
    _main()
