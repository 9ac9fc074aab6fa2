"""An executor in a process of its own: maps weights and pages, compiles, runs the steps it is sent.

    python -m jpd.semi_pd.worker    (by `jpd.semi_pd.remote`)

One thread takes plans in, the main thread launches them, and a third waits for their results and
reports them, so that the device has its next step before the host has read the last one.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from jpd.child import connect
from jpd.semi_pd.ownership import OwnershipCheck, OwnershipError
from native import affinity

if TYPE_CHECKING:
    from jpd.engine.executor import Executor, InFlight
    from jpd.engine.plan import Admission, StepPlan, StepResult
    from jpd.semi_pd.messages import WorkerSpec
    from jpd.semi_pd.page_push import PagePusher
    from native.kv_push import Arrival


class _Worker:
    """An executor, and what happens to pages before and after its steps."""

    def __init__(
        self, executor: Executor, pusher: PagePusher | None, check: OwnershipCheck | None
    ) -> None:
        self.executor = executor
        self._pusher = pusher
        self._check = check

    def admit(self, admissions: list[Admission]) -> None:
        """Takes in rows before the steps that hold them."""
        self.executor.admit(admissions)

    def launch(self, plan: StepPlan) -> tuple[InFlight, list[int]]:
        """The launched step, and the numbers of what it sends to another device."""
        if self._check is not None:
            self._check.check(plan, "before it was launched")
        numbers = [] if self._pusher is None else self._pusher.announce(plan.copies)
        return self.executor.launch(plan), numbers

    def result(self, step: InFlight, numbers: list[int]) -> tuple[StepResult, Arrival | None]:
        """When the step has run and all that it sent has arrived."""
        result = step.result()
        arrival = None if self._pusher is None else self._pusher.wait(numbers)
        if self._check is not None:
            self._check.check(step.plan, "before it had run")
        return result, arrival

    def release(self) -> None:
        """Waits for the device and lets go of everything."""
        self.executor.release()
        if self._pusher is not None:
            self._pusher.close()


def _build(spec: WorkerSpec) -> tuple[_Worker, int]:
    """The executor, compiled and checked, and the SMs or CPUs that it runs on."""
    # Here and not above: jax reads the CPUs that it may use once, when it starts.
    from jpd.engine.build import check_ranks
    from jpd.engine.compile import use_cache_dir
    from jpd.engine.executor import Executor
    from jpd.engine.shapes import shape_table
    from jpd.parallel import place
    from jpd.semi_pd import arrays, collectives
    from jpd.semi_pd.host_pages import HostPagesExecutor
    from native.memory import open_block

    places = [handle.device for handle in spec.handles.pages]
    on_cpu = places[0] == "cpu"
    placement = place(spec.split, arrays.start_jax(places))
    weights = [open_block(handle) for handle in spec.handles.weights]
    pages = [open_block(handle) for handle in spec.handles.pages]
    params = arrays.params(weights, spec.weights, placement)
    use_cache_dir(spec.config.compilation_cache_dir)
    shapes = shape_table(spec.config, prefill=spec.prefill, decode=spec.decode)
    if spec.check_kernels:
        check_ranks(spec.config, spec.split, params, placement, shapes)
    pusher = None
    if spec.target_pages:
        from jpd.semi_pd.page_push import PagePusher, PushProgress

        readers = [None if on_cpu else where for where in places]
        targets = [
            open_block(h, reader) for h, reader in zip(spec.target_pages, readers, strict=True)
        ]
        pusher = PagePusher(pages, targets, spec.pages, placement.devices)
    options = {
        "progress": None if pusher is None else PushProgress(),
        "phi": spec.phi,
        "shapes": shapes,
        "placement": placement,
    }
    model, device = spec.split.model, placement.devices[0]
    common = (spec.config, model, params, device, spec.eos_token_ids)
    if on_cpu:
        executor = HostPagesExecutor(*common, blocks=pages, layout=spec.pages, **options)
        units = affinity.visible_cpus()
    else:
        from native.mps import visible_sms

        kv = arrays.kv_pages(pages, spec.pages, placement)
        executor = Executor(*common, kv=kv, **options)
        units = min(visible_sms(int(where.removeprefix("cuda:"))) for where in places)
        collectives.check_sms(places, units)
    executor.compile_ahead()
    # Of several GPUs, those that start keep to the collectives of their check. Who sends pages
    # sends those of announced steps only.
    if not on_cpu and len(places) == 1 and pusher is None:
        before = arrays.addresses(executor.kv)
        executor.run_for_nobody()
        if arrays.addresses(executor.kv) != before:
            raise RuntimeError("a step left the KV pages in other memory than all executors share")
    check = None
    if spec.generations is not None:
        counts = open_block(spec.generations).array(0, (spec.config.num_pages,), np.int64)
        check = OwnershipCheck(counts)
    return _Worker(executor, pusher, check), units


def _report(
    worker: _Worker,
    steps: queue.SimpleQueue[tuple[InFlight, list[int], float] | None],
    out: _Out,
) -> None:
    """Reports steps in the order of their launch, each when it has run."""
    from jpd.semi_pd.messages import StepReport

    ended_s = 0.0
    while (launched := steps.get()) is not None:
        step, numbers, launched_s = launched
        begun_s = max(launched_s, ended_s)
        try:
            result, arrival = worker.result(step, numbers)
            ended_s = time.monotonic()
            recompiles = worker.executor.recompiles
            out.send(StepReport(result, recompiles, arrival, begun_s, ended_s))
        except BaseException as error:
            _give_up(out, error)


def _receive(
    connection: Connection, messages: queue.SimpleQueue[StepPlan | list[Admission] | None]
) -> None:
    """Takes in what comes, also while a step is being launched: a coordinator that sends must not
    wait for that."""
    while True:
        try:
            messages.put(connection.recv())
        except (EOFError, OSError):
            messages.put(None)
            return


class _Out:
    """What several threads send."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)


def _give_up(out: _Out, error: BaseException) -> None:
    """Says why, and ends the process: after a failed step the device's state is unknown."""
    from jpd.semi_pd.messages import Failure

    traceback.print_exception(error)
    with contextlib.suppress(OSError):  # the coordinator is gone
        text, fatal = f"{type(error).__name__}: {error}", isinstance(error, OwnershipError)
        out.send(Failure(text, fatal))
    os._exit(1)


def _main() -> None:
    connection = connect()
    out = _Out(connection)
    affinity.apply_environment()
    spec = connection.recv()
    from jpd.semi_pd.messages import Ready

    try:
        worker, units = _build(spec)
        out.send(Ready(units))
    except BaseException as error:
        _give_up(out, error)
    messages: queue.SimpleQueue[StepPlan | list[Admission] | None] = queue.SimpleQueue()
    threading.Thread(
        target=_receive, args=(connection, messages), name="jpd-receive", daemon=True
    ).start()
    steps: queue.SimpleQueue[tuple[InFlight, list[int], float] | None] = queue.SimpleQueue()
    reporter = threading.Thread(
        target=_report, args=(worker, steps, out), name="jpd-report", daemon=True
    )
    reporter.start()
    while (message := messages.get()) is not None:
        launched_s = time.monotonic()
        try:
            if isinstance(message, list):
                worker.admit(message)
            else:
                steps.put((*worker.launch(message), launched_s))
        except BaseException as error:
            _give_up(out, error)
    steps.put(None)
    reporter.join()
    try:
        worker.release()
    except BaseException as error:
        _give_up(out, error)
    sys.stdout.flush()
    os._exit(0)  # nothing runs on the device; unloading jax takes a second, and somebody waits


if __name__ == "__main__":
    _main()
