"""The signalling GEMM under NVIDIA's compute-sanitizer, on a GPU whose machine has it and lets it.

JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels/test_sanitizer.py

Memcheck alone: racecheck does not see a race that is planted (both warpgroups stage their sums in
the same shared memory), so that it would say nothing.
"""

import os
import shutil
import subprocess
import sys

import pytest

TOOL = shutil.which("compute-sanitizer")
GPU = os.environ["JAX_PLATFORMS"] != "cpu"
pytestmark = [
    pytest.mark.skipif(not GPU, reason="needs a GPU: JAX_PLATFORMS=cuda"),
    pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer (CUDA toolkit) on PATH"),
]
FOUND = 9
"""Exit status where the sanitizer found something."""


def memcheck(*fault: str) -> subprocess.CompletedProcess[str]:
    """Every buffer is an allocation of its own, so that what is beyond one is seen."""
    kernels = ["--kernel-name", "kernel_substring=signal_gemm"]
    ends = ["--target-processes", "all", "--error-exitcode", str(FOUND)]
    program = [sys.executable, "-m", "tests.pallas_kernels.sanitized", *fault]
    done = subprocess.run(
        [TOOL, "--tool", "memcheck", *kernels, *ends, *program],
        env=os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine's device")
    return done


def test_nothing_is_found():
    done = memcheck()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR SUMMARY: 0 errors" in done.stdout


def test_a_planted_fault_is_found():
    done = memcheck("far")
    assert done.returncode == FOUND, done.stdout + done.stderr
    assert "Invalid __global__ atomic" in done.stdout
