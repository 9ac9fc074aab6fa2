"""How long a collective takes by its size: measured once for a topology, then interpolated.

FlashOverlap, arXiv 2504.19519, section 4.1.3. Times are interpolated, not bandwidths, so that the
latency of small messages stays: below the first sample a message takes as long as that one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jpd.errors import ConfigError
from jpd.overlap.plan import Topology, check_op

SCHEMA = 1


@dataclass(frozen=True)
class CurveKey:
    """What a curve was measured on."""

    topology: Topology
    op: str
    """One of `OPS`."""
    ranks: int
    ctas: int
    """Thread blocks that NCCL was given."""
    beside_gemm: bool = False
    """While a GEMM ran on all other SMs; else alone."""

    def __post_init__(self) -> None:
        check_op(self.op)


@dataclass(frozen=True)
class BandwidthCurve:
    """Seconds of a collective by the bytes that each rank puts in.

    Calling it interpolates linearly between samples, on the smallest curve above them that never
    falls: a bigger message is never believed to be faster. Past the last sample the bandwidth of
    the last two goes on.

    Attributes:
      bytes: bytes of the send buffer of one rank, ascending, at least two.
      seconds: median time of each.

    Raises:
      ValueError: samples that are not ascending, positive and finite, or fewer than two.
    """

    bytes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("bytes", "seconds"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        sizes, times = np.asarray(self.bytes), np.asarray(self.seconds)
        if len(sizes) < 2 or len(sizes) != len(times):
            raise ValueError(f"{len(sizes)} sizes and {len(times)} times: 2 or more pairs needed")
        for name, values in (("bytes", sizes), ("seconds", times)):
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise ValueError(f"{name} {values.tolist()}: positive finite numbers expected")
        if not (np.diff(sizes) > 0).all():
            raise ValueError(f"bytes {sizes.tolist()}: they must ascend")

    @functools.cached_property
    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Sizes, and times that never fall. Searches ask for many sizes one by one."""
        return np.asarray(self.bytes), np.maximum.accumulate(self.seconds)

    def __call__(self, size: Any) -> Any:
        """Seconds for `size` bytes, a number or an array of them; nothing takes no time."""
        sizes, times = self._samples
        size = np.asarray(size, float)
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        # A flat end (noise) must not make all larger messages free.
        slope = max(slope, times[-1] / sizes[-1] / 2)
        found = np.interp(size, sizes, times) + np.maximum(size - sizes[-1], 0) * slope
        found = np.where(size > 0, found, 0.0)
        return float(found) if found.ndim == 0 else found

    def bus_bandwidth(self, op: str, ranks: int) -> np.ndarray:
        """Bytes a second that cross each link at every sample, as nccl-tests count them."""
        check_op(op)
        factor = (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks
        return np.asarray(self.bytes) * factor / np.asarray(self.seconds)

    @classmethod
    def sample(cls, measure: Callable[[int], float], sizes: Iterable[int]) -> BandwidthCurve:
        """Measures a curve.

        Args:
          measure: seconds (median) of the collective for so many bytes on each rank.
          sizes: bytes, e.g. `sample_sizes()`.
        """
        sizes = sorted(set(sizes))
        return cls(tuple(sizes), tuple(measure(size) for size in sizes))


def sample_sizes(
    first: int = 64 << 10, last: int = 1 << 30, per_octave: int = 2, multiple: int = 1024
) -> list[int]:
    """Sizes in bytes, evenly spaced in the logarithm from `first` to `last`, both included.

    The paper's code begins at 2 MiB, but a group of one wave of small tiles is smaller.
    """
    steps = round(per_octave * np.log2(last / first))
    sizes = first * (last / first) ** (np.arange(steps + 1) / steps)
    return sorted({round(size / multiple) * multiple for size in sizes})


def save_curves(path: Path, curves: dict[CurveKey, BandwidthCurve]) -> None:
    """Writes curves as JSON."""
    listed = [
        {**asdict(key), "bytes": list(curve.bytes), "seconds": list(curve.seconds)}
        for key, curve in sorted(curves.items(), key=lambda item: str(item[0]))
    ]
    path.write_text(json.dumps({"schema": SCHEMA, "curves": listed}, indent=1) + "\n")


def load_curves(path: Path) -> dict[CurveKey, BandwidthCurve]:
    """Reads what `save_curves` wrote.

    Raises:
      ConfigError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, not {SCHEMA}")
        return dict(_read(entry) for entry in content["curves"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no bandwidth curves: {error!r}") from error


def _read(entry: dict[str, Any]) -> tuple[CurveKey, BandwidthCurve]:
    samples: dict[str, Sequence[float]] = {name: entry.pop(name) for name in ("bytes", "seconds")}
    topology = Topology(**entry.pop("topology"))
    return CurveKey(topology=topology, **entry), BandwidthCurve(**samples)
