"""Finds the plans of cases: searched by the predictor, then the best of some that are timed.

For each case: options are NCCL's numbers of blocks and the GEMM's cheapest tiles; the predictor
(`jpd.overlap.search`) finds the best groups for each number of blocks with times of waves as they
were measured for the topology. The GEMMs of the most promising are then timed at this very shape,
the search is repeated with that, and the plans it gives are timed, as is XLA's product and
collective. The fastest is stored; "do not overlap" where nothing is faster by `MIN_GAIN`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import overlap_impls
from benchmarks.budget import Budget
from benchmarks.overlap_cases import Case
from benchmarks.overlap_curves import (
    WaveTimes,
    gemm_seconds,
    gemm_slowdown,
    sample_curve,
    sample_curve_beside_gemm,
    sample_waves,
)
from benchmarks.overlap_runs import (
    Checker,
    Machine,
    Operands,
    checked_us,
    compile_all,
    describe,
    traced_call,
)
from benchmarks.report import Report
from jpd.ops.overlap import option_of
from jpd.overlap import (
    BandwidthCurve,
    Contention,
    CurveKey,
    Option,
    Plan,
    PlanTable,
    Topology,
    load_curves,
    save_curves,
    search,
    simulate,
)

TILES = ((256, 192), (128, 256), (256, 128), (128, 192))
"""Rows and columns of the tiles whose waves are measured."""
CTAS = {"nvlink": (8, 16, 24, 32), "no_p2p": (2, 4, 8)}
"""NCCL's blocks that are tried."""
MIN_GAIN = 0.01
"""What a plan must gain where it was timed; less may be noise."""
EXHAUSTIVE_WAVES = 6
"""At most so many waves (32 partitions) are timed one by one."""
_SEQUENTIAL = "xla"
_MOST_PARTS = 64
_SAMPLES = 3


def curves_path(folder: Path, topology: Topology) -> Path:
    """Where curves lie, beside the plans."""
    return folder / f"{topology.slug}.curves.json"


def plans_path(folder: Path, topology: Topology) -> Path:
    """Where `PlanTable.shipped` looks."""
    return folder / f"{topology.slug}.json"


def envelope(curves: Sequence[BandwidthCurve]) -> BandwidthCurve:
    """The least time at every size of the first, whatever the number of blocks, whole or in parts.

    Without P2P large messages take longer than the same bytes in small ones.
    """
    sizes = curves[0].bytes
    whole = BandwidthCurve(sizes, tuple(min(c(size) for c in curves) for size in sizes))
    parts = np.arange(1, _MOST_PARTS + 1)
    return BandwidthCurve(sizes, tuple((parts * whole(size / parts)).min() for size in sizes))


@dataclass
class Tuner:
    """Everything that is known of one topology."""

    machine: Machine
    topology: Topology
    folder: Path
    report: Report
    table: PlanTable = field(init=False)
    curves: dict[CurveKey, BandwidthCurve] = field(init=False)
    waves: WaveTimes = field(default_factory=lambda: WaveTimes({}))
    slowdown: dict[tuple[str, int], float] = field(default_factory=dict)
    """Of a GEMM by collectives, by op and blocks, from the first case that was timed with them."""
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        self.table = PlanTable.shipped(self.topology, self.folder)
        path = curves_path(self.folder, self.topology)
        self.curves = load_curves(path) if path.exists() else {}

    def save(self) -> None:
        """Writes plans and curves."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.table.save(plans_path(self.folder, self.topology))
        save_curves(curves_path(self.folder, self.topology), self.curves)

    def sample(self, ops: Sequence[str], budget: Budget) -> None:
        """Measures curves that are not known yet, and waves."""
        mesh = self.machine.mesh
        for op in ops:
            for communicator in self.machine.communicators:
                key = self._key(op, mesh.size, communicator.max_ctas)
                beside = dataclasses.replace(key, beside_gemm=True)
                if key not in self.curves and budget.left_s > 0:
                    self._keep(key, sample_curve(mesh, communicator, op))
                if key in self.curves and beside not in self.curves and budget.left_s > 0:
                    alone = self.curves[key]
                    try:
                        curve = sample_curve_beside_gemm(mesh, communicator, op, alone)
                    except Exception as error:  # it is predicted as alone, then
                        print(f"{op} with {key.ctas} CTAs beside a GEMM: {error}")
                    else:
                        self._keep(beside, curve)
        self.save()
        most = max(communicator.max_ctas for communicator in self.machine.communicators)
        self.waves = sample_waves(mesh, _sms(most), TILES)

    def _key(self, op: str, ranks: int, ctas: int) -> CurveKey:
        """Of the collective alone."""
        return CurveKey(self.topology, op, ranks, ctas)

    def _keep(self, key: CurveKey, curve: BandwidthCurve) -> None:
        self.curves[key] = curve
        best = curve.bus_bandwidth(key.op, key.ranks).max() / 1e9
        where = "beside a GEMM" if key.beside_gemm else "alone"
        print(f"{key.op} with {key.ctas} CTAs {where}: up to {best:.0f} GB/s of bus bandwidth")

    def _contention(self, case: Case, ctas: int) -> Contention:
        """What is known of it."""
        key = dataclasses.replace(self._key(case.op, case.ranks, ctas), beside_gemm=True)
        slowdown = self.slowdown.get((case.op, ctas), 1.0)
        return Contention(slowdown, self.curves.get(key))

    def options(self, case: Case, ctas: int) -> list[Option]:
        """Ways to run a case with so many blocks of NCCL, by the times of waves."""
        from pallas_kernels import signal_gemm as gemms

        if self._key(case.op, case.ranks, ctas) not in self.curves:
            return []  # there was no time to measure it
        shares, sms = 1 if case.op == "all_reduce" else case.ranks, _sms(ctas)
        found = []
        for config in gemms.candidates(*case.shape, sms, ranks=shares)[:3]:
            wave_s = self.waves.seconds(config, case.shape.k)
            if wave_s is None:
                continue
            tiles = gemms.tile_count(*case.shape[:2], config, shares)
            gemm_s = gemms.waves_of(tiles, sms) * wave_s
            found.append(self.option(case, ctas, config, gemm_s, Contention()))
        return found

    def option(
        self,
        case: Case,
        ctas: int,
        config: Any,
        gemm_s: float,
        contention: Contention | None = None,
    ) -> Option:
        """One of them; by default with the contention that is known."""
        return option_of(
            case.op,
            case.ranks,
            *case.shape[:2],
            config,
            sms=_sms(ctas),
            ctas=ctas,
            gemm_s=gemm_s,
            curve=self.curves[self._key(case.op, case.ranks, ctas)],
            fixed_s=self.fixed_s,
            contention=contention or self._contention(case, ctas),
        )

    def tune(self, case: Case, operands: Operands, *, tried: int, exhaustive: bool) -> bool:
        """Finds, times and stores the plan of a case, and adds rows of all that was timed.

        Args:
            case: which.
            operands: of its shape.
            tried: plans that are timed at most.
            exhaustive: time every partition of the best option too, if there are few.

        Returns:
            Whether that was done.
        """
        from pallas_kernels import signal_gemm as gemms

        mesh = self.machine.mesh
        checker = Checker(mesh, case.op, operands)
        rough: list[tuple[Plan, Option]] = []
        for communicator in self.machine.communicators:
            found = best_of(self.options(case, communicator.max_ctas), case)
            if found:
                rough.append(found)
        rough = sorted(rough, key=lambda pair: self._with_contention(case, *pair))[:tried]
        # The GEMM of each at this very shape.
        shares = 1 if case.op == "all_reduce" else case.ranks
        gemm = {}
        for i, (plan, _) in enumerate(rough):
            config = gemms.SignalConfig(**dataclasses.asdict(plan.tiling))
            gemm[i] = overlap_impls.signal_gemm(case, config, plan.sms, None, shares)
        jobs = {**gemm, _SEQUENTIAL: overlap_impls.sequential(case.op)}
        programs = compile_all(mesh, operands, jobs)
        sequential_us, error = checked_us(
            mesh,
            operands,
            checker,
            jobs[_SEQUENTIAL],
            programs[_SEQUENTIAL],
            samples=_SAMPLES,
        )
        self.report.add(case.name, "sequential", sequential_us, "us", rel_err=error)
        sequential_s = statistics.median(sequential_us) * 1e-6
        pairs = []
        for i, (plan, _) in enumerate(rough):
            try:
                gemm_s = gemm_seconds(mesh, operands, gemm[i], programs[i])
            except Exception as error:  # one kernel must not cost the others
                self.report.fail(case.name, f"{plan.sms}+{plan.ctas}", error)
                continue
            config = gemms.SignalConfig(**dataclasses.asdict(plan.tiling))
            again = best_of([self.option(case, plan.ctas, config, gemm_s)], case)
            pairs += [again] if again else []
        timed = self._time(case, operands, checker, pairs)
        best = min(timed, key=lambda plan: plan.measured_s, default=None)
        if best is None or best.measured_s * (1 + MIN_GAIN) >= sequential_s:
            shape = dict(zip("mnk", case.shape, strict=True))
            best = Plan(
                op=case.op,
                ranks=case.ranks,
                **shape,
                overlap=False,
                measured_s=sequential_s,
                source="measured",
            )
        best = dataclasses.replace(best, sequential_s=sequential_s)
        self.table.add(best)
        self.save()
        option = next((o for p, o in pairs if p.ctas == best.ctas), None) if best.overlap else None
        if exhaustive and option is not None and option.work.waves <= EXHAUSTIVE_WAVES:
            self._exhaustive(case, operands, checker, best, option)
            return True
        return False

    def _with_contention(self, case: Case, plan: Plan, option: Option) -> float:
        """Seconds of a plan that was searched without contention, which is much faster."""
        known = self._contention(case, plan.ctas)
        return simulate(dataclasses.replace(option.work, contention=known), plan.waves).end_s

    def _time(
        self,
        case: Case,
        operands: Operands,
        checker: Checker,
        pairs: Sequence[tuple[Plan, Option]],
    ) -> list[Plan]:
        """Times plans and adds their rows; those that work, with `measured_s`."""
        mesh, communicators = self.machine.mesh, self.machine.communicators
        jobs = {
            i: overlap_impls.ours(case, plan, communicators, implementation="overlap", packed=True)
            for i, (plan, _) in enumerate(pairs)
        }
        programs = compile_all(mesh, operands, jobs)
        found = []
        for i, (plan, option) in enumerate(pairs):
            name = f"{plan.sms}+{plan.ctas}"
            try:
                samples, error = checked_us(
                    mesh, operands, checker, jobs[i], programs[i], samples=_SAMPLES
                )
                measured_s = statistics.median(samples) * 1e-6
                self.report.add(
                    case.name,
                    name,
                    samples,
                    "us",
                    rel_err=error,
                    plan=describe(plan),
                    gemm_us=option.work.gemm_s * 1e6,
                    predicted_us=plan.predicted_s * 1e6,
                    error_pct=100 * abs(plan.predicted_s / measured_s - 1),
                )
                found.append(dataclasses.replace(plan, measured_s=measured_s, source="measured"))
            except Exception as error:  # one plan must not cost the others
                self.report.fail(case.name, name, error)
                continue
            if (case.op, plan.ctas) not in self.slowdown:
                try:
                    self._calibrate(case, operands, plan, option, measured_s)
                except Exception as error:  # it is predicted without, then
                    print(f"{case.name}, {plan.ctas} CTAs: no slowdown known: {error}")
        return found

    def _calibrate(
        self, case: Case, operands: Operands, plan: Plan, option: Option, measured_s: float
    ) -> None:
        """Learns from one traced call what the predictor does not know yet."""
        _, trace = traced_call(self.machine, case, plan, operands)
        found = self.slowdown[case.op, plan.ctas] = gemm_slowdown(trace, option.work.gemm_s)
        self.fixed_s = self.fixed_s or max(0.0, min(measured_s - trace.end_s, 5e-5))
        print(
            f"{case.name}, {plan.ctas} CTAs: GEMM x {found:.3f}, {self.fixed_s * 1e6:.1f} us fixed"
        )

    def _exhaustive(
        self,
        case: Case,
        operands: Operands,
        checker: Checker,
        searched: Plan,
        option: Option,
    ) -> None:
        """Times every partition, the searched one among them, and adds the best one's row."""
        from jpd.overlap.partitions import partitions

        mesh, communicators = self.machine.mesh, self.machine.communicators
        jobs = {}
        for waves in partitions(option.work.waves):
            plan = dataclasses.replace(searched, waves=waves)
            job = overlap_impls.ours(
                case, plan, communicators, implementation="overlap", packed=True
            )
            # The searched one was checked; tests check every partition.
            jobs[waves] = dataclasses.replace(job, checked=False)
        programs = compile_all(mesh, operands, jobs)
        times, errors = {}, []
        for waves, job in jobs.items():
            samples, _ = checked_us(mesh, operands, checker, job, programs[waves], samples=_SAMPLES)
            times[waves] = statistics.median(samples)
            predicted = simulate(option.work, waves).end_s * 1e6
            errors.append(100 * abs(predicted / times[waves] - 1))
        best = min(times, key=times.__getitem__)
        self.report.add(
            case.name,
            "exhaustive",
            [times[best]],
            "us",
            plan=describe(dataclasses.replace(searched, waves=best, source="measured")),
            partitions=len(times),
            searched_us=times[searched.waves],
            searched_pct=100 * times[best] / times[searched.waves],
            error_pct=statistics.mean(errors),
        )


def best_of(options: Sequence[Option], case: Case) -> tuple[Plan, Option] | None:
    """The plan with the least predicted time, and its option; None if one group is best."""
    found = []
    for option in options:
        m, n, k = case.shape
        plan = search(
            [option],
            op=case.op,
            ranks=case.ranks,
            m=m,
            n=n,
            k=k,
            sequential_s=float("inf"),
        )
        if plan.overlap:
            found.append((dataclasses.replace(plan, sequential_s=None), option))
    return min(found, key=lambda pair: pair[0].predicted_s, default=None)


def _sms(ctas: int) -> int:
    from pallas_kernels import mosaic

    return mosaic.sm_count() - ctas
