"""How a long run says how far it is, and ends in order when it has to."""

from __future__ import annotations

import signal
import sys
import time

_begun_s = time.monotonic()


def say(text: str) -> None:
    """Prints a line with the seconds since the start, at once."""
    print(f"[{time.monotonic() - _begun_s:6.1f} s] {text}", flush=True)


def end_on_sigterm() -> None:
    """Makes SIGTERM, which `timeout` sends, an exit of the main thread: what it opened is closed.

    Only the first one: `timeout` sends it to a process and to its group.
    """

    def leave(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
