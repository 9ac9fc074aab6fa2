"""Processes that lower steps, several at a time. Mosaic's lowering takes one thread of a process.

They run `python -m jpd.engine.lowering_worker` on the CPU, whatever the steps are for, and take
nothing of a GPU or of its MPS server. As in `jpd.semi_pd.child`, they are no processes of
multiprocessing, which would import a user's script again, and none outlives its parent.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from jpd.engine.shapes import StepShape
from jpd.engine.stored_steps import StoredStep

if TYPE_CHECKING:
    from jpd.engine.lowering import StepSource

MOST_PROCESSES = 16
PATIENCE_S = 300
"""Longest time for one answer; a step takes 5 to 8 s."""
MODULE = "jpd.engine.lowering_worker"

Jobs = Sequence[tuple[StepShape, Any]]
"""Shapes, and their inputs as `jax.ShapeDtypeStruct`s."""


class _Worker:
    """A process, and this one's end of the connection to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, ours:
            command = [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), str(os.getpid())]
            path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
            away = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(),),
                env=os.environ | away,
                process_group=0,  # a Ctrl-C is the parent's business
            )
            self._connection = Connection(ours.detach())

    def ask(self, question: Any) -> Any:
        """The answer of the process.

        Raises:
          OSError, EOFError: it is gone.
          TimeoutError: there is none.
        """
        self._connection.send(question)
        if not self._connection.poll(PATIENCE_S):
            raise TimeoutError(f"no answer in {PATIENCE_S} s")
        return self._connection.recv()

    def kill(self) -> None:
        """Ends the process at once, whatever it does; from any thread."""
        self._process.kill()

    def close(self) -> None:
        """Ends the process and waits until it is gone."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def lower(
    source: StepSource, jobs: Jobs, count: int, settings: dict[str, Any], fingerprint: str | None
) -> Generator[tuple[StepShape, StoredStep | str]]:
    """Lowers steps in other processes.

    Args:
      source: what the steps are made from.
      jobs: the steps.
      count: how many processes.
      settings: jax's, which they are to take over.
      fingerprint: what they must see of code and settings, else they do nothing.

    Yields:
      Every shape once, with its module or with the reason why there is none, as they come.
    """
    todo = deque(jobs)
    answers: queue.SimpleQueue[tuple[StepShape | None, StoredStep | str]] = queue.SimpleQueue()
    workers: list[_Worker] = []
    stop = threading.Event()

    def attend() -> None:
        """Lives as long as the process that it starts: the kernel ends that with this thread."""
        worker, shape, why = None, None, ""
        try:
            worker = _Worker()
            workers.append(worker)
            why = worker.ask((source, settings, fingerprint))
            while not why and not stop.is_set():
                shape, inputs = todo.popleft()
                answers.put((shape, worker.ask((shape, inputs))))
                shape = None
        except IndexError:
            pass  # all is done
        except Exception as error:  # the process, its pickles or its connection
            why = f"the process that was to do it failed: {type(error).__name__}: {error}"
        if shape is not None:
            answers.put((shape, why))
        answers.put((None, why))
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=attend, name=f"jpd-lower-{i}") for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        missing, alive, why = dict(jobs), count, ""
        while missing and alive:
            shape, answer = answers.get()
            if shape is None:
                alive, why = alive - 1, answer or why
            else:
                del missing[shape]
                yield shape, answer
        for shape in missing:
            yield shape, str(why)
    finally:
        stop.set()
        todo.clear()
        for worker in workers:
            worker.kill()
        for thread in threads:
            thread.join()
