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
from collections.abc import Callable, Sequence
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
from benchmarks.baselines import torch_attention
from benchmarks.options import add_variants
from benchmarks.peers import run_peer
from benchmarks.ratios import put, speedups
from benchmarks.report import Report, add_arguments

OURS = "jpd"
PEERS = ("torch_cudnn", "torch_sdpa", "flashinfer")
SCALE = HEAD_SIZE**-0.5


def chain(case: Prefill, impl: str, calls: int) -> Any:
    """The program of one case: our kernel, or "xla", jpd's own XLA implementation."""
    from contextlib import nullcontext

    import jax
    import jax.numpy as jnp

    from benchmarks.device_time import Chain
    from benchmarks.gemm_impls import interpreted

    scope: Any = nullcontext
    if impl == OURS:
        from pallas_kernels.prefill_attention import prefill_attention
        from pallas_kernels.workspace import workspace

        options, scope = {"scale": SCALE, **interpreted()}, workspace
        op = lambda *args: prefill_attention(*args, **options)  # noqa: E731
    else:
        from jpd.ops.attention import prefill_attention_xla

        op = jax.jit(lambda *args: prefill_attention_xla(*args, scale=SCALE))
    pages = Pages.shuffled(case.contexts)
    spec = jax.ShapeDtypeStruct
    index = spec((len(case.chunks),), jnp.int32)
    carried = (
        spec((case.tokens, case.q_heads, HEAD_SIZE), jnp.bfloat16),
        spec(pages.table.shape, jnp.int32),
        (index, index, index),
    )
    pool = spec((pages.count, PAGE_TOKENS, case.kv_heads, HEAD_SIZE), jnp.bfloat16)

    def call(carried: Any, kv: Any) -> Any:
        q, table, chunks = carried
        return op(q, *kv, table, *chunks)

    return Chain(call, carried, (pool, pool), calls, scope)


def run_ours(report: Report, cases: list[Prefill], quick: bool, variants: Sequence[str]) -> None:
    """Adds all rows that are made with JAX."""
    import jax
    import jax.numpy as jnp

    from benchmarks import device_time
    from benchmarks.attention_reference import paged_rows, worst_row_error
    from benchmarks.gemm_impls import mode

    quick_cpu = quick and jax.default_backend() != "gpu"
    calls = {c.name: 1 if quick_cpu else device_time.rotations(c.kv_bytes, least=4) for c in cases}
    chains: dict[Any, Callable[[], Any]] = {}
    for case in cases:
        for impl in (OURS, "xla") if quick_cpu else (OURS,):
            chains[case.name, impl] = lambda c=case, i=impl: chain(c, i, calls[c.name])
    compiled = device_time.compile_chains(chains, variants)
    for case in cases:
        pages = Pages.shuffled(case.contexts)
        shape = (pages.count, PAGE_TOKENS, case.kv_heads, HEAD_SIZE)
        arrays = device_time.random_arrays(shape, jnp.bfloat16, 2 * calls[case.name])
        pools = list(zip(arrays[::2], arrays[1::2], strict=True))
        query = (case.tokens, case.q_heads, HEAD_SIZE)
        (q,) = device_time.random_arrays(query, jnp.bfloat16, 1)
        index = tuple(jnp.asarray(x) for x in (case.starts, case.counts, case.contexts))
        carried = (q, jnp.asarray(pages.table), index)
        tokens = case.sample()
        owner, seen = case.owners(tokens)
        table = jnp.asarray(pages.table[owner])
        want = np.asarray(paged_rows(q[tokens], *pools[0], table, jnp.asarray(seen), scale=SCALE))
        del arrays
        for (name, impl), program in compiled.items():
            if name != case.name:
                continue
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
                    name,
                    impl,
                    timing.samples,
                    "us",
                    nbytes=case.nbytes,
                    flops=case.flops,
                    rel_err=error,
                    mode=mode(impl, timing.launch),
                )
            except Exception as error:  # one case must not cost the others
                report.fail(name, impl, error)
        del pools


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary's numbers; adds `tflops` to the rows."""
    for row in rows:
        if row["status"] == "ok" and row.get("us") and row["flops"]:
            row["tflops"] = row["flops"] / row["us"] / 1e6
    summary: dict[str, Any] = {}
    best = speedups(rows, OURS, PEERS)
    put(summary, "geomean_vs_best_peer", best, low="min_vs_best_peer")
    for peer in PEERS:
        put(summary, f"geomean_vs_{peer}", speedups(rows, OURS, [peer]))
    summary["cases_with_a_peer"] = len(best)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill_attention")
    add_arguments(parser)
    add_variants(parser)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names or their beginnings")
    parser.add_argument("--no-peers", action="store_true", help="no torch, no FlashInfer")
    parser.add_argument("--flashinfer-modes", nargs="+", help="see the baseline's --modes")
    args = parser.parse_args()
    cases = select(QUICK_PREFILL if args.quick else PREFILL, args.cases)
    report = Report(
        "prefill_attention",
        "How fast is attention of prompt chunks over paged KV, against the best of its peers?",
        out=args.out,
    )
    if not args.no_peers:  # first, while the device's memory is all free
        single = [case.name for case in cases if torch_attention.applies(case)]
        if single:
            expected = [(n, impl) for n in single for impl in torch_attention.impls("prefill")]
            options = ["--kind", "prefill", "--cases", *single]
            run_peer(report, "torch_attention", options, expected)
        names = [case.name for case in cases]
        options = ["--kind", "prefill", "--cases", *names]
        if args.flashinfer_modes:
            options += ["--modes", *args.flashinfer_modes]
        run_peer(report, "flashinfer_attention", options, [(n, "flashinfer") for n in names])
    run_ours(report, cases, args.quick, args.variants)
    report.summary |= summarise(report.rows)
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
