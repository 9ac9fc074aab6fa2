"""How long is one decode step, against Hugging Face and the memory bandwidth?

``jpd`` is the engine's own loop: plan, launch of the compiled step, commit of the step before it,
greedy tokens delivered. Its `ms` is the wall time of a whole run of steps divided by their number
(one sample a run), around the given context. ``jpd_xla`` is the same engine with XLA's
implementation of every op, in place of the kernels. ``hf_*`` come from
`benchmarks/baselines/hf_decode.py`, which runs first, in a process of its own; their `ms` is the
median of CUDA event times, which leaves out more than jpd's wall time does.

The tokens of the last timed run (first and last sequence of the batch) are held against a float32
pass: `token_regret` and `dtype_noise` are explained in `benchmarks/numerics.py`; a case with wrong
tokens fails. `rel_err` of the ``hf_*`` rows is that of their logits.
The bound is the bytes of weights and KV over the rate of a large device copy, measured here.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from benchmarks.budget import Budget, spread
from benchmarks.models import MODELS, case_name, decode_cost
from benchmarks.options import add_bounds, planned
from benchmarks.peers import run_peer
from benchmarks.report import Report, add_arguments
from benchmarks.rows import bound_ms

if TYPE_CHECKING:
    from jpd.engine.shapes import ShapeTable, StepShape

WARMUP = 4
TOKENS = 32
CASES = {
    "llama2-7b": [(1, 512), (8, 512), (32, 1024)],
    "llama31-8b": [(1, 512), (8, 512), (32, 1024)],
}
QUICK_CASES = {"tiny": [(1, 128), (4, 128)]}
HF_CASES = {  # each compilation takes half a minute
    "llama2-7b": [(1, 512), (32, 1024)],
    "llama31-8b": [(1, 512)],
}
HF_IMPLS = {"eager": "eager", "static": "static_compile"}
XLA_OPS = (
    "linear",
    "gated_linear",
    "rms_norm",
    "rope_write",
    "decode_attention",
    "prefill_attention",
)
ENGINES: dict[str, dict[str, str]] = {"jpd": {}, "jpd_xla": dict.fromkeys(XLA_OPS, "xla")}
"""Implementations of ops that the engines choose."""
RUNS = 13
Shape = tuple[int, int]
"""Batch and context."""


def parse_shape(text: str) -> Shape:
    """Reads B:CONTEXT, for `argparse`.

    Raises:
        ArgumentTypeError: it is something else, or the context leaves no room for a prompt.
    """
    try:
        batch, context = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not BATCH:CONTEXT: {text!r}") from None
    least = TOKENS // 2 + WARMUP + 1
    if batch < 1 or context < least:
        raise argparse.ArgumentTypeError(
            f"BATCH must be at least 1 and CONTEXT {least}, got {text!r}"
        )
    return batch, context


def run_baseline(
    report: Report,
    model: str,
    cases: Sequence[Shape],
    impls: Sequence[str],
    *,
    on_cpu: bool,
    timeout_s: float,
    budget: Budget,
    share: float,
) -> None:
    """Adds the rows of transformers, measured in a process of its own."""
    keys = [(b, c, impl) for b, c in cases for impl in impls]
    if not keys:
        return
    options = ["--model", model, "--tokens", str(TOKENS)]
    if on_cpu:
        options += ["--device", "cpu", "--dtype", "float32"]
    options += ["--case", *(f"{b}:{c}:{impl}" for b, c, impl in keys)]
    expected = [(case_name(model, b, c), f"hf_{impl}") for b, c, impl in keys]
    limit = {"timeout_s": timeout_s, "budget": budget, "share": share}
    run_peer(report, "hf_decode", options, expected, **limit)


def shapes_of(table: ShapeTable, cases: Sequence[Shape]) -> list[StepShape]:
    """The steps that the cases take: the prompts' and those of the tokens after them."""
    shapes = set()
    for batch, context in cases:
        start = start_length(context)
        shapes.add(table.pick(0, batch * start, start, False))
        shapes |= {table.pick(batch, 0, start + i, True) for i in range(WARMUP + TOKENS + 1)}
    return sorted(shapes, reverse=True)


def start_length(context: int) -> int:
    """Tokens of the prompts of a case, so that the timed steps lie around its context."""
    return context - TOKENS // 2 - WARMUP


def run_model(
    report: Report,
    model: str,
    impl: str,
    cases: Sequence[Shape],
    rate: float,
    budget: Budget,
    *,
    self_check: bool = True,
) -> float:
    """Adds an engine's rows for one model, as long as there is time; returns what it took, in s.

    An engine that is not built is failed rows.
    """
    from benchmarks.dummy import dummy_engine
    from jpd.config import KernelConfig
    from jpd.engine.shapes import ShapeTable

    batches = tuple(sorted({b for b, _ in cases}))
    longest = max(c for _, c in cases) + TOKENS
    most = max(b * c for b, c in cases)
    start = time.perf_counter()
    try:
        # Time on a GPU is scarce: steps that are not measured, such as those that sample, are not
        # compiled. One that was forgotten is compiled by the warm-up, and the summary counts it.
        with mock.patch.object(ShapeTable, "all", lambda table: shapes_of(table, cases)):
            engine = dummy_engine(
                model,
                max_model_len=longest,
                max_num_seqs=batches[-1],
                # All prompts of a case in one step: its sequences decode at the same length.
                max_num_batched_tokens=most,
                max_prefills_per_step=batches[-1],
                batch_buckets=batches,
                token_buckets=tuple(sorted({cases[0][1], most})),
                # The steps around a context read a little more than it: the static cache's room.
                context_buckets=tuple(c + TOKENS // 2 for c in sorted({c for _, c in cases})),
                num_pages=max(b * (-(-(c + TOKENS) // 16) + 1) for b, c in cases) + 1,
                enable_prefix_caching=False,
                kernels=KernelConfig(self_check=self_check, **ENGINES[impl]),
            )
    except Exception as error:  # one model must not cost the others
        for batch, context in cases:
            report.fail(case_name(model, batch, context), impl, error)
        report.save()
        return time.perf_counter() - start
    build_s = time.perf_counter() - start
    for batch, context in cases:
        if not budget.enough():
            break
        with budget.case():
            _run_case(report, engine, impl, model, batch, context, rate, self_check)
        report.summary[recompiles_key(model, impl)] = engine.executor.compiled.recompiles
        report.save()
    return build_s


def recompiles_key(model: str, impl: str) -> str:
    """Of the summary: steps that an engine compiled while it was measured."""
    return f"recompiles_{model}" + ("" if impl == "jpd" else f"_{impl}")


def _run_case(
    report: Report,
    engine: Any,
    impl: str,
    model: str,
    batch: int,
    context: int,
    rate: float,
    self_check: bool,
) -> None:
    """Adds the row of one case."""
    from benchmarks.numerics import check_tokens
    from jpd import SamplingParams

    coordinator = engine.coordinator
    random = np.random.default_rng(0)
    vocab = engine.model_config.vocab_size

    def prompts(batch: int, length: int) -> list[list[int]]:
        return random.integers(0, vocab, (batch, length)).tolist()

    name = case_name(model, batch, context)
    samples = []
    for run in range(RUNS):
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=TOKENS + WARMUP)
        outputs = [
            coordinator.add(f"{name}-{run}-{i}", None, ids, params)
            for i, ids in enumerate(prompts(batch, start_length(context)))
        ]
        while int(coordinator.scheduler.table.decoding.sum()) < batch:
            coordinator.step()
        for _ in range(WARMUP - 2):
            coordinator.step()
        steps, start = TOKENS - 2, time.perf_counter()
        for _ in range(steps):
            deltas = coordinator.step()
            assert len(deltas) == batch, (name, len(deltas))
        samples.append((time.perf_counter() - start) * 1e3 / steps)
        while coordinator.has_work:
            coordinator.step()
    check = check_tokens(
        engine,
        [(o.prompt_token_ids, o.outputs[0].token_ids) for o in (outputs[0], outputs[-1])],
    )
    gc.collect()
    if not check.ok:
        report.fail(name, impl, f"wrong tokens: {check}")
        return
    cost = decode_cost(MODELS[model], batch, context)
    report.add(
        name,
        impl,
        samples[1:],  # the first run fills caches
        "ms",
        nbytes=cost.nbytes,
        flops=cost.flops,
        bound=bound_ms(cost.nbytes, cost.flops, bytes_per_s=rate),
        token_regret=check.regret,
        dtype_noise=check.noise,
        tokens_per_s=batch * 1e3 / float(np.median(samples[1:])),
        **({} if self_check else {"self_check": "skipped"}),
    )


def summarise(
    rows: Sequence[dict[str, Any]], cases: Mapping[str, Sequence[Shape]], rate: float | None
) -> dict[str, Any]:
    """The summary's numbers; fills the bounds of the baseline's rows, if the rate is known."""
    measured = {(row["case"], row["impl"]): row for row in rows if row["status"] == "ok"}
    for row in measured.values():
        if rate is not None and row["pct_of_bound"] is None:
            bound = bound_ms(row["bytes"], row["flops"], bytes_per_s=rate)
            row["pct_of_bound"] = 100 * bound / row["ms"]
    summary: dict[str, Any] = {}
    for model, shapes in cases.items():
        prefix = "" if model in ("llama2-7b", "tiny") else f"{model}_"
        for batch, context in shapes:
            name = case_name(model, batch, context)
            ours = measured.get((name, "jpd"))
            if ours is None:
                continue
            key = f"b{batch}"
            if next(shape for shape in shapes if shape[0] == batch) != (batch, context):
                key += f"_s{context}"  # the benchmark's own case has the short name
            summary[f"{prefix}ms_{key}"] = ours["ms"]
            summary[f"{prefix}pct_of_bound_{key}"] = ours["pct_of_bound"]
            peers = {f"hf_{word}": f"hf_{impl}" for word, impl in HF_IMPLS.items()}
            for word, impl in (peers | {"xla": "jpd_xla"}).items():
                theirs = measured.get((name, impl))
                if theirs is not None:
                    speedup = theirs["ms"] / ours["ms"]
                    summary[f"{prefix}speedup_vs_{word}_{key}"] = speedup
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_step")
    add_arguments(parser)
    add_bounds(parser)
    parser.add_argument("--models", nargs="+", choices=[*CASES], help="[all]")
    parser.add_argument(
        "--cases", nargs="+", type=parse_shape, metavar="B:CONTEXT", help="of every model [its own]"
    )
    parser.add_argument(
        "--hf",
        nargs="+",
        choices=[*HF_IMPLS, "none"],
        default=[*HF_IMPLS],
        help="which runs of transformers, with --cases for each of them [all]",
    )
    parser.add_argument(
        "--engines", nargs="+", choices=[*ENGINES], default=[*ENGINES], help="of jpd [all]"
    )
    parser.add_argument(
        "--no-self-check",
        action="store_true",
        help="skip the engine's comparison of its kernels at start; rows say so",
    )
    args = parser.parse_args()
    if "none" in args.hf and len(args.hf) > 1:
        parser.error(f"--hf none goes with nothing else, got {args.hf}")
    budget = Budget(args.seconds)
    known = QUICK_CASES if args.quick else CASES
    models = args.models or [*known]
    shapes = {model: args.cases or (known | CASES)[model] for model in models}
    report = Report(
        "decode_step",
        "How long is one decode step, against Hugging Face and the memory bandwidth?",
        out=args.out,
    )
    everything = [(model, *shape) for model in known for shape in known[model]]
    ordered = {model: args.cases or spread(some) for model, some in shapes.items()}
    chosen = [(model, *shape) for model in models for shape in ordered[model]]
    cases = planned(
        report,
        args,
        chosen,
        everything,
        name=lambda key: case_name(*key),
        order_named=True,
        once=("copy_bytes_per_s", *(recompiles_key(m, impl) for m in MODELS for impl in ENGINES)),
    )
    counted = {model: list(dict.fromkeys(known.get(model, []))) for model in known}
    for model, *shape in chosen:
        if tuple(shape) not in counted.setdefault(model, []):
            counted[model].append((shape[0], shape[1]))
    report.summarise = lambda rows: summarise(rows, counted, report.summary.get("copy_bytes_per_s"))
    report.expect((case_name(*case), impl) for case in cases for impl in args.engines)
    todo = {m: [(b, c) for model, b, c in cases if model == m] for m in models}
    todo = {model: some for model, some in todo.items() if some}
    impls = [] if "none" in args.hf else [HF_IMPLS[word] for word in args.hf]
    for place, (model, some) in enumerate(todo.items()):  # while the device's memory is all free
        least = some if args.cases else HF_CASES.get(model, some)
        run_baseline(
            report,
            model,
            [shape for shape in some if shape in least],
            impls,
            on_cpu=args.quick,
            timeout_s=args.peer_seconds,
            budget=budget,
            share=0.6 / (len(todo) - place),
        )
    if todo and budget.enough():
        from benchmarks.device_time import copy_bytes_per_s

        rate = copy_bytes_per_s((1 << 26) if args.quick else (1 << 32))
        report.summary["copy_bytes_per_s"] = rate
        build_s, check = 0.0, not args.no_self_check
        for model, some in todo.items():
            for impl in args.engines:
                if budget.left_s > build_s:
                    build_s = run_model(report, model, impl, some, rate, budget, self_check=check)
                    gc.collect()  # one engine's memory goes before the next one's comes
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
