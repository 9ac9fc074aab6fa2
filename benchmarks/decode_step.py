"""How long is one decode step, against Hugging Face and the memory bandwidth?

``jpd`` is the engine's own loop: plan, launch of the compiled step, commit of the step before it,
greedy tokens delivered. Its `ms` is the wall time of a whole run of steps divided by their number
(one sample a run), around the given context. ``hf_*`` come from
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
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.models import MODELS, case_name, decode_cost
from benchmarks.report import Report, add_arguments
from benchmarks.rows import bound_ms, load

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
HF_IMPLS = ("eager", "static_compile")


def run_baseline(report: Report, model: str, cases: list[tuple[int, int]], quick: bool) -> None:
    """Adds the rows of transformers, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hf.json"
        command = [sys.executable, "-m", "benchmarks.baselines.hf_decode", "--model", model]
        command += ["--tokens", str(TOKENS), "--json", str(file)]
        if quick:
            command += ["--device", "cpu", "--dtype", "float32"]
        command += ["--case", *(f"{b}:{c}:{impl}" for b, c in cases for impl in HF_IMPLS)]
        done = subprocess.run(command, check=False)
        if file.exists():
            report.extend(load(file)["rows"])
        else:
            for batch, context in cases:
                reason = f"the baseline exited with {done.returncode} and left no result"
                report.fail(case_name(model, batch, context), "hf", reason)


def run_model(report: Report, model: str, cases: list[tuple[int, int]], rate: float) -> None:
    """Adds jpd's rows for one model."""
    from benchmarks.dummy import dummy_engine
    from benchmarks.numerics import check_tokens
    from jpd import SamplingParams

    batches = tuple(sorted({b for b, _ in cases}))
    longest = max(c for _, c in cases) + TOKENS
    most = max(b * c for b, c in cases)
    engine = dummy_engine(
        model,
        max_model_len=longest,
        max_num_seqs=batches[-1],
        # All prompts of a case in one step, so that its sequences decode at the same length.
        max_num_batched_tokens=most,
        max_prefills_per_step=batches[-1],
        batch_buckets=batches,
        token_buckets=tuple(sorted({cases[0][1], most})),
        # The steps around a context read a little more than it: the same room as the static cache.
        context_buckets=tuple(c + TOKENS // 2 for c in sorted({c for _, c in cases})),
        num_pages=max(b * (-(-(c + TOKENS) // 16) + 1) for b, c in cases) + 1,
        enable_prefix_caching=False,
    )
    coordinator = engine.coordinator
    random = np.random.default_rng(0)
    vocab = engine.model_config.vocab_size

    def prompts(batch: int, length: int) -> list[list[int]]:
        return random.integers(0, vocab, (batch, length)).tolist()

    for batch, context in cases:
        name = case_name(model, batch, context)
        samples = []
        for run in range(6):
            start_length = context - TOKENS // 2 - WARMUP
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=TOKENS + WARMUP)
            outputs = [
                coordinator.add(f"{name}-{run}-{i}", None, ids, params)
                for i, ids in enumerate(prompts(batch, start_length))
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
            report.fail(name, "jpd", f"wrong tokens: {check}")
            continue
        cost = decode_cost(MODELS[model], batch, context)
        report.add(
            name,
            "jpd",
            samples[1:],  # the first run fills caches
            "ms",
            nbytes=cost.nbytes,
            flops=cost.flops,
            bound=bound_ms(cost.nbytes, cost.flops, bytes_per_s=rate),
            token_regret=check.regret,
            dtype_noise=check.noise,
            tokens_per_s=batch * 1e3 / float(np.median(samples[1:])),
        )
    report.summary[f"recompiles_{model}"] = engine.executor.compiled.recompiles


def summarise(report: Report, cases: dict[str, list[tuple[int, int]]], rate: float) -> None:
    """Fills the bounds of the baseline's rows and the summary."""
    for row in report.rows:
        if row["status"] == "ok" and row["pct_of_bound"] is None:
            bound = bound_ms(row["bytes"], row["flops"], bytes_per_s=rate)
            row["pct_of_bound"] = 100 * bound / row["ms"]
    report.summary["copy_bytes_per_s"] = rate
    for model, shapes in cases.items():
        prefix = "" if model in ("llama2-7b", "tiny") else f"{model}_"
        for batch, context in shapes:
            name = case_name(model, batch, context)
            ours = report.find(name, "jpd")
            if ours is None:
                continue
            report.summary[f"{prefix}ms_b{batch}"] = ours["ms"]
            report.summary[f"{prefix}pct_of_bound_b{batch}"] = ours["pct_of_bound"]
            for key, impl in (("eager", "hf_eager"), ("static", "hf_static_compile")):
                theirs = report.find(name, impl)
                if theirs is not None:
                    speedup = theirs["ms"] / ours["ms"]
                    report.summary[f"{prefix}speedup_vs_hf_{key}_b{batch}"] = speedup


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_step")
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=[*CASES], help="[all]")
    parser.add_argument("--no-baseline", action="store_true", help="do not run transformers")
    args = parser.parse_args()
    cases = QUICK_CASES if args.quick else CASES
    if args.models:
        cases = {model: CASES[model] for model in args.models}
    report = Report(
        "decode_step",
        "How long is one decode step, against Hugging Face and the memory bandwidth?",
        out=args.out,
    )
    if not args.no_baseline:  # first, while the device's memory is all free
        for model, shapes in cases.items():
            run_baseline(report, model, HF_CASES.get(model, shapes), args.quick)
    from benchmarks.device_time import copy_bytes_per_s

    rate = copy_bytes_per_s((1 << 26) if args.quick else (1 << 32))
    for model, shapes in cases.items():
        run_model(report, model, shapes, rate)
        gc.collect()
    summarise(report, cases, rate)
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
