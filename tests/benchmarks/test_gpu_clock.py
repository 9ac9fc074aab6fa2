"""Clocks and power, of a script that stands in for nvidia-smi."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu_clock import GpuClock, parse

UNKNOWN = {"sm_mhz": None, "watts": None}


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a script in its place; gives a function that says what it was called with."""

    def put(script: str) -> Path:
        called = tmp_path / "called"
        path = tmp_path / "nvidia-smi"
        path.write_text(f'#!/bin/sh\necho "$@" > {called}\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return called

    return put


def wait_for(clock: GpuClock, samples: int) -> None:
    end_s = time.monotonic() + 20
    while len(clock._samples) < samples and time.monotonic() < end_s:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("1850, 611.25\n", (1850.0, 611.25)),
        ("[N/A], 611.25", (None, 611.25)),
        ("1980, [Not Supported]", (1980.0, None)),
        ("[N/A], [N/A]", (None, None)),
        ("No devices were found", None),
        ("", None),
    ],
)
def test_lines(line: str, found: tuple[float | None, float | None] | None) -> None:
    assert parse(line) == found


def test_means_of_a_time(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    called = nvidia_smi('echo "1800, 600"; echo "1900, [N/A]"; echo "[N/A], 640"; exec sleep 60')
    with GpuClock(period_s=0.25) as clock:
        wait_for(clock, 3)
        assert clock.running
        now_s = time.monotonic()
        assert clock.means(now_s - 30, now_s) == {"sm_mhz": 1850.0, "watts": 620.0}
        assert clock.means(now_s, now_s + 1) == UNKNOWN
    assert not clock.running  # and nothing is left behind
    assert called.read_text().split() == [
        "--id=3",
        "--query-gpu=clocks.sm,power.draw",
        "--format=csv,noheader,nounits",
        "--loop-ms=250",
    ]


def test_what_nvidia_smi_does_not_know(nvidia_smi) -> None:
    nvidia_smi('echo "1800, [N/A]"; echo "1900, [N/A]"; exec sleep 60')
    with GpuClock() as clock:
        wait_for(clock, 2)
        assert clock.means(0, time.monotonic()) == {"sm_mhz": 1850.0, "watts": None}


def test_one_that_fails(nvidia_smi) -> None:
    nvidia_smi('echo "NVIDIA-SMI has failed"; exit 9')
    with GpuClock() as clock:
        clock._process.wait()
        assert not clock.running
    assert clock.means(0, time.monotonic()) == UNKNOWN


def test_a_machine_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with GpuClock() as clock:
        assert not clock.running
    assert clock.means(0, time.monotonic()) == UNKNOWN
