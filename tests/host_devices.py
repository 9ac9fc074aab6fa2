"""What needs several devices: a process of its own, with devices of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_module(name: str, *options: str, devices: int) -> subprocess.CompletedProcess[str]:
    """`python -m name options` with so many devices of the CPU, at the repository's root."""
    # Nearly all of the time is compilation, of programs that run for microseconds.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    # Devices that wait for each other end the process after 40 s, which a busy machine may take.
    for what in ("call_terminate_timeout", "timeout"):
        flags += f" --xla_cpu_collective_{what}_seconds=1200"
    return subprocess.run(
        [sys.executable, "-m", name, *options],
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "JAX_PLATFORMS": "cpu",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def run_tests(file: Path, devices: int) -> None:
    """Runs a file of tests with so many host devices; fails if they do."""
    options = ["-q", "-p", "no:cacheprovider", str(file)]
    result = run_module("pytest", *options, devices=devices)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
