"""Lowers programs for another process: `python -m benchmarks.lowering_worker` (`lowered`)."""

from __future__ import annotations

import os
import pickle
from typing import Any

from jpd.child import connect

_NICE = 5
"""Whoever compiles or launches meanwhile goes first."""


def sendable(error: Exception) -> Exception:
    """The error, or its type's name and its message where it does not survive being pickled."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if (type(again), str(again)) == (type(error), str(error)):
            return error
    except Exception:  # of any kind: it is the pickling of somebody's class
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def main() -> None:
    connection = connect()
    os.nice(_NICE)
    import jax

    from pallas_kernels import mosaic

    # Kernels as this version of jax lowers them, not in a form that an older one reads.
    jax.config.update("jax_export_ignore_forward_compatibility", True)
    with mosaic.tracing_for(*connection.recv()):
        while True:
            answer: Any
            try:
                make_chain = connection.recv()
            except EOFError:
                return
            except Exception as error:  # what it names is not there
                answer = sendable(error)
            else:
                answer = _export(make_chain)
            connection.send(answer)


def _export(make_chain: Any) -> bytes | Exception:
    try:
        return make_chain().export()
    except Exception as error:  # a kernel that refuses a shape, say
        return sendable(error)


if __name__ == "__main__":
    main()
