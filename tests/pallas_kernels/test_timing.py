"""The method of timing, on a host and a device that are played."""

import numpy as np
import pytest

from pallas_kernels import timing


class Machine:
    """A host that enqueues and a device that works; microseconds.

    After `boost_us` of work without a pause a run takes `slow` times as long.
    """

    def __init__(self, monkeypatch, *, run_us, host_us, boost_us=1e9, slow=1.0):
        self.run_us, self.host_us, self.boost_us, self.slow = run_us, host_us, boost_us, slow
        self.now = self.free = self.since = 0.0
        self.waited = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now / 1e6)
        monkeypatch.setattr(timing.jax, "block_until_ready", self.finish)
        monkeypatch.setattr(timing, "spinner", self.spinner)
        monkeypatch.setattr(timing, "stamper", lambda: self.stamp)

    def spinner(self, us):
        def hold():
            self.now += self.host_us
            self.free = self.since = max(self.now, self.free) + us

        return hold

    def program(self):
        self.now += self.host_us
        self.waited += max(0.0, self.now - self.free)
        start = max(self.now, self.free)
        slow = self.slow if start - self.since >= self.boost_us else 1.0
        self.free = start + self.run_us * slow

    def stamp(self):
        """The device's clock in nanoseconds, which is about to wrap around."""
        self.now += self.host_us
        self.free = max(self.now, self.free)
        return (np.array([self.free * 1e3]) + 2**32 - 10**7).astype(np.uint32).astype(np.int32)

    def finish(self, out):
        self.now = max(self.now, self.free) + 10


@pytest.mark.parametrize(
    ("run_us", "host_us", "launches"), [(5, 8, 1), (300, 250, 12), (9000, 300, 8), (40, 2, 1)]
)
def test_the_host_does_not_count(monkeypatch, run_us, host_us, launches):
    machine = Machine(monkeypatch, run_us=run_us, host_us=host_us)
    samples = timing.device_us(machine.program, (), launches)
    assert samples == pytest.approx([run_us] * 5, rel=1e-4)
    assert machine.waited == 0


def test_a_host_that_pauses_after_enqueueing_does_not_count(monkeypatch):
    machine = Machine(monkeypatch, run_us=300, host_us=20)
    finish = machine.finish

    def late(out):
        finish(out)
        machine.now += 50_000

    monkeypatch.setattr(timing.jax, "block_until_ready", late)
    samples = timing.device_us(machine.program, (), 12)
    assert samples == pytest.approx([300] * 5, rel=1e-4)


def test_the_slowest_of_several_devices_counts(monkeypatch):
    machine = Machine(monkeypatch, run_us=300, host_us=20)

    def stamp():
        (now,) = machine.stamp()
        return np.array([now, 3 * machine.free * 1e3]).astype(np.int64).astype(np.int32)

    samples = timing.device_us(machine.program, (), 12, hold=machine.spinner, stamp=stamp)
    assert samples == pytest.approx([900] * 5, rel=1e-4)


def test_a_longer_hold_helps_a_slow_host(monkeypatch):
    machine = Machine(monkeypatch, run_us=5, host_us=3_000)
    samples = timing.device_us(machine.program, (), 20)
    assert samples == pytest.approx([5] * 5, rel=1e-3)


def test_the_clock_after_a_rest_does_not_count(monkeypatch):
    options = {"run_us": 1000, "host_us": 20, "boost_us": 30_000, "slow": 1.2}
    machine = Machine(monkeypatch, **options)
    assert timing.device_us(machine.program, (), 1) == pytest.approx([1200] * 5, rel=1e-4)
    cold = timing.device_us(machine.program, (), 1, warm_us=1000, sample_us=10_000)
    assert max(cold) == pytest.approx(1000, rel=1e-4)


def test_a_host_that_is_too_slow_is_an_error(monkeypatch):
    machine = Machine(monkeypatch, run_us=5, host_us=60_000)
    with pytest.raises(RuntimeError, match="waited for the host"):
        timing.device_us(machine.program, (), 1)
