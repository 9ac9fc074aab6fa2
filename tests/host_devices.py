"""Tests that need several devices: pytest in a process of its own, with host devices."""

import os
import subprocess
import sys
from pathlib import Path


def run_tests(file: Path, devices: int) -> None:
    """Runs a file of tests with so many host devices; fails if they do."""
    # Nearly all of the time is compilation, of programs that run for microseconds.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    options = ["-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
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
