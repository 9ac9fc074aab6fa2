"""Collectives of two processes that share the same GPUs by MPS: why neither can block the other.

The blocks of a collective stay on their SMs until those of its other ranks have come. So two
processes could each hold what the other's collective waits for, one the SMs of the first GPU and
one those of the second. What rules that out:

* Two executors at most run steps at the same time, one of each phase; a third may be starting, and
  try its communicators. Each has one collective at a time on a GPU, in the order of its program,
  which is the same on all of them.
* A collective of XLA's takes at most `MOST_SMS` SMs, one that overlaps with a GEMM those that its
  plan leaves it, and no executor has fewer than `MOST_SMS`. All of them together fit on a GPU, so
  that each finds room as soon as other kernels make it.
* Other kernels end by themselves once they have SMs. Those of `pallas_kernels` meet by tickets:
  who comes last does what is left, nobody waits. One that starts early waits for the kernel before
  it, all of whose blocks have their SMs by then.

Where processes share GPUs without MPS they take turns, and a kernel that waits is interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from jpd.config import require
from jpd.errors import ConfigError

MOST_SMS = 16
"""Channels of NCCL, an SM each."""
_NCCL_VARIABLES = ("NCCL_MAX_CTAS", "NCCL_MIN_CTAS", "NCCL_MIN_NCHANNELS")
"""By which a user may ask NCCL for more, whatever XLA says."""


def environment(devices: Sequence[str]) -> dict[str, str]:
    """Variables for an executor that has a share of the SMs of each of its devices.

    Args:
      devices: of the ranks, "cpu" or "cuda:N".

    Raises:
      ConfigError: a variable asks NCCL for more SMs.
    """
    if len(devices) == 1 or devices[0] == "cpu":
        return {}
    for name in _NCCL_VARIABLES:
        value = os.environ.get(name, "0")
        fits = value.isdecimal() and int(value) <= MOST_SMS
        require(fits, name, value, f"at most {MOST_SMS} where two phases share several GPUs")
    limit = f"--xla_gpu_nccl_collective_max_nchannels={MOST_SMS}"
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {limit}".strip()}


def check_sms(devices: Sequence[str], sms: int) -> None:
    """Raises `ConfigError` if an executor has too few SMs of each device for a collective."""
    if len(devices) > 1 and sms < MOST_SMS:
        raise ConfigError(
            f"a share of {sms} SMs is not allowed with tensor_parallel_size={len(devices)}: at "
            f"least {MOST_SMS}, which a collective takes"
        )
