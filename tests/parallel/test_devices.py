"""Runs the tests that need several devices, in a process with 4 host devices."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_four_host_devices():
    # Nearly all of the time is compilation, of programs that run for microseconds.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    tests = Path(__file__).with_name("four_devices.py")
    options = ["-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests)],
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
