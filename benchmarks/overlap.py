"""How much time does a collective hide behind its GEMM, against product and collective in turn?

FlashOverlap (arXiv 2504.19519) on 2 and 4 GPUs of one host: the shapes of the paper's artifact (for
A800 and RTX 4090) and the row-parallel layers of Llama-3-70B and -8B split over the GPUs, with an
all-reduce (AR), a reduce-scatter (RS) and, on 4 GPUs, an all-to-all (A2A). A case is
`LINK RANKS OP MxNxK`, M, N and K of one GPU; LINK is "no_p2p" under ``NCCL_P2P_DISABLE=1``, else
"nvlink". One run is for one link and one number of GPUs; ``--merge`` makes one result of several.
One GPU has the products of all of them alone, `alone 1 GEMM MxNxK`.

Implementations:

- ``jpd``: `jpd.ops.overlap` with the plan of ``--tune``; the result as it was sent, which the next
  norm puts in order while it reads it, as in the paper. ``jpd_rows``: put in order, too.
  ``jpd_sequential``: the plan not to overlap.
- ``xla``: cuBLAS and NCCL in one program, `dot` and then `psum`, `psum_scatter` or `all_to_all`.
  ``cupy``: cuBLAS, then cupy's NCCL, driven by the host (`native.overlap.host`). ``torch``:
  cuBLAS, then `torch.distributed`, a process a GPU.
- ``xla_latency_hiding``: `xla` with ``--xla_gpu_enable_latency_hiding_scheduler``.
  ``xla_chunks2`` and ``xla_chunks4``: in parts, with that flag and XLA's combiners and its merger
  of products off.
  ``xla_windowed``: XLA's windowed einsum, ``--xla_gpu_threshold_for_windowed_einsum_mib=0
  --xla_gpu_multi_streamed_windowed_einsum``, with these flags too, and without the pass
  ``windowed-einsum-handler``, which computes something else on 4 GPUs (jaxlib 0.11.2).
- ``torch_async_tp``: torch's symmetric memory, `fused_matmul_reduce_scatter`, no multicast.
- ``collective``: NCCL alone, by XLA. In the cases `GEMM`, the product alone on all SMs:
  ``cublas``, ``signal_gemm``, and ``dense_gemm``, our kernel without signals.

jax's Pallas collective matmul is an all-gather before a product: it computes none of the cases.
XLA flags are compiler options of single programs, so all of JAX's run in turns in one process.
XLA's products are cuBLAS': its Triton GEMMs are off.

Every result is compared with float32 on every rank before it is timed: a case with a row that is
off by more than 8e-3 fails. Times are of chains of calls over more than 400 MB of operands, under
sustained load, all GPUs together, and the slowest counts: `overlap_time.py` says how. ``hidden`` is
the share of the collectives' time behind the GEMM, by the trace of some cases (``--trace``), which
are plotted if matplotlib is there.

`pct_of_bound` is the paper's bound over the time, both parts at the full speed they have alone.
``LINK_*_speedup`` are against the fastest of `xla`, `cupy` and `torch`. ``gemm_vs_cublas_*`` and
``signal_cost_pct`` are over shapes: on one GPU, else the geometric mean of the cases on several.

``--tune`` measures what the search needs and writes plans and curves for this GPU, link and
version of NCCL to ``--tuned DIR``, and how good the predictor is to `overlap_tune.json`::

    python -m benchmarks.overlap --ranks 1 --seconds 330 --missing
    python -m benchmarks.overlap --ranks 2 --tune --seconds 240 --missing
    python -m benchmarks.overlap --ranks 2 --seconds 330 --missing
    NCCL_P2P_DISABLE=1 python -m benchmarks.overlap --ranks 2 --tune --seconds 240 --missing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.budget import Budget, spread
from benchmarks.options import add_bounds, planned
from benchmarks.overlap_cases import (
    ALONE,
    GEMM,
    LINKS,
    RANKS,
    SETS,
    SHORT,
    TINY,
    TRACED,
    Case,
    Shape,
    by_shape,
    cases_of,
)
from benchmarks.overlap_devices import set_up
from benchmarks.peers import run_peer
from benchmarks.report import Report, add_arguments
from benchmarks.rows import load

QUESTION = "How much time does a collective hide behind its GEMM, against one after the other?"
TUNE_QUESTION = "Which plans hide most of a collective, and how well are their times predicted?"
TUNED = Path(__file__).parent.parent / "jpd" / "overlap" / "tuned"
TIMEOUT_S = 30.0
"""Of a collective: one that is stuck fails its row."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap")
    add_arguments(parser)
    add_bounds(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="GPUs [of 4, 2, 1 what there are]")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="[all]")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="MxNxK", help="[all]")
    ops = {short: op for op, short in SHORT.items()}
    parser.add_argument("--ops", nargs="+", choices=[*ops], default=[*ops], help="[all]")
    parser.add_argument("--impls", nargs="+", metavar="IMPL", help="of JAX's, only these [all]")
    parser.add_argument("--no-peers", action="store_true", help="no torch")
    parser.add_argument(
        "--trace", nargs="*", type=Shape.parse, default=[Shape(*TRACED)], metavar="MxNxK"
    )
    parser.add_argument("--tuned", type=Path, metavar="DIR", default=TUNED, help=f"[{TUNED}]")
    parser.add_argument("--ctas", nargs="+", type=int, metavar="N", help="blocks of NCCL to try")
    parser.add_argument("--tune", action="store_true", help="find plans, store them")
    parser.add_argument("--tried", type=int, default=3, help="--tune: plans timed a case [3]")
    parser.add_argument(
        "--exhaustive",
        type=int,
        default=1,
        metavar="N",
        help="--tune: time every partition of so many cases [1]",
    )
    args = parser.parse_args(argv)
    args.ops = [ops[short] for short in args.ops]
    return args


def everything() -> list[Case]:
    """All cases of the benchmark."""
    joined = [(link, ranks) for link in LINKS for ranks in RANKS]
    return [
        case
        for link, ranks in [*joined, (ALONE, 1)]
        for case in cases_of(link, ranks, by_shape(ranks))
    ]


def chosen(args: argparse.Namespace, link: str, ranks: int) -> list[Case]:
    """The cases of this run; any beginning has small and large ones of every kind."""
    collectives = tuple(op for op in SHORT if op != GEMM) if ranks > 1 else ()
    if args.quick and not args.shapes:
        shapes = dict.fromkeys(TINY, collectives)
    else:
        shapes = by_shape(ranks, args.sets)
        if args.shapes:
            known = by_shape(ranks)
            shapes = {s: known.get(s, collectives) for s in args.shapes}
        else:
            shapes = {shape: shapes[shape] for shape in spread([*shapes])}
    return [case for case in cases_of(link, ranks, shapes) if case.op in args.ops]


def peer_rows(report: Report, args: argparse.Namespace, cases: Sequence[Case], budget: Budget):
    """Adds the rows of torch, which runs first: the devices' memory is still free."""
    cases = [case for case in cases if case.op != GEMM]
    if args.no_peers or not cases:
        return
    expected = [(case.name, "torch") for case in cases]
    expected += [(c.name, "torch_async_tp") for c in cases if c.op == "reduce_scatter"]
    names = [case.name.replace(" ", ":") for case in cases]
    limit, share = args.peer_seconds, 0.3
    options = ["--ranks", str(cases[0].ranks), "--case", *names]
    run_peer(
        report, "torch_overlap", options, expected, timeout_s=limit, budget=budget, share=share
    )


def machine_of(args: argparse.Namespace, link: str, ranks: int, cases: Sequence[Case]) -> Any:
    """Communicators and plans; a CPU has neither, and products alone need none."""
    from benchmarks import overlap_runs, overlap_time

    machine = overlap_runs.Machine(overlap_time.mesh_of(ranks), link)
    if not overlap_time.on_gpu() or all(case.op == GEMM for case in cases):
        return machine
    from jpd.ops.overlap import topology
    from jpd.overlap import PlanTable
    from native.overlap import Communicator

    machine.plans = PlanTable.shipped(topology(), args.tuned)
    if args.tune:
        ctas = sorted(tried_ctas(args, link))
    else:
        plans = [machine.plan(case) for case in cases]
        ctas = args.ctas or sorted({plan.ctas for plan in plans if plan and plan.overlap})
    axis = overlap_time.AXIS
    machine.connect = lambda most: Communicator.for_axis(
        machine.mesh, axis, max_ctas=most, timeout_s=TIMEOUT_S
    )
    machine.communicators = [machine.connect(most) for most in ctas]
    try:
        from native.overlap.host import HostCommunicator

        if not args.tune and (args.impls is None or "cupy" in args.impls):
            machine.host = HostCommunicator(list(machine.mesh.devices.flat), timeout_s=TIMEOUT_S)
    except Exception as error:  # no cupy, or its NCCL does not start: the others run
        machine.host_error = f"{type(error).__name__}: {error}"
    return machine


def tried_ctas(args: argparse.Namespace, link: str) -> Sequence[int]:
    """Numbers of NCCL's blocks to try."""
    from benchmarks.overlap_tune import CTAS

    return args.ctas or CTAS[link]


def curves_of(args: argparse.Namespace) -> Callable[[Case], Any]:
    """The fastest bandwidth curve of any number of blocks, of the topology that was tuned last."""
    from benchmarks.overlap_tune import envelope
    from jpd.overlap import load_curves

    known: dict[tuple[str, str, int], list[Any]] = {}
    for path in sorted(args.tuned.glob("*.curves.json")):
        for key, curve in load_curves(path).items():
            if key.beside_gemm:
                continue
            known.setdefault((key.topology.link, key.op, key.ranks), []).append(curve)
    best = {key: envelope(curves) for key, curves in known.items()}
    return lambda case: best.get((case.link, case.op, case.ranks))


def measure(
    report: Report, args: argparse.Namespace, machine: Any, cases: Sequence[Case], budget: Budget
) -> None:
    """Measures shape by shape while there is time."""
    from benchmarks import overlap_impls, overlap_runs, overlap_time

    expected = [
        (case, name)
        for case in cases
        for name in [
            *overlap_impls.in_jax(case, machine.mesh, None, ()),
            *["cupy"] * (case.op != GEMM and overlap_time.on_gpu()),
        ]
        if args.impls is None or name in args.impls
    ]
    report.expect((case.name, name) for case, name in expected)
    for shape, some in overlap_runs.by_shape(cases).items():
        if not budget.enough():
            return
        traced = report.folder if shape in args.trace else None
        report.folder.mkdir(parents=True, exist_ok=True)
        with budget.case():
            try:
                overlap_runs.run_shape(report, machine, some, only=args.impls, traced=traced)
            except Exception as error:  # too little memory, say: other shapes may do
                have = {(row["case"], row["impl"]) for row in report.rows}
                for case, name in expected:
                    if case in some and (case.name, name) not in have:
                        report.fail(case.name, name, error)
        report.save()


def tune(
    report: Report, args: argparse.Namespace, machine: Any, cases: Sequence[Case], budget: Budget
) -> None:
    """Finds plans shape by shape while there is time."""
    from benchmarks import overlap_runs
    from benchmarks.overlap_tune import Tuner
    from jpd.ops.overlap import topology

    tuner = Tuner(machine, topology(), args.tuned, report)
    tuner.sample(sorted({case.op for case in cases}), budget)
    report.expect((case.name, "sequential") for case in cases)
    left = args.exhaustive
    for shape, some in overlap_runs.by_shape(cases).items():
        if not budget.enough():
            return
        longest_s, before = budget.longest_s, left
        with budget.case():
            operands = None
            for case in some:
                try:
                    operands = operands or overlap_runs.Operands(machine.mesh, shape)
                    left -= tuner.tune(case, operands, tried=args.tried, exhaustive=left > 0)
                except Exception as error:  # one case must not cost the others
                    known = report.find(case.name, "sequential")
                    report.fail(case.name, "search" if known else "sequential", error)
            machine.recover()
        if left < before:  # other cases do not take as long as one with all its partitions
            budget.longest_s = longest_s
        report.save()


def main() -> None:
    args = parse_args()
    budget = Budget(args.seconds)
    name = "overlap_tune" if args.tune else "overlap"
    report = Report(name, TUNE_QUESTION if args.tune else QUESTION, out=args.out)
    link, ranks = set_up(report, args.ranks)
    if args.tune and link in ("host", ALONE) and args.seconds != 0:
        sys.exit("--tune needs GPUs, two at least: there is nothing to measure here")
    # Who measures nothing may be on another machine than those that did.
    cases = chosen(args, link, ranks) if args.seconds != 0 else []
    if not cases and args.seconds != 0:
        ops = ", ".join(SHORT[op] for op in args.ops)
        sys.exit(f"--ops {ops}: no case on {ranks} GPUs; one has GEMM alone, two have no A2A")
    every = [] if args.quick else everything()
    if args.tune:
        cases = [case for case in cases if case.op != GEMM]
        every = [case for case in every if case.op != GEMM]
    cases = planned(report, args, cases, every, order_named=True, once=())
    counted = list(dict.fromkeys([*every, *cases]))

    from benchmarks import overlap_summary

    def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if args.tune:
            return overlap_summary.summarise_tuning(rows)
        overlap_summary.fill_bounds(rows, curves_of(args))
        tuning = report.folder / "overlap_tune.json"
        searched = load(tuning)["rows"] if tuning.exists() else []
        return overlap_summary.summarise(rows, counted) | overlap_summary.summarise_tuning(searched)

    report.summarise = summary
    if not args.tune and link != "host":
        peer_rows(report, args, cases, budget)
    if cases and budget.enough() and args.seconds != 0:
        machine = machine_of(args, link, ranks, cases)
        (tune if args.tune else measure)(report, args, machine, cases, budget)
        for communicator in machine.communicators:
            communicator.close()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
