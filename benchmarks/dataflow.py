"""What does choosing the kernel by shape gain over one kernel for everything?

The four products of a layer (qkv, o, gate and up, down), one after another, with 1 to 256 rows:
``table`` takes what `pallas_kernels.dataflow` chooses for each (FlashDecoding++ §5), the others are
static: ``flat_gemm`` only, ``dense_gemm`` only, ``xla`` only (`jpd.ops.linear.linear_xla`), and
``cublas`` only (torch, in a process of its own). A static implementation that does not take the
shapes fails. `gain_vs_static` in the summary is, for every M and model, the time of the fastest
static one over that of the table, and `min_gain_vs_static` the least of them. A case in which one
of them broke or was not run has no gain but a reason, in `no_gain_because`: it might have been the
fastest.

Times are device times of a whole layer (`benchmarks/device_time.py`), over the weights of several
layers. Each product gets an input of its own, so that nothing else runs between them; the numbers
of each kernel are checked in `flat_gemm` and `dense_gemm`. Programs in which XLA computes a product
are timed after all others, because its search for the fastest would disturb them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.budget import Budget, spread
from benchmarks.gemm_cases import LAYERS
from benchmarks.gemm_chains import layer_calls, layer_chains, products
from benchmarks.lower_ahead import add_lowering, fill, start_lowering
from benchmarks.lowered import Chains, Lowering
from benchmarks.options import add_bounds, add_variants, planned
from benchmarks.peers import run_peer
from benchmarks.ratios import fill_bounds, put, speedups
from benchmarks.report import Report, add_arguments

MODELS = ("llama2-7b", "llama31-8b")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_ROWS = (1, 8)
OURS = "table"
STATIC = ("flat_gemm", "dense_gemm", "xla", "cublas")
UNTAKEN = f"failed: {NotImplementedError.__name__}"
"""How the status of an implementation begins that does not take the shapes."""


def case_name(model: str, rows: int) -> str:
    """As in result rows."""
    return f"{model} M={rows}"


def in_rounds(models: Sequence[str], rows: Sequence[int]) -> list[tuple[str, int]]:
    """Layers in the order in which they are measured: three numbers of rows of each model in turn.

    The weights of a model are made anew for each round.
    """
    rounds = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    return [(model, m) for some in rounds for model in models for m in some]


def has_xla(model: str, rows: int, impl: str) -> bool:
    """Whether XLA computes one of the products of a layer."""
    from benchmarks.gemm_impls import is_xla

    return any(is_xla(impl, *gemm) for gemm in products(model, rows))


def run_ours(
    report: Report,
    layers: Sequence[tuple[str, int]],
    impls: Sequence[str],
    variants: Sequence[str],
    budget: Budget,
    lowering: Lowering | None,
) -> None:
    """Adds all rows that are made with JAX, as long as there is time."""
    import jax
    import jax.numpy as jnp

    from benchmarks import device_time

    models = {model for model, _ in layers}
    on_cpu = jax.default_backend() != "gpu"
    calls = dict.fromkeys(models, 1) if on_cpu else layer_calls(models)
    every = layer_chains(layers, impls, calls)
    for searches in (False, True):
        chains = {key: chain for key, chain in every.items() if has_xla(*key) is searches}
        if not chains:
            continue
        with device_time.CompileAhead(
            chains,
            variants,
            searches=searches,
            lowering=lowering,
            beside={
                model: [
                    partial(device_time.random_program, (g.outputs, g.inputs), jnp.bfloat16)
                    for g in products(model, 1)
                ]
                for model in models
            },
        ) as compiled:
            held, weights = "", []
            for model, m in dict.fromkeys(key[:2] for key in chains):
                if not budget.enough():
                    return
                with budget.case():
                    if model != held:
                        held, weights = model, []
                        shapes = [(g.outputs, g.inputs) for g in products(model, 1)]
                        made = [
                            device_time.random_arrays(s, jnp.bfloat16, calls[model], scale=0.02)
                            for s in shapes
                        ]
                        weights = [list(layer) for layer in zip(*made, strict=True)]
                        del made
                    some = [key for key in chains if key[:2] == (model, m)]
                    programs = {key[2]: compiled.take(key) for key in some}
                    _run_layer(report, model, m, programs, weights)
                report.save()


def _run_layer(
    report: Report, model: str, rows: int, programs: dict[str, Any], weights: list[list[Any]]
) -> None:
    """Adds the rows of one case; compiled programs by implementation."""
    import jax.numpy as jnp

    from benchmarks import device_time
    from benchmarks.gemm_impls import mode

    gemms = products(model, rows)
    xs = [device_time.random_arrays((rows, g.inputs), jnp.bfloat16, 1)[0] for g in gemms]
    for impl, program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            timing = device_time.measure(program, xs, weights)
            report.add(
                case_name(model, rows),
                impl,
                timing.samples,
                "us",
                nbytes=sum(g.nbytes for g in gemms),
                flops=sum(g.flops for g in gemms),
                mode=mode(impl, timing.launch),
            )
        except Exception as error:  # one implementation must not cost the others
            report.fail(case_name(model, rows), impl, error)


def summarise(rows: Sequence[dict[str, Any]], of: int | None = None) -> dict[str, Any]:
    """The summary's numbers from all rows, `of` so many cases."""
    broken: dict[str, str] = {}
    for row in rows:
        status = row["status"]
        if row["impl"] in STATIC and status != "ok" and not status.startswith(UNTAKEN):
            of_case = [broken[row["case"]]] if row["case"] in broken else []
            broken[row["case"]] = "; ".join([*of_case, f"{row['impl']} {status}"])
    found = speedups(rows, OURS, STATIC)
    gains = {case: gain for case, gain in found.items() if case not in broken}
    summary: dict[str, Any] = {"gain_vs_static": gains, "no_gain_because": broken}
    if gains:
        summary["min_gain_vs_static"] = min(gains.values())
        put(summary, "geomean_gain_vs_static", gains, of=of)
    for static in STATIC:
        put(summary, f"geomean_vs_{static}", speedups(rows, OURS, [static]), of=of)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataflow")
    add_arguments(parser)
    add_variants(parser)
    add_bounds(parser)
    add_lowering(parser)
    parser.add_argument("--models", nargs="+", choices=[*LAYERS], help=f"[{MODELS}]")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help=f"[{ROWS}]")
    parser.add_argument("--impls", nargs="+", choices=[OURS, *STATIC[:-1]], help="[all]")
    parser.add_argument("--no-peers", action="store_true", help="no torch")
    args = parser.parse_args()
    budget = Budget(args.seconds)
    models = args.models or (["tiny"] if args.quick else MODELS)
    rows = args.rows or spread(QUICK_ROWS if args.quick else ROWS)
    everything = [] if args.quick else [(model, m) for model in MODELS for m in ROWS]
    report = Report(
        "dataflow", "What does choosing the kernel by shape gain over one for all?", out=args.out
    )
    layers = planned(
        report,
        args,
        in_rounds(models, rows),
        everything,
        name=lambda key: case_name(*key),
        order_named=True,
    )

    def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
        fill_bounds(report.rows, report.summary.get("copy_bytes_per_s"))
        return summarise(rows, len(report.cases))

    report.summarise = summary
    impls = args.impls or [OURS, *STATIC[:-1]]

    def chains() -> Chains:
        return layer_chains(layers, impls, layer_calls({model for model, _ in layers}))

    if args.lower_for is not None:
        sys.exit(fill(args, chains()))
    report.expect((case_name(*layer), impl) for layer in layers for impl in impls)
    with start_lowering(args, budget, chains) as lowering:
        if not args.no_peers:  # first, while the device's memory is all free
            options = ["--layer", *(f"{model}:{m}" for model, m in layers)]
            expected = [(case_name(*layer), "cublas") for layer in layers]
            limit = args.peer_seconds
            run_peer(report, "torch_gemm", options, expected, timeout_s=limit, budget=budget)
        if layers and budget.enough():
            from benchmarks.device_time import copy_bytes_per_s

            rate = copy_bytes_per_s((1 << 26) if args.quick else (1 << 32))
            report.summary["copy_bytes_per_s"] = rate
            run_ours(report, layers, impls, args.variants, budget, lowering)
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
