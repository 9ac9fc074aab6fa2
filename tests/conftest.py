"""What all tests share: they run on the CPU unless JAX_PLATFORMS says otherwise."""

import os
import signal

from hypothesis import settings

# Before any test module imports jax, which reads it once. `make test-gpu` sets it otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Threads of XLA's CPU pool. Interpret mode runs every warpgroup of a kernel in it at the same time;
# where one waits for another that gets no thread (few cores), it waits forever.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))

# Wall-clock limits on single examples fail on a busy machine and say nothing about jpd.
settings.register_profile("jpd", deadline=None)
settings.load_profile("jpd")

# A shell starts background jobs with interrupts ignored, and some tests are about interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
