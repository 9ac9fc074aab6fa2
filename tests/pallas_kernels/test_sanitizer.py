"""The signalling GEMM under NVIDIA's compute-sanitizer, on a GPU whose machine has it and lets it.

JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels/test_sanitizer.py
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


def sanitized(tool: str, *fault: str) -> subprocess.CompletedProcess[str]:
    """Every buffer is an allocation of its own, so that what is beyond one is seen."""
    command = [TOOL, "--tool", tool, "--kernel-regex", "kernel_substring=signal_gemm"]
    program = [sys.executable, "-m", "tests.pallas_kernels.sanitized", *fault]
    options = ["--target-processes", "all", "--error-exitcode", str(FOUND)]
    return subprocess.run(
        [*command, *options, *program],
        env=os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_nothing_is_found(tool):
    done = sanitized(tool)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine's device")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("tool", "fault"), [("memcheck", "counter"), ("racecheck", "slot")])
def test_a_planted_fault_is_found(tool, fault):
    done = sanitized(tool, fault)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine's device")
    assert done.returncode == FOUND, done.stdout + done.stderr
    assert "signal_gemm" in done.stdout
