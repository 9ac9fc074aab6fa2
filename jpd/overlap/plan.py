"""What was decided for a product and its collective, and the file that keeps such decisions."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from jpd.errors import ConfigError

OPS = ("all_reduce", "reduce_scatter", "all_to_all")
"""Collectives that can follow a product."""
SCHEMA = 1
MAX_RATIO = 2.0
"""A plan serves shapes whose M, N and K are each at most this far from its own."""


def check_op(op: str) -> None:
    """Raises ValueError unless `op` is one of `OPS`."""
    if op not in OPS:
        raise ValueError(f"op is {op!r}; known: {', '.join(OPS)}")


@dataclass(frozen=True, order=True)
class Topology:
    """What times depend on besides the shape."""

    gpu: str
    """Device kind, such as "NVIDIA H200"."""
    link: str
    """What joins the GPUs: "nvlink", or "no_p2p" where they exchange through the host."""
    nccl: str
    """Version of NCCL, such as "2.28.9"."""

    @property
    def slug(self) -> str:
        """For names of files: "nvidia_h200-nvlink-nccl2.28.9"."""
        name = f"{self.gpu}-{self.link}-nccl{self.nccl}".lower()
        return re.sub(r"[^a-z0-9.-]+", "_", name)


@dataclass(frozen=True)
class Tiling:
    """How the signalling GEMM is cut up; the fields of `pallas_kernels.signal_gemm.SignalConfig`,
    which checks them."""

    tile_m: int
    tile_n: int
    stages: int
    wg_dimension: Literal["m", "n"]
    grid_minor: Literal["m", "n"]
    grid_tile_width: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one product and its collective run. Hashable: it is a static argument.

    Raises:
      ValueError: fields that contradict each other.
    """

    op: str
    """One of `OPS`."""
    ranks: int
    m: int
    """Rows of x on one rank."""
    n: int
    k: int
    """Columns of x on one rank."""
    overlap: bool
    """False: product, then collective, one after the other, is what was found to be fastest. Then
    the next four fields are not used."""
    tiling: Tiling | None = None
    sms: int = 0
    """SMs of the GEMM; at least `ctas` fewer than the GPU has, or nothing overlaps."""
    ctas: int = 0
    """Thread blocks of NCCL."""
    waves: tuple[int, ...] = ()
    """Waves of tiles in each group, in the order of completion."""
    sequential_s: float | None = None
    """Seconds of product and collective one after the other."""
    predicted_s: float | None = None
    """Seconds by the predictor."""
    measured_s: float | None = None
    source: str = "given"
    """"given", "searched" (by the predictor) or "measured" (the best of some that were timed)."""

    def __post_init__(self) -> None:
        check_op(self.op)
        object.__setattr__(self, "waves", tuple(int(count) for count in self.waves))
        for name in ("ranks", "m", "n", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if not self.overlap:
            return
        if self.tiling is None or self.sms < 1 or self.ctas < 1 or not self.waves:
            raise ValueError(f"to overlap takes tiling, sms, ctas and waves: {self}")
        if min(self.waves) < 1:
            raise ValueError(f"waves {self.waves}: every group needs at least one")

    def waves_for(self, total: int) -> tuple[int, ...]:
        """Waves of each group where the product has `total` of them: boundaries in proportion.

        Groups that would be empty are left out.

        Raises:
          ValueError: this plan does not overlap, or there is no wave.
        """
        if not self.overlap or total < 1:
            raise ValueError(f"{total} waves cannot be grouped by {self}")
        own, ends, done = sum(self.waves), [], 0
        for count in self.waves:
            done += count
            ends.append((2 * done * total + own) // (2 * own))  # rounded half up, in integers
        cuts = [0, *sorted({end for end in ends if end > 0})]
        return tuple(end - start for start, end in pairwise(cuts))

    def as_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Plan:
        """Reads what `as_json` gave."""
        tiling = entry.get("tiling")
        return cls(**{**entry, "tiling": None if tiling is None else Tiling(**tiling)})


class PlanTable:
    """Plans of one topology, by op, ranks and shape."""

    def __init__(self, topology: Topology, plans: Iterable[Plan] = ()) -> None:
        self.topology = topology
        self._plans: dict[tuple[str, int, int, int, int], Plan] = {}
        for plan in plans:
            self.add(plan)

    def __len__(self) -> int:
        return len(self._plans)

    def add(self, plan: Plan) -> None:
        """Adds a plan, in place of one for the same op, ranks and shape."""
        self._plans[plan.op, plan.ranks, plan.m, plan.n, plan.k] = plan

    def find(
        self, op: str, ranks: int, m: int, n: int, k: int, *, max_ratio: float = MAX_RATIO
    ) -> Plan | None:
        """The plan for this shape or the nearest (section 4.2.2 of the paper).

        Nearest is by the sum of the logarithms of what M, N and K differ by; a tie goes to the
        smaller shape. None where every plan is more than `max_ratio` away along M, N or K.
        """
        exact = self._plans.get((op, ranks, m, n, k))
        if exact is not None:
            return exact
        near = []
        for plan in self._plans.values():
            if (plan.op, plan.ranks) != (op, ranks):
                continue
            pairs = ((m, plan.m), (n, plan.n), (k, plan.k))
            apart = [abs(math.log(ours / theirs)) for ours, theirs in pairs]
            if max(apart) <= math.log(max_ratio) * (1 + 1e-12):
                near.append((sum(apart), plan.m, plan.n, plan.k, plan))
        return min(near, key=lambda found: found[:4])[4] if near else None

    def save(self, path: Path) -> None:
        """Writes the table as JSON."""
        plans = [self._plans[key].as_json() for key in sorted(self._plans)]
        content = {"schema": SCHEMA, "topology": dataclasses.asdict(self.topology), "plans": plans}
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> PlanTable:
        """Reads what `save` wrote.

        Raises:
          ConfigError: the file holds something else.
        """
        try:
            content = json.loads(path.read_text())
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, not {SCHEMA}")
            topology = Topology(**content["topology"])
            return cls(topology, map(Plan.from_json, content["plans"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no table of plans: {error!r}") from error

    @classmethod
    def shipped(cls, topology: Topology, folder: Path | None = None) -> PlanTable:
        """The table that comes with jpd for this GPU, link and version of NCCL; empty if none."""
        path = (folder or Path(__file__).parent / "tuned") / f"{topology.slug}.json"
        return cls.load(path) if path.exists() else cls(topology)
