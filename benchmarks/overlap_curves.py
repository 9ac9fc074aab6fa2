"""What the search for plans must know of a machine: collectives alone, and waves of the GEMM.

Both are measured once for a topology. Bandwidth curves come from one program for each collective
and number of NCCL's blocks: a product of depth 64, whose result is as large as all messages
together, in one group for each size, the largest first. The product is complete long before the
first collective is, so that the rest of them run alone, and the trace has the time of each.
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
from jpd.overlap import BandwidthCurve, Contention, Trace, sample_sizes

LARGEST = 512 << 20
_COLUMNS, _DEPTH = 8192, 64
_RUNS = 7
_WAVE_DEPTHS = (1024, 8192)
_WAVES = 8
_MOST_FACTOR = 3.0


def message_tiles(tile_bytes: int, largest: int = LARGEST) -> list[int]:
    """Sizes of messages in whole tiles, the largest first."""
    sizes = sample_sizes(tile_bytes, largest)
    return sorted({max(1, round(size / tile_bytes)) for size in sizes}, reverse=True)


def sample_curve(
    mesh: Mesh, communicator: Any, op: str, *, largest: int = LARGEST
) -> BandwidthCurve:
    """How long NCCL alone takes for messages of 64 KiB to `largest`."""
    from native.overlap import Transfer, groups_of
    from pallas_kernels import mosaic
    from pallas_kernels import signal_gemm as gemms

    config = gemms.SignalConfig()
    shares = 1 if op == "all_reduce" else mesh.size
    sizes = message_tiles(config.tile_m * config.tile_n * 2, largest)
    columns = _COLUMNS // config.tile_n
    # The first group is thrown away: all GPUs meet in it, and the product ends.
    ahead = sizes[0] + -(sum(sizes) + sizes[0]) % columns
    groups = (ahead, *sizes)
    m = sum(groups) // columns * config.tile_m
    sms = mosaic.sm_count() - communicator.max_ctas
    spans = groups_of(gemms.group_spans(groups, config), groups)
    shape = gemms.packed_shape(m, _COLUMNS, config, shares)
    transfer = Transfer(op, spans, shape, jnp.bfloat16, trace=True)

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        def gemm(packed: Any, counters: Any) -> None:
            static = {"groups": groups, "config": config, "sms": sms, "ranks": shares}
            gemms.signal_gemm(x, w, counters, packed=packed, **static)

        return communicator.run(transfer, gemm, after=[x, w])

    xs, ws = overlap_time.operands(mesh, m, _COLUMNS, _DEPTH, 1)
    lowered = overlap_time.lower(Operation(call), mesh, xs, ws)
    program = lowered.compile(compiler_options=overlap_time.GPU_OPTIONS)
    jax.block_until_ready(program(xs, ws))
    communicator.trace()
    for _ in range(_RUNS):
        jax.block_until_ready(program(xs, ws))
    return curve_of(communicator.trace())


def curve_of(calls: Sequence[Any]) -> BandwidthCurve:
    """The median time of each size over traced calls (`native.overlap.CallTrace`) and GPUs.

    The first group of each call is left out.
    """
    times: dict[int, list[float]] = defaultdict(list)
    for call in calls:
        for group in call.groups[1:]:
            times[group.nbytes].append((group.end_us - group.start_us) * 1e-6)
    sizes = sorted(times)
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


def contention_of(trace: Trace, gemm_s: float, curve: Any) -> Contention:
    """How much GEMM and collectives slowed each other down in a traced call.

    Args:
        trace: of the call.
        gemm_s: seconds of the same GEMM alone.
        curve: seconds of a collective alone by bytes.
    """
    took = trace.gemm_end_s - trace.gemm_start_s
    gemm = 1.0
    if trace.hidden_s > 0:
        # Of the hidden time, this share was lost.
        lost = (took - gemm_s) / trace.hidden_s
        gemm = 1 / (1 - min(max(lost, 0.0), 1 - 1 / _MOST_FACTOR))
    behind = [group for group in trace.groups if group.end_s <= trace.gemm_end_s]
    collective = 1.0
    if behind:
        alone = sum(float(curve(group.size_bytes)) for group in behind)
        collective = sum(group.end_s - group.start_s for group in behind) / alone
    return Contention(min(max(gemm, 1.0), _MOST_FACTOR), min(max(collective, 1.0), _MOST_FACTOR))
