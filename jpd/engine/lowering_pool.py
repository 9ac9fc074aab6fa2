"""Processes that lower steps, several at a time. Mosaic's lowering takes one thread of a process.

They run `python -m jpd.engine.lowering_worker` on the CPU, whatever the steps are for, and take
nothing of a GPU or of its MPS server.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from jpd.child import Child, spawn
from jpd.engine.shapes import StepShape
from jpd.engine.stored_steps import StoredStep

if TYPE_CHECKING:
    from jpd.engine.lowering import StepSource

MOST_PROCESSES = 16
PATIENCE_S = 300
"""Longest time for one answer; a step takes 5 to 8 s."""
MODULE = "jpd.engine.lowering_worker"
_AWAY = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""Variables that keep a process off the GPUs."""

Jobs = Sequence[tuple[StepShape, Any]]
"""Shapes, and their inputs as `jax.ShapeDtypeStruct`s."""


def _ask(child: Child, question: Any) -> Any:
    """The answer of a process.

    Raises:
      OSError, EOFError: it is gone.
      TimeoutError: there is none.
    """
    child.connection.send(question)
    if not child.connection.poll(PATIENCE_S):
        raise TimeoutError(f"no answer in {PATIENCE_S} s")
    return child.connection.recv()


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
    workers: list[Child] = []
    stop = threading.Event()

    def attend() -> None:
        """One process, from its start to its end."""
        worker, shape, why = None, None, ""
        try:
            worker = spawn(MODULE, env=_AWAY)
            workers.append(worker)
            why = _ask(worker, (source, settings, fingerprint))
            while not why and not stop.is_set():
                shape, inputs = todo.popleft()
                answers.put((shape, _ask(worker, (shape, inputs))))
                shape = None
        except IndexError:
            pass  # all is done
        except Exception as error:  # the process, its pickles or its connection
            why = f"the process that was to do it failed: {type(error).__name__}: {error}"
        if shape is not None:
            answers.put((shape, why))
        answers.put((None, why))
        if worker is not None:
            worker.kill()

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
        for worker in workers:  # whatever they do; their threads do the rest
            worker.process.kill()
        for thread in threads:
            thread.join()
