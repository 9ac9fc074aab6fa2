"""Lowers steps for another process: `python -m jpd.engine.lowering_worker` (`lowering_pool`)."""

from __future__ import annotations

import logging
import os

from jpd.child import connect

_NICE = 5
"""Whoever serves or compiles meanwhile goes first."""


def _main() -> None:
    connection = connect()
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
