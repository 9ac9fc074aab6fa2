"""Executors of one phase: starts that take too long, and ends, on executors without a process."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from jpd.semi_pd.pool import MAX_FAILURES, ExecutorPool
from tests.processes import PATIENCE_S, wait_until


class FakeExecutor:
    """Becomes ready when it is told to."""

    busy_s = copied_bytes = overlapped_bytes = copy_wait_s = recompiles = 0
    connection = failure = None

    def __init__(self, world: World, share: int) -> None:
        self.share, self.pid = share, 1000 + len(world.executors)
        self.ready: FakeExecutor | None = None
        self.units = self.num_steps = 0
        self._world = world
        world.executors.append(self)

    def poll(self) -> None:
        """Nothing comes."""

    def hang_up(self) -> None:
        self._world.log.append(("hang_up", self.pid))

    def ends_within(self, timeout_s: float) -> bool:
        assert timeout_s > 1
        return self._world.ends

    def kill(self, *, wait: bool) -> None:
        self._world.log.append(("kill", self.pid))


class World:
    """Makes pools, tells the time, and writes down what happens to executors."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.executors: list[FakeExecutor] = []
        self.log: list[tuple[str, int]] = []
        self.shares: FakeShares | None = None
        self.ends = False
        """Executors that are let end do so."""

    def pool(self, kept: frozenset[int] = frozenset(), timeout_s: float = 10.0) -> ExecutorPool:
        def start(share: int) -> FakeExecutor:
            return FakeExecutor(self, share)

        return ExecutorPool("decode", start, self.shares, kept, timeout_s, clock=lambda: self.now_s)


class FakeShares:
    """An MPS daemon that takes its time, until `answers` is set, and may fail then."""

    def __init__(self, world: World) -> None:
        self.answers = threading.Event()
        self.fails = False
        self._world = world

    def environment(self, share: int) -> dict[str, str]:
        return {}

    def terminate_client(self, pid: int) -> None:
        assert self.answers.wait(PATIENCE_S)
        self._world.log.append(("terminate_client", pid))
        if self.fails:
            raise RuntimeError("the daemon is gone")


@pytest.fixture
def world() -> World:
    return World()


def test_a_start_that_takes_too_long_is_a_failed_one(world: World) -> None:
    pool = world.pool()
    assert pool.next_due_s == math.inf
    pool.get(40)
    assert pool.next_due_s == 110.0
    world.now_s = 109.9
    pool.tend(None, 40)
    assert (pool.num_starting, pool.num_lost) == (1, 0)
    world.now_s = 110.0
    pool.tend(None, 40)
    assert (pool.num_starting, pool.num_lost, pool.num_failures(40)) == (0, 1, 1)
    assert pool.last_failure == "its process 1000 was not ready after 10 s"
    assert world.log == [("kill", 1000)]
    # The next is started at once, and has as much time.
    assert pool.next_due_s == 110.0
    pool.get(40)
    assert pool.next_due_s == 120.0


def test_starts_that_all_hang_are_given_up(world: World) -> None:
    pool = world.pool()
    for _ in range(2 * MAX_FAILURES):
        pool.tend(None, 40)
        pool.get(40)
        world.now_s = max(world.now_s, min(pool.next_due_s, 1e6))
    assert pool.given_up(40)
    assert len(world.executors) == pool.num_lost == MAX_FAILURES


def test_one_that_is_ready_at_last_stays(world: World) -> None:
    """Nobody looks while an engine without a thread of its own is idle."""
    pool = world.pool(kept=frozenset({40}))
    pool.get(40)
    world.executors[0].ready = world.executors[0]
    world.now_s = 1000.0
    pool.tend(None, 40)
    assert (pool.num_ready, pool.num_lost, pool.next_due_s) == (1, 0, math.inf)


def test_only_what_is_late_ends(world: World) -> None:
    pool = world.pool(kept=frozenset({30}))
    pool.get(30)
    world.now_s = 105.0
    pool.get(40)
    world.now_s = 112.0
    pool.tend(None, 40)
    assert [pid for _, pid in world.log] == [1000]
    assert pool.num_starting == 2, "the kept one is started again"
    assert pool.next_due_s == 115.0


def drop_while_it_starts(world: World, pool: ExecutorPool) -> None:
    """The controller wants another share."""
    pool.get(40)
    pool.tend(None, 30)


def start_too_slowly(world: World, pool: ExecutorPool) -> None:
    pool.get(40)
    world.now_s += 10.0
    pool.tend(None, 40)


def fail_to_start(world: World, pool: ExecutorPool) -> None:
    pool.get(40)
    world.executors[0].failure = "it has no kernel"
    pool.tend(None, 40)


def make_ready(world: World, pool: ExecutorPool) -> None:
    pool.get(40)
    world.executors[0].ready = world.executors[0]
    pool.tend(None, 40)
    assert pool.num_ready == 1


def drop_when_it_is_ready(world: World, pool: ExecutorPool) -> None:
    make_ready(world, pool)
    pool.tend(None, 30)


def fail_when_it_is_ready(world: World, pool: ExecutorPool) -> None:
    make_ready(world, pool)
    world.executors[0].failure = "it ended"
    pool.tend(None, 40)


@pytest.mark.parametrize("fails", [False, True], ids=["", "daemon_gone"])
@pytest.mark.parametrize(
    "end",
    [
        drop_while_it_starts,
        start_too_slowly,
        fail_to_start,
        drop_when_it_is_ready,
        fail_when_it_is_ready,
    ],
)
def test_mps_ends_its_client_before_the_kill_and_nobody_waits(
    world: World, end: Callable[[World, ExecutorPool], None], fails: bool
) -> None:
    world.shares = FakeShares(world)
    world.shares.fails = fails
    pool = world.pool()
    end(world, pool)
    assert (pool.num_ready, pool.num_starting) == (0, 0)
    asked = [("hang_up", 1000)] if end is drop_when_it_is_ready else []  # it does not end
    assert world.log == asked
    world.shares.answers.set()
    ended = [("terminate_client", 1000), ("kill", 1000)]
    wait_until(lambda: world.log == [*asked, *ended], "it was not ended")


def test_nobody_runs_when_a_pool_is_closed(world: World) -> None:
    world.shares = FakeShares(world)
    pool = world.pool()
    drop_while_it_starts(world, pool)
    timer = threading.Timer(0.2, world.shares.answers.set)
    timer.start()
    pool.close()
    ended = [("terminate_client", 1000), ("kill", 1000)]
    assert world.log == ended
    pool.get(30)
    pool.close()
    assert world.log == [*ended, ("terminate_client", 1001), ("kill", 1001)]


def test_a_sound_one_ends_by_itself_and_mps_is_left_alone(world: World) -> None:
    world.shares, world.ends = FakeShares(world), True
    pool = world.pool()
    drop_when_it_is_ready(world, pool)
    wait_until(lambda: len(world.log) == 2, "it was not ended")
    assert world.log == [("hang_up", 1000), ("kill", 1000)]


def test_all_of_a_pool_that_is_closed_end_at_the_same_time(world: World) -> None:
    world.shares, world.ends = FakeShares(world), True
    world.shares.answers.set()
    pool = world.pool(kept=frozenset({30, 40, 50}))
    pool.tend(None, 40)
    for executor in world.executors:
        executor.ready = executor
    pool.tend(None, 40)
    world.executors[1].failure = "nobody has seen it yet"
    pool.get(60)
    pool.close()
    sound = [("hang_up", 1000), ("hang_up", 1002)]
    assert [entry for entry in world.log if entry in sound] == world.log[:2] == sound
    stopped = [("terminate_client", 1001), ("kill", 1001)]
    started = [("terminate_client", 1003), ("kill", 1003)]
    assert world.log[2:] == [("kill", 1000), *stopped, ("kill", 1002), *started]
    assert (pool.num_ready, pool.num_starting) == (0, 0)


CLOSED_AT_EXIT = """
import atexit, threading
from tests.semi_pd.test_pool import FakeShares, World

world = World()
world.shares, world.ends = FakeShares(world), True
pool = world.pool()
pool.get(40)
world.executors[0].ready = world.executors[0]
pool.tend(None, 40)
atexit.register(lambda: print(world.log))
atexit.register(pool.close)
"""


def test_a_pool_is_closed_when_the_interpreter_exits() -> None:
    """As by an engine that nobody closed; no thread can be started then."""
    command = [sys.executable, "-c", CLOSED_AT_EXIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "[('hang_up', 1000), ('kill', 1000)]\n", done.stderr


def test_who_was_in_a_step_is_gone_when_it_is_removed(world: World) -> None:
    world.shares = FakeShares(world)
    world.shares.answers.set()
    pool = world.pool()
    make_ready(world, pool)
    pool.remove(world.executors[0], "it hangs", running=True)
    assert world.log == [("terminate_client", 1000), ("kill", 1000)]


def test_without_shares_it_is_killed_at_once(world: World) -> None:
    drop_while_it_starts(world, world.pool())
    assert world.log == [("kill", 1000)]
