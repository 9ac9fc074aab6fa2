"""What the search for plans must know of a machine: collectives, and waves of the GEMM.

All is measured once for a topology. Bandwidth curves come from two programs for each collective and
number of NCCL's blocks, whose product has one group for each size of message, the largest first,
and whose trace has the time of each. For the collective alone the product is of depth 64: it is
complete long before the first collective is. For the collective beside the GEMM it is deep, and has
rows enough behind the messages to last longer than these.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import overlap_impls, overlap_time
from benchmarks.overlap_cases import GEMM, Case, Shape
from benchmarks.overlap_time import Operation
from jpd.overlap import BandwidthCurve, Trace, sample_sizes

LARGEST, LARGEST_BESIDE = 512 << 20, 64 << 20
"""Bytes of the largest message."""
_COLUMNS, _DEPTH, _DEPTH_BESIDE = 8192, 64, 8192
_RUNS = 7
_WAVE_DEPTHS = (1024, 8192)
_WAVES = 8
_MOST_SLOWED = 3.0
"""By which GEMM and collective are taken to slow each other down at most: a guess."""
_FLOPS_PER_S = 989e12
"""Of an H200's and an H100's data sheet: no GEMM is faster."""


def message_tiles(tile_bytes: int, largest: int = LARGEST) -> list[int]:
    """Sizes of messages in whole tiles, the largest first."""
    sizes = sample_sizes(tile_bytes, largest)
    return sorted({max(1, round(size / tile_bytes)) for size in sizes}, reverse=True)


def sample_curve(
    mesh: Mesh, communicator: Any, op: str, *, largest: int = LARGEST
) -> BandwidthCurve:
    """How long NCCL alone takes for messages of 64 KiB to `largest`."""
    from pallas_kernels import signal_gemm as gemms

    config = gemms.SignalConfig()
    sizes = message_tiles(config.tile_m * config.tile_n * 2, largest)
    # The first group is thrown away: all GPUs meet in it, and the product ends.
    groups = (_whole_rows(sizes[0], sizes, config), *sizes)
    return curve_of(_traced_groups(mesh, communicator, op, config, groups, _DEPTH))


def sample_curve_beside_gemm(
    mesh: Mesh, communicator: Any, op: str, alone: BandwidthCurve, *, largest: int = LARGEST_BESIDE
) -> BandwidthCurve:
    """How long NCCL takes while a GEMM runs on all other SMs.

    Raises:
        RuntimeError: the GEMM was over before two sizes were measured.
    """
    from pallas_kernels import mosaic
    from pallas_kernels import signal_gemm as gemms

    sms = mosaic.sm_count() - communicator.max_ctas
    shares = 1 if op == "all_reduce" else mesh.size
    config = next(
        c
        for c in gemms.candidates(8192, _COLUMNS, _DEPTH_BESIDE, sms, ranks=shares)
        if _COLUMNS % c.tile_n == 0
    )
    tile_bytes = config.tile_m * config.tile_n * 2
    sizes = message_tiles(tile_bytes, largest)
    # Rows behind the messages, so that the GEMM takes as long as they do at `_MOST_SLOWED`.
    messages_s = _MOST_SLOWED * sum(float(alone(size * tile_bytes)) for size in sizes)
    tile_s = 2 * config.tile_m * config.tile_n * _DEPTH_BESIDE / _FLOPS_PER_S
    last = max(sms, round(messages_s / tile_s) - sum(sizes))
    groups = (sms, *sizes, _whole_rows(last, (sms, *sizes), config))
    calls = _traced_groups(mesh, communicator, op, config, groups, _DEPTH_BESIDE)
    return curve_of(calls, beside_gemm=True)


def _whole_rows(tiles: int, others: Sequence[int], config: Any) -> int:
    """So many tiles, or a few more, that with the others they fill rows of tiles."""
    return tiles + -(sum(others) + tiles) % (_COLUMNS // config.tile_n)


def _traced_groups(
    mesh: Mesh, communicator: Any, op: str, config: Any, groups: tuple[int, ...], k: int
) -> list[Any]:
    """Traced calls of a product whose tiles are sent in these groups."""
    from native.overlap import Transfer, groups_of
    from pallas_kernels import mosaic
    from pallas_kernels import signal_gemm as gemms

    shares = 1 if op == "all_reduce" else mesh.size
    m = sum(groups) // (_COLUMNS // config.tile_n) * config.tile_m
    sms = mosaic.sm_count() - communicator.max_ctas
    spans = groups_of(gemms.group_spans(groups, config), groups)
    shape = gemms.packed_shape(m, _COLUMNS, config, shares)
    transfer = Transfer(op, spans, shape, jnp.bfloat16, trace=True)

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        def gemm(packed: Any, counters: Any) -> None:
            static = {"groups": groups, "config": config, "sms": sms, "ranks": shares}
            gemms.signal_gemm(x, w, counters, packed=packed, **static)

        return communicator.run(transfer, gemm, after=[x, w])

    xs, ws = overlap_time.operands(mesh, m, _COLUMNS, k, 1)
    lowered = overlap_time.lower(Operation(call), mesh, xs, ws)
    program = lowered.compile(compiler_options=overlap_time.GPU_OPTIONS)
    jax.block_until_ready(program(xs, ws))
    communicator.trace()
    for _ in range(_RUNS):
        jax.block_until_ready(program(xs, ws))
    return communicator.trace()


def curve_of(calls: Sequence[Any], *, beside_gemm: bool = False) -> BandwidthCurve:
    """The median time of each size over traced calls (`native.overlap.CallTrace`) and GPUs.

    The first group of each call is left out.

    Args:
        calls: traced.
        beside_gemm: only collectives that ended before the GEMM did.

    Raises:
        RuntimeError: fewer than two sizes are left.
    """
    times: dict[int, list[float]] = defaultdict(list)
    for call in calls:
        for group in call.groups[1:]:
            if not beside_gemm or group.end_us <= call.gemm_end_us:
                times[group.nbytes].append((group.end_us - group.start_us) * 1e-6)
    sizes = sorted(times)
    if len(sizes) < 2:
        raise RuntimeError(f"collectives of {len(sizes)} sizes were measured; a curve needs two")
    seconds = [max(1e-7, statistics.median(times[size])) for size in sizes]
    return BandwidthCurve(tuple(sizes), tuple(seconds))


@dataclass(frozen=True)
class WaveTimes:
    """Seconds of a wave of the GEMM by its depth, for some tiles: a straight line each."""

    lines: Mapping[tuple[int, int], tuple[float, float]]
    """Seconds at K = 0 and for each step of K, by rows and columns of a tile."""

    def seconds(self, config: Any, k: int) -> float | None:
        """Of one wave; None for tiles that were not measured."""
        line = self.lines.get((config.tile_m, config.tile_n))
        return None if line is None else line[0] + line[1] * k

    @classmethod
    def fit(cls, samples: Mapping[tuple[int, int], Mapping[int, float]]) -> WaveTimes:
        """From seconds of a wave by K, for each kind of tile; two K or more."""
        lines = {}
        for tile, by_depth in samples.items():
            slope, offset = np.polyfit(list(by_depth), list(by_depth.values()), 1)
            lines[tile] = float(max(offset, 0.0)), float(slope)
        return cls(lines)


def sample_waves(mesh: Mesh, sms: int, tiles: Sequence[tuple[int, int]]) -> WaveTimes:
    """Measures `signal_gemm` on `sms` SMs of all GPUs, alone."""
    from benchmarks.overlap_runs import Operands, compile_all
    from pallas_kernels import signal_gemm as gemms

    samples: dict[tuple[int, int], dict[int, float]] = {}
    for tile_m, tile_n in tiles:
        rows = 16
        columns = -(-_WAVES * sms // rows)
        for k in _WAVE_DEPTHS:
            shape = Shape(rows * tile_m, columns * tile_n, k)
            config = next(
                c for c in gemms.candidates(*shape, sms) if (c.tile_m, c.tile_n) == (tile_m, tile_n)
            )
            case = Case("", mesh.size, GEMM, shape)
            gemm = overlap_impls.signal_gemm(case, config, sms, None)
            operands = Operands(mesh, shape)
            seconds = gemm_seconds(mesh, operands, gemm, compile_all(mesh, operands, {0: gemm})[0])
            waves = gemms.waves_of(rows * columns, sms)
            samples.setdefault((tile_m, tile_n), {})[k] = seconds / waves
    return WaveTimes.fit(samples)


def gemm_seconds(mesh: Mesh, operands: Any, gemm: Any, program: Any, samples: int = 3) -> float:
    """Median seconds of a product alone; it is checked elsewhere."""
    if isinstance(program, Exception):
        raise program
    xs, ws = operands.of(gemm)
    launches = gemm.launches * operands.calls
    times = overlap_time.run_us(mesh, lambda: program(xs, ws), launches, samples=samples)
    return statistics.median(times) * 1e-6 / operands.calls


def gemm_slowdown(trace: Trace, gemm_s: float) -> float:
    """How much longer a wave took while a collective ran in a traced call; at least 1.

    Args:
        trace: of the call.
        gemm_s: seconds of the same GEMM alone.
    """
    if trace.hidden_s <= 0:
        return 1.0
    # Of the hidden time, this share was lost.
    lost = (trace.gemm_end_s - trace.gemm_start_s - gemm_s) / trace.hidden_s
    return 1 / (1 - min(max(lost, 0.0), 1 - 1 / _MOST_SLOWED))
