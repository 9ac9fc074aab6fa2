"""Who is blamed for lost executors: a request that ends them all, nobody for a fault of the GPU.

Coordinator, lanes, pools and messages are the real ones. The processes are not: time passes when
the coordinator waits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from jpd.config import EngineConfig
from jpd.engine.coordinator import Coordinator
from jpd.engine.lane import ExecutorLostError, Lane
from jpd.engine.plan import StepPlan, StepResult
from jpd.semi_pd import remote
from jpd.semi_pd.controller import FULL
from jpd.semi_pd.messages import Failure, Ready, StepReport
from jpd.semi_pd.pool import ExecutorPool
from jpd.semi_pd.remote import RemoteExecutor
from jpd.semi_pd.topology import TwoPhases
from jpd.types import FinishReason, RequestOutput, SamplingParams

KEPT = [(), (100,), (100, 70), (100, 70, 50), (100, 70, 50, 30)]
WAIT_S, START_S = 0.01, 0.1


class Gpu:
    """What may go wrong; stands in for the `SharedModel` that all processes map."""

    is_lost = False
    connection = None

    def __init__(self) -> None:
        self.now_s = 0.0
        self.is_broken = False
        """What is started or launched on the memory fails."""
        self.ends_executors: Callable[[StepPlan], bool] = lambda plan: False
        self.failing_s = 0.0
        """How long a step takes that fails."""
        self.refused = 0
        """So many of the next prompts find that the process is gone."""
        self.blamed: list[bool] = []

    def clock(self) -> float:
        return self.now_s

    def renew(self) -> None:
        self.is_broken = False


class Process:
    """Stands in for `jpd.child.Child` and its connection."""

    pid = 0

    def __init__(self, gpu: Gpu) -> None:
        self.connection = self.process = self
        self._gpu = gpu
        self._failed = gpu.is_broken
        first = Failure("at its start", False) if self._failed else Ready(1)
        self._inbox: deque[tuple[float, Failure | Ready | StepReport]] = deque()
        self._inbox.append((gpu.now_s + START_S, first))

    def send(self, plan: StepPlan | list) -> None:
        if isinstance(plan, list) or self._failed:
            return
        if self._gpu.refused and plan.chunks:
            self._gpu.refused -= 1
            raise BrokenPipeError
        now_s, self._failed = self._gpu.now_s, self._gpu.ends_executors(plan) or self._gpu.is_broken
        result = StepResult(np.zeros(len(plan.rows) + len(plan.chunks), np.int32), None)
        report = StepReport(result, 0, None, now_s, now_s)
        if self._failed:
            self._inbox.append((now_s + self._gpu.failing_s, Failure("in a step", False)))
        else:
            self._inbox.append((now_s, report))

    def poll(self) -> bool:
        return bool(self._inbox) and self._inbox[0][0] <= self._gpu.now_s

    def recv(self) -> Failure | Ready | StepReport:
        return self._inbox.popleft()[1]

    def kill(self) -> None:
        """Nothing is left."""

    close = kill


class Topology(TwoPhases):
    """Waits in virtual time, and notes which losses were blamed on the step."""

    def lost(self, lane: Lane, error: ExecutorLostError) -> bool:
        self._models[0].blamed.append(super().lost(lane, error))
        return self._models[0].blamed[-1]

    def wait(self, patience_s: float = math.inf) -> Lane | None:
        self._models[0].now_s += WAIT_S
        working = [lane for lane in self.lanes if lane.in_flight]
        return next((lane for lane in working if lane.executor.connection.poll()), None)


made: list[Coordinator] = []


@pytest.fixture(autouse=True)
def _close(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "_limit_sends", lambda connection, timeout_s: None)  # no socket
    yield
    while made:
        made.pop().close()


def make(kept: tuple[int, ...]) -> tuple[Coordinator, Gpu]:
    """A coordinator with executors of these shares kept ready in both phases."""
    gpu = Gpu()
    config = EngineConfig(
        model="none",
        topology="semi_pd",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        page_size=4,
        num_pages=200,
    )
    pools = [
        ExecutorPool(
            phase,
            lambda share: RemoteExecutor(Process(gpu), share),
            None,
            frozenset(kept),
            clock=gpu.clock,
        )
        for phase in ("prefill", "decode")
    ]
    topology = Topology(
        (gpu,),
        *pools,
        FULL,
        config.max_num_seqs,
        depth=2,
        controller=None,
        control_interval_s=1.0,
        step_timeout_s=60.0,
        on_close=lambda: None,
        clock=gpu.clock,
    )
    model = SimpleNamespace(vocab_size=100)
    coordinator = Coordinator(config, model, topology, None, (), clock=gpu.clock)
    made.append(coordinator)
    while not all(pool.num_ready == len({*kept, 100}) for pool in pools):
        coordinator.rest()
        gpu.now_s += WAIT_S
    return coordinator, gpu


def add(coordinator: Coordinator, name: str) -> RequestOutput:
    params = SamplingParams(temperature=0, max_tokens=30)
    return coordinator.add(name, None, [1, 2, 3], params)


def run_until_all(coordinator: Coordinator, outputs: list[RequestOutput], tokens: int) -> None:
    """Each request has so many tokens, or has ended."""
    for _ in range(20_000):
        if all(o.finished or len(o.outputs[0].token_ids) >= tokens for o in outputs):
            return
        coordinator.step()
        coordinator.scheduler.check_integrity()
    raise AssertionError("the engine hangs")


def check_ended(coordinator: Coordinator, outputs: dict[str, RequestOutput], failed: set) -> None:
    """These requests have failed, and all others have all of their tokens."""
    run_until_all(coordinator, [*outputs.values()], 1_000)
    for name, output in outputs.items():
        (completion,) = output.outputs
        if name in failed:
            assert completion.finish_reason is FinishReason.ERROR, name
        else:
            assert completion.finish_reason is FinishReason.LENGTH, name
            assert len(completion.token_ids) == 30
    assert coordinator.stats().requests_failed == len(failed)
    pool = coordinator.scheduler.pool
    assert pool.num_free == pool.num_usable, "a page leaked"


@pytest.mark.parametrize("kept", KEPT)
def test_a_fault_of_the_gpu_ends_no_request(kept: tuple[int, ...]) -> None:
    """Executors that are kept ready look alive until they are given a step."""
    coordinator, gpu = make(kept)
    outputs = {str(i): add(coordinator, str(i)) for i in range(7)}
    for tokens in (5, 10, 15):
        run_until_all(coordinator, [*outputs.values()], tokens)
        gpu.is_broken = True
        outputs[f"after {tokens}"] = add(coordinator, f"after {tokens}")
    check_ended(coordinator, outputs, set())
    assert coordinator.stats().pages_lost == 3


@pytest.mark.parametrize("failing_s", [0.0, 5.0])
@pytest.mark.parametrize("others", [0, 7])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kept", KEPT)
def test_a_request_that_ends_every_executor_is_given_up(
    kept: tuple[int, ...], phase: str, others: int, failing_s: float
) -> None:
    """Also where it takes so long that others have been started meanwhile."""
    coordinator, gpu = make(kept)
    gpu.failing_s = failing_s
    gpu.ends_executors = lambda plan: holds(coordinator, plan, phase, "bad")
    outputs = {name: add(coordinator, name) for name in ["bad", *map(str, range(others))]}
    check_ended(coordinator, outputs, {"bad"})
    assert coordinator.stats().pages_lost == 0


def test_a_loss_is_blamed_on_the_step_of_who_has_shown_that_the_memory_is_sound() -> None:
    coordinator, gpu = make((100, 70, 50))
    output = add(coordinator, "a")
    for tokens, losses in ((2, 2), (4, 1)):
        run_until_all(coordinator, [output], tokens)
        left = [True] * losses
        gpu.ends_executors = lambda plan, left=left: bool(left) and left.pop()
    check_ended(coordinator, {"a": output}, set())
    # The first had run steps, the second none since then, the third had when it was lost.
    assert gpu.blamed == [True, False, True]


def test_a_step_that_could_not_be_sent_is_not_to_blame() -> None:
    coordinator, gpu = make(())
    gpu.refused = 3
    outputs = {name: add(coordinator, name) for name in ("a", "b")}
    check_ended(coordinator, outputs, set())
    assert gpu.refused == 0


@pytest.mark.parametrize("names", [["bad"], ["bad", "a", "b"], ["a", "bad", "b"]])
@pytest.mark.parametrize("kept", KEPT)
def test_a_prompt_that_breaks_the_gpu_itself_is_given_up(
    kept: tuple[int, ...], names: list[str]
) -> None:
    coordinator, gpu = make(kept)

    def breaks(plan: StepPlan) -> bool:
        gpu.is_broken |= holds(coordinator, plan, "prefill", "bad")
        return gpu.is_broken

    gpu.ends_executors = breaks
    outputs = {name: add(coordinator, name) for name in names}
    check_ended(coordinator, outputs, {"bad"})


def holds(coordinator: Coordinator, plan: StepPlan, phase: str, name: str) -> bool:
    """A step computes the prompt of a request, or decodes it."""
    rows = [c.row for c in plan.chunks] if phase == "prefill" else plan.rows.tolist()
    sequences = coordinator.scheduler.table.sequences
    return any(sequences[row].request_id == name for row in rows)
