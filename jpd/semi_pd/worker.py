"""An executor in a process of its own: maps weights and pages, compiles, runs the steps it is sent.

    python -m jpd.semi_pd.worker    (by `jpd.semi_pd.remote`)

One thread takes plans in, the main thread launches them, and a third waits for their results and
reports them, so that the device has its next step before the host has read the last one.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from jpd.child import connect
from jpd.errors import ConfigError
from jpd.semi_pd.ownership import OwnershipCheck, OwnershipError
from jpd.semi_pd.page_copy import PageCopier
from native import affinity

if TYPE_CHECKING:
    from jpd.engine.executor import Executor, InFlight
    from jpd.engine.plan import StepPlan, StepResult
    from jpd.semi_pd.messages import WorkerSpec


class _Worker:
    """An executor, and what happens to pages before and after its steps."""

    def __init__(
        self, executor: Executor, copier: PageCopier | None, check: OwnershipCheck | None
    ) -> None:
        self.executor = executor
        self._copier = copier
        self._check = check

    def launch(self, plan: StepPlan) -> tuple[InFlight, int]:
        """The launched step, and the bytes that were copied for it."""
        if self._check is not None:
            self._check.check(plan, "before it was launched")
        copied = 0 if self._copier is None else self._copier.copy(plan.copies)
        return self.executor.launch(plan), copied

    def result(self, step: InFlight) -> StepResult:
        result = step.result()
        if self._check is not None:
            self._check.check(step.plan, "before it had run")
        return result


def _build(spec: WorkerSpec) -> tuple[_Worker, int]:
    """The executor, compiled and checked, and the SMs or CPUs that it runs on."""
    # Here and not above: jax reads the CPUs that it may use once, when it starts.
    import jax

    from jpd.engine.build import check_kernels
    from jpd.engine.compile import use_cache_dir
    from jpd.engine.executor import Executor, shape_table
    from jpd.semi_pd import arrays
    from jpd.semi_pd.host_pages import HostPagesExecutor
    from native.memory import open_block

    where = spec.handles.pages.device
    if where != "cpu":
        # The process may see several GPUs, to read their pages; jax is to start on one.
        jax.config.update("jax_cuda_visible_devices", where.removeprefix("cuda:"))
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    if on_cpu != (spec.handles.weights.device == "cpu"):
        raise ConfigError(
            f"weights lie on {spec.handles.weights.device}, but jax found only {device}: "
            "a GPU needs jpd[cuda12] or jpd[cuda13]; JAX_PLATFORMS=cpu keeps all on the CPU"
        )
    weights, pages = open_block(spec.handles.weights), open_block(spec.handles.pages)
    params = arrays.params(weights, spec.weights)
    use_cache_dir(spec.config.compilation_cache_dir)
    check_kernels(spec.config, spec.model, params, device)
    options = {
        "phi": spec.phi,
        "shapes": shape_table(spec.config, prefill=spec.prefill, decode=spec.decode),
    }
    common = (spec.config, spec.model, params, device, spec.eos_token_ids)
    if on_cpu:
        executor = HostPagesExecutor(*common, block=pages, layout=spec.pages, **options)
        units = affinity.visible_cpus()
    else:
        from native.mps import visible_sms

        executor = Executor(*common, kv=arrays.kv_pages(pages, spec.pages), **options)
        units = visible_sms(int(where.removeprefix("cuda:")))
    executor.compile_ahead()
    check = None
    if spec.generations is not None:
        counts = open_block(spec.generations).array(0, (spec.config.num_pages,), np.int64)
        check = OwnershipCheck(counts)
    copier = None
    if spec.source_pages is not None:
        source = open_block(spec.source_pages, reader=None if on_cpu else where)
        copier = PageCopier(source, pages, spec.pages)
    return _Worker(executor, copier, check), units


def _report(
    worker: _Worker,
    steps: queue.SimpleQueue[tuple[InFlight, int, float] | None],
    out: _Out,
) -> None:
    """Reports steps in the order of their launch, each when it has run."""
    from jpd.semi_pd.messages import StepReport

    ended_s = 0.0
    while (launched := steps.get()) is not None:
        step, copied_bytes, launched_s = launched
        begun_s = max(launched_s, ended_s)
        try:
            result = worker.result(step)
            ended_s = time.monotonic()
            recompiles = worker.executor.recompiles
            out.send(StepReport(result, recompiles, copied_bytes, begun_s, ended_s))
        except BaseException as error:
            _give_up(out, error)


def _receive(connection: Connection, plans: queue.SimpleQueue[StepPlan | None]) -> None:
    """Takes plans in as they come, also while a step is being launched: a coordinator that sends
    must not wait for that."""
    while True:
        try:
            plans.put(connection.recv())
        except (EOFError, OSError):
            plans.put(None)
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
    plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
    threading.Thread(
        target=_receive, args=(connection, plans), name="jpd-receive", daemon=True
    ).start()
    steps: queue.SimpleQueue[tuple[InFlight, int, float] | None] = queue.SimpleQueue()
    reporter = threading.Thread(
        target=_report, args=(worker, steps, out), name="jpd-report", daemon=True
    )
    reporter.start()
    while (plan := plans.get()) is not None:
        launched_s = time.monotonic()
        try:
            steps.put((*worker.launch(plan), launched_s))
        except BaseException as error:
            _give_up(out, error)
    steps.put(None)
    reporter.join()
    worker.executor.release()


if __name__ == "__main__":
    _main()
