"""The method of timing, on a host and a device that are played."""

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

    def finish(self, out):
        self.now = max(self.now, self.free) + 10


@pytest.mark.parametrize(
    ("run_us", "host_us", "launches"), [(5, 8, 1), (300, 250, 12), (9000, 300, 8), (40, 2, 1)]
)
def test_the_host_does_not_count(monkeypatch, run_us, host_us, launches):
    machine = Machine(monkeypatch, run_us=run_us, host_us=host_us)
    samples = timing.device_us(machine.program, (), launches)
    assert samples == pytest.approx([run_us] * 5, rel=1e-6)
    assert machine.waited == 0


def test_the_clock_after_a_rest_does_not_count(monkeypatch):
    options = {"run_us": 1000, "host_us": 20, "boost_us": 30_000, "slow": 1.2}
    machine = Machine(monkeypatch, **options)
    assert timing.device_us(machine.program, (), 1) == pytest.approx([1200] * 5, rel=1e-6)
    cold = timing.device_us(machine.program, (), 1, warm_us=1000, sample_us=10_000)
    assert max(cold) == pytest.approx(1000)


def test_a_host_that_is_too_slow_is_an_error(monkeypatch):
    machine = Machine(monkeypatch, run_us=5, host_us=60_000)
    with pytest.raises(RuntimeError, match="waited for the host"):
        timing.device_us(machine.program, (), 1)
