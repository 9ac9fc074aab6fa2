"""Finds the plan of a shape: how many SMs for whom, which tiles, which groups, or none at all.

FlashOverlap searches 2^(waves - 1) partitions, pruned by bounds on the first and the last group
(arXiv 2504.19519, section 4.1.4). A partition's time by Algorithm 1 only depends on what came
before through the end of the last collective, and never falls when that is later: so dynamic
programming finds the very best partition in O(waves^2 * groups), and nothing needs to be pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from jpd.overlap.plan import Plan, Tiling
from jpd.overlap.predictor import Contention, Work, predict, simulate

EXHAUSTIVE_WAVES = 10
"""With contention, so many waves (512 partitions) are searched one by one."""
MAX_GROUPS = 32
"""Each group costs the kernel a comparison a tile, and NCCL a launch."""
MIN_GAIN = 0.02
"""Overlapping must promise at least so much: the predictor errs by about as much."""

Partition = tuple[int, ...]


@dataclass(frozen=True)
class Option:
    """One way to share the GPU between the GEMM and the collective."""

    tiling: Tiling
    ctas: int
    """Thread blocks of NCCL; the curve in `work` was measured with so many."""
    work: Work


def partitions(waves: int, max_groups: int | None = None) -> Iterator[Partition]:
    """Every way to cut `waves` waves into groups, fewest groups first."""
    for cuts in range(min(waves, max_groups or waves)):
        for inner in combinations(range(1, waves), cuts):
            ends = (0, *inner, waves)
            yield tuple(end - start for start, end in pairwise(ends))


def exhaustive(work: Work, *, max_groups: int | None = None) -> tuple[Partition, float]:
    """The best of all partitions and its seconds; ties go to fewer groups.

    2^(waves - 1) of them: meant for few waves, and to check `best_partition`.
    """
    seconds = _seconds(work)
    found = ((seconds(groups), groups) for groups in partitions(work.waves, max_groups))
    best, groups = min(found, key=lambda pair: (pair[0], len(pair[1])))
    return groups, best


def best_partition(
    work: Work,
    *,
    max_groups: int | None = MAX_GROUPS,
    exhaustive_waves: int = EXHAUSTIVE_WAVES,
) -> tuple[Partition, float]:
    """The best partition and its seconds.

    Without contention it is the optimum of Algorithm 1. With it, few waves are searched one by
    one; for more, the optimum without contention is improved by moving, adding and removing single
    boundaries for as long as that helps.

    Args:
      work: product and collective.
      max_groups: most groups; None for any number.
      exhaustive_waves: up to so many waves are searched one by one where there is contention.
    """
    groups, seconds = _optimum(work, max_groups)
    if work.contention == Contention():
        return groups, seconds
    if work.waves <= exhaustive_waves:
        return exhaustive(work, max_groups=max_groups)
    return _improved(work, groups, max_groups)


def search(
    options: Iterable[Option],
    *,
    op: str,
    ranks: int,
    m: int,
    n: int,
    k: int,
    sequential_s: float,
    min_gain: float = MIN_GAIN,
    max_groups: int | None = MAX_GROUPS,
) -> Plan:
    """The plan of a shape, of all options and partitions, or the one not to overlap.

    Args:
      options: SMs, tiles and NCCL's blocks to choose from, each with its own times.
      op: one of `OPS`.
      ranks: GPUs that take part.
      m: rows on each.
      n: rows of the weight.
      k: columns of both on each.
      sequential_s: seconds of the fastest product and then the fastest collective.
      min_gain: overlapping is chosen where it promises a speed-up of more than 1 + this.
      max_groups: most groups.
    """
    shape = {"op": op, "ranks": ranks, "m": m, "n": n, "k": k, "sequential_s": sequential_s}
    best, taken = None, np.inf
    for option in options:
        groups, seconds = best_partition(option.work, max_groups=max_groups)
        if seconds < taken:
            best, taken = (option, groups), seconds
    # A single group waits for the whole GEMM, which had fewer SMs than it could have had.
    if best is None or len(best[1]) == 1 or taken * (1 + min_gain) >= sequential_s:
        return Plan(**shape, overlap=False, predicted_s=sequential_s, source="searched")
    option, groups = best
    return Plan(
        **shape,
        overlap=True,
        tiling=option.tiling,
        sms=option.work.sms,
        ctas=option.ctas,
        waves=groups,
        predicted_s=taken,
        source="searched",
    )


def _seconds(work: Work) -> Callable[[Partition], float]:
    if work.contention == Contention():
        return lambda groups: predict(work, groups)
    return lambda groups: simulate(work, groups).end_s


def _optimum(work: Work, max_groups: int | None) -> tuple[Partition, float]:
    """The best partition without contention.

    `ends[j]` is the earliest end of the collectives of the first j waves in so many groups; the
    last of these groups begins at some wave i < j.
    """
    waves = work.waves
    limit = min(waves, max_groups or waves)
    sent = work.sent_by(np.arange(waves + 1))
    starts, stops = np.tril_indices(waves + 1, -1)[::-1]
    cost = np.full((waves + 1, waves + 1), np.inf)  # of the group from wave i to wave j
    cost[starts, stops] = work.collective_s((sent[stops] - sent[starts]).astype(float))
    computed = np.arange(waves + 1) * work.wave_s
    ends = np.full(waves + 1, np.inf)
    ends[0] = 0.0
    came_from: list[np.ndarray] = []
    best, count = np.inf, 0
    for groups in range(1, limit + 1):
        candidates = np.maximum(computed[None, :], ends[:, None]) + cost
        came_from.append(candidates.argmin(0))
        ends = candidates.min(0)
        if ends[waves] < best * (1 - 1e-12):
            best, count = ends[waves], groups
    cuts = [waves]
    for groups in range(count, 0, -1):
        cuts.append(int(came_from[groups - 1][cuts[-1]]))
    cuts.reverse()
    found = tuple(end - start for start, end in pairwise(cuts))
    return found, predict(work, found)


def _improved(work: Work, groups: Partition, max_groups: int | None) -> tuple[Partition, float]:
    """Hill climbing over sets of boundaries, from a partition and from equal groups."""
    seconds = _seconds(work)
    waves, limit = work.waves, max_groups or work.waves

    def as_groups(cuts: frozenset[int]) -> Partition:
        ends = [0, *sorted(cuts), waves]
        return tuple(end - start for start, end in pairwise(ends))

    def neighbours(cuts: frozenset[int]) -> Iterator[frozenset[int]]:
        free = [cut for cut in range(1, waves) if cut not in cuts]
        for cut in cuts:
            yield cuts - {cut}
            for other in (cut - 1, cut + 1):
                if other in free:
                    yield cuts - {cut} | {other}
        if len(cuts) + 1 < limit:
            for cut in free:
                yield cuts | {cut}

    def climb(cuts: frozenset[int]) -> tuple[float, Partition]:
        best = seconds(as_groups(cuts))
        while True:
            tried = [(seconds(as_groups(near)), sorted(near)) for near in neighbours(cuts)]
            least, near = min(tried, default=(np.inf, []))
            if least >= best * (1 - 1e-12):
                return best, as_groups(cuts)
            best, cuts = least, frozenset(near)

    ends = np.cumsum(groups)[:-1].tolist()
    begins = [frozenset(ends)]
    for size in (1, 2, 4):
        if -(-waves // size) <= limit:
            begins.append(frozenset(range(size, waves, size)))
    best, found = min(climb(cuts) for cuts in begins)
    return found, best
