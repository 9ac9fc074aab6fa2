"""What the coordinator and an executor's process say to each other. Plain data, no jax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jpd.config import EngineConfig
from jpd.engine.plan import StepResult
from jpd.parallel import Split
from jpd.semi_pd.layout import Layout
from jpd.semi_pd.storage import Handles
from native.kv_push import Arrival
from native.memory import Handle


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """The first message to an executor's process; until the end come `StepPlan`s, and lists of
    `Admission` of rows in plans to come."""

    config: EngineConfig
    """Resolved."""
    split: Split
    """Of the model, over as many ranks as there are handles."""
    eos_token_ids: tuple[int, ...]
    phi: np.ndarray | None
    weights: Layout
    """Of one rank, as are `pages`."""
    pages: Layout
    handles: Handles
    prefill: bool
    """Prepare for steps with prompt chunks; it can run others, after it compiled them."""
    decode: bool
    """Prepare for steps with decoding rows; with `prefill`, also for steps of both."""
    target_pages: tuple[Handle, ...]
    """Of each rank, pages of decode executors on another device, to which prompts' KV is sent; none
    where they are the same."""
    generations: Handle | None
    """`[P]` int64 on the host, how often each page was handed out; None checks nothing."""
    check_kernels: bool
    """Compare the kernels with their references first; False where an executor of the same phase
    and share of the SMs has done so on this memory."""

    @property
    def fds(self) -> tuple[int, ...]:
        """File descriptors that the process must inherit."""
        checked = () if self.generations is None else (self.generations,)
        more = (*self.target_pages, *checked)
        return (*self.handles.fds, *(fd for handle in more for fd in handle.fds))


@dataclass(frozen=True, slots=True)
class Ready:
    """The first answer: steps may come."""

    units: int
    """SMs, or CPUs without a GPU, that the process really got."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step has run and its keys and values are in the pages, also in those of another device that
    they were sent to. Times are of `time.monotonic`."""

    result: StepResult
    recompiles: int
    """Step shapes that this executor compiled while requests waited, up to now."""
    arrival: Arrival | None
    """Of the KV that it sent to another device; None where both phases have the same pages."""
    begun_s: float
    """When the device could begin: launch of the step, or end of the one before it."""
    ended_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """The last message of an executor that cannot go on."""

    text: str
    fatal: bool = False
    """A bug of the coordinator: nobody else should go on either."""
