"""CPU affinity in place of SM shares."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import native
from native import affinity
from native.affinity import CpuShares, visible_cpus

ROOT = Path(native.__file__).parents[1]


class Machine:
    """The CPUs that a process may use, without touching this one's."""

    def __init__(self, cpus):
        self.cpus = set(cpus)

    def sched_getaffinity(self, pid):
        assert pid == 0
        return set(self.cpus)

    def sched_setaffinity(self, pid, cpus):
        assert pid == 0
        assert set(cpus) <= self.cpus
        self.cpus = set(cpus)


def cpus_of(cpus, share, end):
    machine = Machine(cpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affinity.os, "sched_getaffinity", machine.sched_getaffinity)
        patch.setattr(affinity.os, "sched_setaffinity", machine.sched_setaffinity)
        assert affinity.apply(share, end) == len(machine.cpus)
    return machine.cpus


machines = st.sets(st.integers(0, 500), min_size=1, max_size=200)
shares = st.integers(1, 100)


@given(machines, shares, st.sampled_from(["low", "high"]))
def test_a_share_is_that_part_of_the_cpus(cpus, share, end):
    got = cpus_of(cpus, share, end)
    assert got
    assert abs(len(got) - share / 100 * len(cpus)) <= (1 if len(got) in (1, len(cpus) - 1) else 0.5)
    ordered = sorted(cpus, reverse=end == "high")
    assert got == set(ordered[: len(got)])
    if share == 100:
        assert got == cpus


@given(machines, st.data())
def test_shares_of_two_ends_do_not_overlap(cpus, data):
    low = data.draw(st.integers(1, 99))
    high = data.draw(st.integers(1, 100 - low))
    overlap = cpus_of(cpus, low, "low") & cpus_of(cpus, high, "high")
    assert not overlap or len(cpus) == 1


@given(machines, st.data())
def test_shares_that_sum_to_100_leave_no_cpu_out(cpus, data):
    low = data.draw(st.integers(1, 99))
    assert cpus_of(cpus, low, "low") | cpus_of(cpus, 100 - low, "high") == cpus


def test_examples():
    assert cpus_of({0, 1, 2, 3}, 50, "low") == {0, 1}
    assert cpus_of({0, 1, 2, 3}, 50, "high") == {2, 3}
    assert cpus_of({4, 9, 11}, 50, "low") == {4, 9}
    assert cpus_of({4, 9, 11}, 50, "high") == {11}
    assert cpus_of({0, 1}, 90, "low") == {0}
    assert cpus_of({7}, 10, "high") == {7}


@pytest.mark.parametrize("share", [0, 101, 50.0])
def test_a_share_out_of_range(share):
    before = os.sched_getaffinity(0)
    with pytest.raises(ValueError, match="from 1 to 100"):
        affinity.apply(share)
    with pytest.raises(ValueError, match="from 1 to 100"):
        CpuShares("low").environment(share)
    assert os.sched_getaffinity(0) == before


def test_an_end_that_is_none():
    with pytest.raises(ValueError, match="'low' or 'high', not 'middle'"):
        affinity.apply(50, "middle")


@pytest.mark.parametrize("text", ["50", "50 middle", "x low", "", "0 low"])
def test_a_variable_that_holds_no_share(monkeypatch, text):
    monkeypatch.setenv(affinity.SHARE_VARIABLE, text)
    with pytest.raises(ValueError, match="percent"):
        affinity.apply_environment()


def test_a_process_takes_the_share_that_it_was_given():
    code = "import os; from native import affinity; before = affinity.visible_cpus(); "
    code += "print(before, affinity.apply_environment(), sorted(os.sched_getaffinity(0)))"

    def start(extra):
        environment = {**os.environ, **extra}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    cpus = sorted(os.sched_getaffinity(0))
    assert len(cpus) == visible_cpus()
    assert start({}) == f"{len(cpus)} {len(cpus)} {cpus}"
    if len(cpus) > 1:
        assert start(CpuShares("low").environment(1)) == f"{len(cpus)} 1 {cpus[:1]}"
        assert start(CpuShares("high").environment(1)) == f"{len(cpus)} 1 {cpus[-1:]}"


def test_nothing_is_done_before_a_kill():
    CpuShares("low").terminate_client(1)
