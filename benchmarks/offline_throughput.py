"""How many tokens per second for many requests at once, and how long does the GPU idle?

256 requests with the lengths of the Azure 2023 conversation trace, all queued at the start, random
token ids, greedy, end of sequence ignored, prefix cache off (the prompts share nothing).

`tokens_per_s` counts generated tokens, `total_tokens_per_s` prompt tokens too, over the time from
the first step to the last token. In the middle of a second run of the same requests, when the queue
is worked off, a window of steps is traced: `gpu_idle_share` is the time in which no kernel and no
copy ran on the GPU, between the first and the last of them, over that span. It includes gaps inside
steps, so it bounds the idle time between steps from above.
"""

from __future__ import annotations

import argparse
import glob
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks.dummy import dummy_engine
from benchmarks.numerics import check_tokens
from benchmarks.report import Report, add_arguments
from benchmarks.workloads import azure_conv
from jpd import SamplingParams

MAX_MODEL_LEN = 4096


def idle_share(trace_folder: str) -> dict[str, float]:
    """Share of the traced span in which the GPU ran nothing, and the span in seconds."""
    (file,) = glob.glob(f"{trace_folder}/**/*.xplane.pb", recursive=True)
    spans = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in jax.profiler.ProfileData.from_file(file).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    if not spans:
        raise RuntimeError("the trace holds no GPU event")
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - spans[0][0]
    return {"gpu_idle_share": 1 - busy / span, "traced_s": span / 1e9, "events": len(spans)}


def trace_idle(report: Report, coordinator, case: str, steps: int) -> None:
    """Traces the next steps and adds their idle time; a trace that fails is a failed row."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(steps):
                    coordinator.step()
            idle = idle_share(folder)
    except Exception as error:
        report.fail(case, "jpd", error)
        return
    report.add(case, "jpd", **idle)
    report.summary["gpu_idle_share"] = idle["gpu_idle_share"]


def queue_all(coordinator, requests, vocab: int, run: int) -> list:
    """Adds every request of the workload; returns their outputs."""
    random = np.random.default_rng(run)
    return [
        coordinator.add(
            f"{run}-{i}",
            None,
            random.integers(0, vocab, r.prompt_tokens).tolist(),
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=r.output_tokens),
        )
        for i, r in enumerate(requests)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline_throughput")
    add_arguments(parser)
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--trace-steps", type=int, default=60)
    args = parser.parse_args()
    model, count, rows = args.model, args.requests, args.max_num_seqs
    max_len = MAX_MODEL_LEN
    if args.quick:
        model, count, rows, max_len = "tiny", 16, 8, 1024
    report = Report(
        "offline_throughput",
        "How many tokens per second for many requests at once, and how long does the GPU idle?",
        out=args.out,
    )
    workload = azure_conv(count, max_total=max_len)
    engine = dummy_engine(
        model,
        max_model_len=max_len,
        max_num_seqs=rows,
        max_num_batched_tokens=min(2048, max_len),
        batch_buckets=tuple(b for b in (8, 32, 64, 128, 256) if b <= rows),
        token_buckets=(min(512, max_len), min(2048, max_len)),
        context_buckets=tuple(c for c in (1024, 2048, 4096) if c <= max_len),
        enable_prefix_caching=False,
    )
    coordinator, case = engine.coordinator, f"{model} azure_conv n={count}"

    outputs = queue_all(coordinator, workload.requests, engine.model_config.vocab_size, 0)
    step_ms, start = [], time.perf_counter()
    while coordinator.has_work:
        begin = time.perf_counter()
        coordinator.step()
        step_ms.append((time.perf_counter() - begin) * 1e3)
    wall_s = time.perf_counter() - start
    assert all(o.finished for o in outputs)
    generated = sum(len(o.outputs[0].token_ids) for o in outputs)
    prompt = sum(r.prompt_tokens for r in workload.requests)
    assert generated == sum(r.output_tokens for r in workload.requests)
    stats = coordinator.stats()
    # The two shortest: the float32 pass over a long one takes gigabytes.
    shortest = sorted(outputs, key=lambda o: len(o.prompt_token_ids))[:2]
    check = check_tokens(engine, [(o.prompt_token_ids, o.outputs[0].token_ids) for o in shortest])
    results = {
        "tokens_per_s": generated / wall_s,
        "total_tokens_per_s": (generated + prompt) / wall_s,
        "wall_s": wall_s,
        "prompt_tokens": prompt,
        "generated_tokens": generated,
        "left_out": workload.left_out,
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "recompiles": stats.recompiles,
        "num_pages": engine.config.num_pages,
        "token_regret": check.regret,
        "dtype_noise": check.noise,
    }
    if check.ok:
        report.add(case, "jpd", step_ms, "ms", **results)
    else:
        report.fail(case, "jpd", f"wrong tokens: {check}")
    report.summary |= {k: results[k] for k in ("tokens_per_s", "total_tokens_per_s", "wall_s")}

    if jax.devices()[0].platform == "cpu":
        print("no GPU here: its idle time is not traced")
    else:
        window = min(args.trace_steps, len(step_ms) // 4)
        # The same requests again, up to where the queue is worked off.
        queue_all(coordinator, workload.requests, engine.model_config.vocab_size, 1)
        for _ in range(len(step_ms) // 3):
            coordinator.step()
        trace_idle(report, coordinator, f"{case}, {window} steps traced", window)
    coordinator.close()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
