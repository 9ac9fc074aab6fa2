"""The coordinator's side of an executor whose process takes nothing, or is to end."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from jpd.child import Child, spawn
from jpd.engine.lane import ExecutorLostError
from jpd.engine.plan import Admission, StepPlan
from jpd.semi_pd import remote
from jpd.semi_pd.messages import Ready
from jpd.semi_pd.remote import RemoteExecutor
from jpd.types import SamplingParams
from tests.processes import PATIENCE_S, stop, wait_until


def large_plan() -> StepPlan:
    """Larger than what the kernel holds of a connection: 256 rows of 8192 tokens."""
    rows = np.zeros(256, np.int32)
    plan = StepPlan(
        rows=rows,
        serials=np.zeros(256, np.int64),
        sequences=[],
        tokens=rows,
        positions=rows,
        page_table=np.zeros((256, 512), np.int32),
        chunks=[],
        chunk_page_table=np.zeros((0, 512), np.int32),
        admitted=[],
        context_tokens=8192,
        plain_greedy=True,
        decodes_on=False,
    )
    assert len(pickle.dumps(plan.without_sequences())) > 300_000
    return plan


@pytest.fixture
def child() -> Iterator[Child]:
    """Takes everything, and answers nothing that it does not know."""
    child = spawn("tests.semi_pd.echo_child")
    # Who waited without limit would wait for this.
    timer = threading.Timer(PATIENCE_S, child.process.kill)
    timer.start()
    yield child
    timer.cancel()
    child.kill()


def executor_on(child: Child) -> RemoteExecutor:
    """One that can run steps."""
    executor = RemoteExecutor(child, 50)
    child.connection.send(("say", Ready(1)))
    wait_until(lambda: executor.poll() or executor.ready, "it is not ready")
    return executor


@pytest.fixture
def stopped(child: Child, monkeypatch: pytest.MonkeyPatch) -> RemoteExecutor:
    """One that could run steps until its process was stopped."""
    monkeypatch.setattr(remote, "SEND_TIMEOUT_S", 0.25)
    executor = executor_on(child)
    stop(executor.pid)
    return executor


def test_a_plan_that_a_stopped_process_does_not_take_is_a_lost_executor(
    stopped: RemoteExecutor,
) -> None:
    reason = f"its process {stopped.pid} took nothing for 0.25 s"
    with pytest.raises(ExecutorLostError, match=f"on 50 % of the SMs: {reason}"):
        stopped.launch(large_plan())
    assert stopped.failure == reason
    # The next would be taken for the rest of that one.
    os.kill(stopped.pid, signal.SIGCONT)
    with pytest.raises(ExecutorLostError, match=reason):
        stopped.launch(large_plan())


def test_rows_that_a_stopped_process_does_not_take(stopped: RemoteExecutor) -> None:
    tokens = np.zeros(100_000, np.int32)
    stopped.admit([Admission(0, 1, SamplingParams(), None, 0, tokens)])
    assert stopped.failure == f"its process {stopped.pid} took nothing for 0.25 s"


def test_a_process_that_takes_it_late_is_not_lost(child: Child) -> None:
    executor = executor_on(child)
    stop(child.process.pid)
    timer = threading.Timer(0.2, os.kill, (child.process.pid, signal.SIGCONT))
    timer.start()
    executor.launch(large_plan())
    timer.join()
    executor.launch(large_plan())
    child.connection.send(("variable", "NOT_SET"))
    assert child.connection.recv() is None
    assert executor.failure is None


def test_a_plan_to_a_process_that_has_ended(child: Child) -> None:
    executor = executor_on(child)
    child.process.kill()
    child.process.wait()
    with pytest.raises(ExecutorLostError, match=rf"its process {executor.pid} ended, exit code -9"):
        executor.launch(large_plan())


def test_it_ends_by_itself_when_it_has_done_what_it_was_sent(child: Child) -> None:
    executor = executor_on(child)
    for _ in range(3):
        child.connection.send(("say", "a report that nobody reads"))
    executor.hang_up()
    assert executor.ends_within(PATIENCE_S)
    assert child.wait() == 0
    assert all(child.connection.recv() == "a report that nobody reads" for _ in range(3))
    executor.hang_up()
    assert executor.ends_within(-1.0), "it is gone"
    executor.kill(wait=True)
    executor.hang_up()


def test_one_that_does_not_end_is_left_to_others(stopped: RemoteExecutor) -> None:
    stopped.hang_up()
    assert not stopped.ends_within(0.1)
    with pytest.raises(ExecutorLostError, match="takes no more steps"):
        stopped.launch(large_plan())
    stopped.kill(wait=True)
