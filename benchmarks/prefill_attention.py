"""How fast is attention of prompt chunks over a paged prefix and themselves, against its peers?

bf16, head size 128, pages of 16 tokens in random order. Ours is ``jpd``. Peers: ``torch_cudnn``
(cuDNN through torch, no pages, single chunks only), ``torch_sdpa`` (the fastest of torch's back
ends; after a prefix, where cuDNN may not take the mask), and ``flashinfer`` (its fa3 or fa2).

Times are device times (`benchmarks/device_time.py`). `rel_err` is the worst of the rows that are
checked (`attention_cases.Prefill.sample`) against float32; above 4e-3 the case fails. `tflops`
counts pairs of a query and a key that it may see.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.attention_cases import (
    HEAD_SIZE,
    MAX_REL_ERR,
    PAGE_TOKENS,
    PREFILL,
    QUICK_PREFILL,
    Pages,
    Prefill,
    select,
)
from benchmarks.attention_chains import SCALE, prefill_chain
from benchmarks.baselines import torch_attention
from benchmarks.budget import Budget
from benchmarks.lower_ahead import add_lowering, fill, start_lowering
from benchmarks.lowered import Lowering
from benchmarks.options import add_bounds, add_variants, planned
from benchmarks.peers import run_peer
from benchmarks.ratios import put, speedups
from benchmarks.report import Report, add_arguments

OURS = "jpd"
PEERS = ("torch_cudnn", "torch_sdpa", "flashinfer")


def calls_of(case: Prefill, quick_cpu: bool) -> int:
    """Calls of a program."""
    from benchmarks.device_time import rotations

    return 1 if quick_cpu else rotations(case.kv_bytes, least=4)


def chains_of(cases: Sequence[Prefill], quick_cpu: bool) -> dict[tuple[str, str], partial[Any]]:
    """What makes the chains, by case and implementation."""
    return {
        (case.name, impl): partial(prefill_chain, case, impl, calls_of(case, quick_cpu))
        for case in cases
        for impl in ((OURS, "xla") if quick_cpu else (OURS,))
    }


def shapes_of(case: Prefill) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the queries that are checked, of a pool of keys or values, and of their page tables."""
    pages, checked = Pages.shuffled(case.contexts), len(case.sample())
    pool = (pages.count, PAGE_TOKENS, case.kv_heads, HEAD_SIZE)
    return (checked, case.q_heads, HEAD_SIZE), pool, (checked, pages.table.shape[1])


def beside(case: Prefill) -> list[partial[Any]]:
    """What compiles the programs that a case needs beside its chains."""
    import jax.numpy as jnp

    from benchmarks.attention_reference import rows_program
    from benchmarks.device_time import random_program

    checked, pool, table = shapes_of(case)
    return [
        partial(random_program, pool, jnp.bfloat16),
        partial(random_program, (case.tokens, *checked[1:]), jnp.bfloat16),
        partial(rows_program, checked, pool, table, SCALE),
    ]


def run_ours(
    report: Report,
    cases: Sequence[Prefill],
    args: argparse.Namespace,
    budget: Budget,
    lowering: Lowering | None,
) -> None:
    """Adds all rows that are made with JAX, as long as there is time."""
    import jax

    from benchmarks import device_time

    quick_cpu = args.quick and jax.default_backend() != "gpu"
    chains = chains_of(cases, quick_cpu)
    report.expect(chains)
    with device_time.CompileAhead(
        chains, args.variants, lowering=lowering, beside={c.name: beside(c) for c in cases}
    ) as compiled:
        for case in cases:
            if not budget.enough():
                return
            with budget.case():
                programs = {i: compiled.take((c, i)) for c, i in chains if c == case.name}
                _run_case(report, case, calls_of(case, quick_cpu), programs)
            report.save()


def _run_case(report: Report, case: Prefill, calls: int, programs: dict[str, Any]) -> None:
    """Adds the rows of one case; compiled programs by implementation."""
    import jax.numpy as jnp

    from benchmarks import device_time
    from benchmarks.attention_reference import rows_program, worst_row_error
    from benchmarks.gemm_impls import mode

    pages = Pages.shuffled(case.contexts)
    shapes = checked, pool, _ = shapes_of(case)
    arrays = device_time.random_arrays(pool, jnp.bfloat16, 2 * calls)
    pools = list(zip(arrays[::2], arrays[1::2], strict=True))
    (q,) = device_time.random_arrays((case.tokens, *checked[1:]), jnp.bfloat16, 1)
    index = tuple(jnp.asarray(x) for x in (case.starts, case.counts, case.contexts))
    carried = (q, jnp.asarray(pages.table), index)
    tokens = case.sample()
    owner, seen = case.owners(tokens)
    table = jnp.asarray(pages.table[owner])
    rows = rows_program(*shapes, SCALE)
    want = np.asarray(rows(q[tokens], *pools[0], table, jnp.asarray(seen)))
    del arrays
    for impl, program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            out = program.first_output(carried, pools)
            error = worst_row_error(getattr(out, "out", out)[tokens], want)
            del out
            if not error <= MAX_REL_ERR:
                raise RuntimeError(f"relative error {error:.2e} > {MAX_REL_ERR:.0e}")
            timing = device_time.measure(program, carried, pools)
            report.add(
                case.name,
                impl,
                timing.samples,
                "us",
                nbytes=case.nbytes,
                flops=case.flops,
                rel_err=error,
                mode=mode(impl, timing.launch),
            )
        except Exception as error:  # one case must not cost the others
            report.fail(case.name, impl, error)


def summarise(rows: Sequence[dict[str, Any]], of: int | None = None) -> dict[str, Any]:
    """The summary's numbers, `of` so many cases; adds `tflops` to the rows."""
    for row in rows:
        if row["status"] == "ok" and row.get("us") and row["flops"]:
            row["tflops"] = row["flops"] / row["us"] / 1e6
    summary: dict[str, Any] = {}
    best = speedups(rows, OURS, PEERS)
    put(summary, "geomean_vs_best_peer", best, low="min_vs_best_peer", of=of)
    for peer in PEERS:
        put(summary, f"geomean_vs_{peer}", speedups(rows, OURS, [peer]))
    summary["cases_with_a_peer"] = len(best)
    return summary


def run_peers(
    report: Report, cases: Sequence[Prefill], args: argparse.Namespace, budget: Budget
) -> None:
    """Adds the rows of torch and FlashInfer."""
    limit = {"timeout_s": args.peer_seconds, "budget": budget}
    single = [case.name for case in cases if torch_attention.applies(case)]
    if single:
        expected = [(n, impl) for n in single for impl in torch_attention.impls("prefill")]
        options = ["--kind", "prefill", "--cases", *single]
        run_peer(report, "torch_attention", options, expected, **limit, share=1 / 3)
    names = [case.name for case in cases]
    options = ["--kind", "prefill", "--cases", *names]
    if args.flashinfer_modes:
        options += ["--modes", *args.flashinfer_modes]
    run_peer(report, "flashinfer_attention", options, [(n, "flashinfer") for n in names], **limit)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill_attention")
    add_arguments(parser)
    add_variants(parser)
    add_bounds(parser)
    add_lowering(parser)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names or their beginnings")
    parser.add_argument("--no-peers", action="store_true", help="no torch, no FlashInfer")
    parser.add_argument("--flashinfer-modes", nargs="+", help="see the baseline's --modes")
    args = parser.parse_args()
    budget = Budget(args.seconds)
    report = Report(
        "prefill_attention",
        "How fast is attention of prompt chunks over paged KV, against the best of its peers?",
        out=args.out,
    )
    known = QUICK_PREFILL if args.quick else PREFILL
    chosen = select(known, args.cases)
    cases = planned(report, args, chosen, known, order_named=args.cases is not None)
    if args.lower_for is not None:
        sys.exit(fill(args, chains_of(cases, quick_cpu=False)))
    report.summarise = lambda rows: summarise(rows, len(report.cases))
    report.expect((case.name, OURS) for case in cases)
    with start_lowering(args, budget, lambda: chains_of(cases, quick_cpu=False)) as lowering:
        if cases and not args.no_peers:  # first, while the device's memory is all free
            run_peers(report, cases, args, budget)
        if cases and budget.enough():
            run_ours(report, cases, args, budget, lowering)
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
