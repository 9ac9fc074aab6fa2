"""Runs the tests that need several devices, in a process with 4 host devices."""

from pathlib import Path

from tests.host_devices import run_tests


def test_on_four_host_devices():
    run_tests(Path(__file__).with_name("four_devices.py"), 4)
