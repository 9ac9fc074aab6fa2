"""What all tests share: they run on the CPU unless JAX_PLATFORMS says otherwise."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# Before any test module imports jax, which reads it once. `make test-gpu` sets it otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# NVLink SHARP's multicast stays off on several GPUs, as in the benchmarks: not every machine allows
# it. NCCL reads this when the first communicator is made.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

# Threads of XLA's CPU pool. Interpret mode runs every warpgroup of a kernel in it at the same time;
# where one waits for another that gets no thread (few cores), it waits forever.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))

# The same examples in every run; and limits on how long making or running one may take fail on a
# busy machine and say nothing about jpd.
settings.register_profile(
    "jpd",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("jpd")

# A shell starts background jobs with interrupts ignored, and some tests are about interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    # jax writes entries of its compilation cache in place. Another process, or one after a kill,
    # may find half of one: then jax warns, and compiles.
    message = "Error reading persistent compilation cache entry"
    config.addinivalue_line("filterwarnings", f"default:{message}:UserWarning")
