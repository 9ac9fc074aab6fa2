"""Real engines whose executors sleep for as long as a model says: a wall clock, but no device.

The coordinator, its thread, the client and (for semi-PD) the messages are the real ones, so what a
simulation leaves out or gets wrong of them shows.
"""

from __future__ import annotations

import queue
import threading
import time
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from jpd.async_llm import AsyncLLM
from jpd.config import EngineConfig
from jpd.engine.build import Engine, Prepared
from jpd.engine.coordinator import Coordinator
from jpd.engine.lane import OneExecutor
from jpd.engine.plan import StepPlan, StepResult
from jpd.engine.recent import Recent
from jpd.engine.shapes import ShapeTable, shape_table
from jpd.semi_pd.build import make_mode_policy
from jpd.semi_pd.controller import FULL
from jpd.semi_pd.messages import Ready, StepReport
from jpd.semi_pd.mode import phases_of
from jpd.semi_pd.pool import ExecutorPool
from jpd.semi_pd.remote import RemoteExecutor
from jpd.semi_pd.topology import TwoPhases
from jpd.simulate.latency import LatencyModel, StepWork


def _result(plan: StepPlan) -> StepResult:
    return StepResult(np.zeros(len(plan.rows) + len(plan.chunks), np.int32), None)


class _SleepingStep:
    def __init__(self, plan: StepPlan, end_s: float) -> None:
        self.plan, self._end_s = plan, end_s

    def result(self) -> StepResult:
        time.sleep(max(0.0, self._end_s - time.monotonic()))
        return _result(self.plan)


class SleepingExecutor:
    """In the engine's process."""

    recompiles = 0

    def __init__(self, model: LatencyModel, shapes: ShapeTable) -> None:
        self._model, self._shapes = model, shapes
        self._end_s = 0.0

    def launch(self, plan: StepPlan) -> _SleepingStep:
        seconds = self._model.full_s(StepWork.of(plan, self._shapes))
        self._end_s = max(self._end_s, time.monotonic()) + seconds
        return _SleepingStep(plan, self._end_s)

    def release(self) -> None:
        """Nothing to let go of."""


class _SleepingWorker:
    """Stands in for `jpd.child.Child`: threads at the other end of a pipe."""

    process = SimpleNamespace(pid=0, kill=lambda: None)

    def __init__(self, model: LatencyModel, shapes: ShapeTable) -> None:
        self.connection, self._theirs = Pipe()
        self._model, self._shapes = model, shapes
        self._steps: queue.SimpleQueue[tuple[StepPlan, float] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=f) for f in (self._receive, self._run)]
        for thread in self._threads:
            thread.start()

    def _receive(self) -> None:
        while (plan := self._theirs.recv()) is not None:
            self._steps.put((plan, time.monotonic()))
        self._steps.put(None)

    def _run(self) -> None:
        self._theirs.send(Ready(1))
        ended_s = 0.0
        while (step := self._steps.get()) is not None:
            plan, received_s = step
            begun_s = max(received_s, ended_s)
            seconds = self._model.full_s(StepWork.of(plan, self._shapes))
            time.sleep(max(0.0, begun_s + seconds - time.monotonic()))
            ended_s = time.monotonic()
            self._theirs.send(StepReport(_result(plan), 0, None, begun_s, ended_s))

    def kill(self) -> None:
        """The threads end after the last step."""
        self.connection.send(None)
        for thread in self._threads:
            thread.join()
        self.connection.close()
        self._theirs.close()


def sleeping_llm(prepared: Prepared, model: LatencyModel) -> AsyncLLM:
    """An engine in real time."""
    config: EngineConfig = prepared.config
    depth = 1 + config.async_scheduling
    topology: Any
    if config.topology == "unified":
        executor = SleepingExecutor(model, shape_table(config))
        topology = OneExecutor(executor, config.max_num_seqs, depth=depth)
    else:
        pools = []
        for phase in ("prefill", "decode"):

            def start(share: int, phase: str = phase) -> RemoteExecutor:
                prefill, decode = phases_of(config.topology, phase, share)
                shapes = shape_table(config, prefill=prefill, decode=decode)
                return RemoteExecutor(_SleepingWorker(model, shapes), share)

            pools.append(ExecutorPool(phase, start, None, frozenset()))
        topology = TwoPhases(
            (),
            *pools,
            FULL,
            config.max_num_seqs,
            depth=depth,
            controller=None,
            mode_policy=make_mode_policy(config, None),
            control_interval_s=config.semi_pd.control_interval_s,
            step_timeout_s=60.0,
            on_close=lambda: None,
        )
        while not all(lane.executor for lane in topology.lanes):
            topology.tend(Recent)
    coordinator = Coordinator(config, prepared.model, topology, None, ())
    engine = Engine(config, prepared.model, None, topology, coordinator)
    with mock.patch("jpd.face.build", return_value=engine):
        return AsyncLLM(config.model)
