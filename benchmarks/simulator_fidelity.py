"""How far are the simulator's TTFT and TPOT from those of the engine that it simulates?

The engine serves one workload at three rates, open loop. Its steps are measured at the middle rate
and a latency model is fitted to them; then all three rates are simulated, with the same requests at
the same times. `ttft_error_pct` and `tpot_error_pct` are |simulated mean / measured mean - 1|.

The steps are written beside the results (`step_times_*.json`), for `jpd simulate --step-times`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from typing import Any

from benchmarks import topologies
from benchmarks.dummy import dummy_folder
from benchmarks.report import Report, add_arguments
from jpd import AsyncLLM
from jpd.bench import client, slo, traces
from jpd.bench.slo import RequestRecord
from jpd.bench.workload import Workload
from jpd.config import EngineConfig
from jpd.simulate import engine
from jpd.simulate.fit import Fit, fit
from jpd.simulate.record import Recorder
from jpd.simulate.run import simulate

RATES = {"llama31-8b": (4.0, 8.0, 12.0), "tiny": (2.0, 4.0, 6.0)}
"""Requests/s; the middle one is measured."""
KEPT_STEPS = 2000
"""Of each fit, in its file."""


async def serve(
    llm: AsyncLLM, recorder: Recorder, workloads: list[Workload], measured: int
) -> tuple[list[list[RequestRecord]], Fit, Any]:
    """Serves every workload; fits to the steps of the one with this index."""
    records = []
    for i, workload in enumerate(workloads):
        options = client.ClientOptions(num_warmups=min(8, len(workload)), seed=i)
        recorder.clear()
        records.append(await client.run(llm, workload, options))
        if i == measured:
            times = recorder.times(f"steps at {workload.rate:.2f} requests/s, measured")
    return records, fit(times), times


def compare(
    report: Report,
    case: str,
    real: list[RequestRecord],
    simulated: list[RequestRecord],
) -> dict[str, float]:
    """Adds both rows; returns the errors in percent."""
    rows = {name: slo.summarize(r) for name, r in (("jpd", real), ("simulated", simulated))}
    errors = {
        f"{name}_error_pct": 100
        * abs(rows["simulated"][f"mean_{name}_ms"] / rows["jpd"][f"mean_{name}_ms"] - 1)
        for name in ("ttft", "tpot", "e2el")
    }
    shown = [f"{s}_{name}_ms" for name in ("ttft", "tpot", "e2el") for s in ("mean", "p50", "p99")]
    for impl, found in rows.items():
        more = errors if impl == "simulated" else {"p99_lateness_ms": found["p99_lateness_ms"]}
        if found["completed"] == found["num_prompts"]:
            report.add(case, impl, **{key: found[key] for key in shown}, **more)
        else:
            report.fail(case, impl, f"{found['failed']} failed, {found['truncated']} truncated")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator_fidelity")
    add_arguments(parser)
    topologies.add_arguments(parser)
    choices = topologies.TOPOLOGIES
    parser.add_argument("--topologies", nargs="+", choices=choices, default=["chunked", "semi_pd"])
    parser.add_argument("--workload", choices=traces.NAMES, default="azure_conv")
    parser.add_argument("--rates", type=float, nargs=3, help="requests/s, rising [of the model]")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, a rate [20]")
    args = parser.parse_args()
    model, sizes = topologies.sizes(args)
    seconds = 4.0 if args.quick else args.seconds
    rates = args.rates or RATES[model]
    report = Report(
        "simulator_fidelity",
        "How far are the simulator's TTFT and TPOT from those of the engine that it simulates?",
        out=args.out,
    )
    folder = str(dummy_folder(model))
    workloads = [
        traces.make(
            args.workload,
            rate=rate,
            n=max(2, round(rate * seconds)),
            seed=i,
            max_total_tokens=sizes["max_model_len"],
        )
        for i, rate in enumerate(rates)
    ]
    worst: dict[str, float] = {}
    for name in args.topologies:
        llm = AsyncLLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            **sizes,
            **topologies.TOPOLOGIES[name],
        )
        try:
            recorder = Recorder(llm._engine)
            real, fitted, times = asyncio.run(serve(llm, recorder, workloads, measured=1))
            config: EngineConfig = llm.config
        finally:
            llm.close()
        prepared = engine.prepare(config, 1 << 50, "the measured device")
        for workload, rate, records in zip(workloads, rates, real, strict=True):
            virtual = engine.build(prepared, fitted.model)
            simulated = simulate(workload, [virtual])
            virtual.close()
            case = f"{model} {name} {args.workload} {rate:g}/s"
            for key, error in compare(report, case, records, simulated).items():
                worst[key] = max(worst.get(key, 0.0), error)
        for phase in ("decode", "prompt"):
            found = getattr(fitted, phase)
            report.summary[f"{name}_{phase}_fit_error_pct"] = 100 * found.mean
            report.summary[f"{name}_{phase}_fit_error_p95_pct"] = 100 * found.p95
        kept = times.steps[:: -(-len(times.steps) // KEPT_STEPS)]
        report.folder.mkdir(parents=True, exist_ok=True)
        dataclasses.replace(times, steps=kept).write(
            report.folder / f"step_times_{model}_{name}.json"
        )
    report.summary |= {f"{key}_max": error for key, error in worst.items()}
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
