"""How far are the simulator's TTFT and TPOT from those of the engine that it simulates?

The engine, in a process of its own, serves one workload at three rates, open loop. Its steps are
measured at the middle rate and a latency model is fitted to them; then all three rates are
simulated, with the same requests at the same times. `ttft_error_pct` and `tpot_error_pct` are
|simulated mean / measured mean - 1|; the summary has the largest of each (`..._max`), and how far
the fitted model is from the steps that it was fitted to (`..._fit_error_pct`: mean and 95th
percentile).

The steps are written beside the results (`step_times_*.json`), for `jpd simulate --step-times`. The
file is written after each topology; `--merge FILE ...` keeps those of earlier runs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import options, topologies
from benchmarks.report import Report, add_arguments
from benchmarks.stopping import end_on_sigterm, say
from jpd import AsyncLLM
from jpd.bench import client, slo, traces
from jpd.bench.slo import RequestRecord
from jpd.bench.workload import Workload
from jpd.config import EngineConfig
from jpd.simulate import engine
from jpd.simulate.fit import Fit, StepTimes, fit
from jpd.simulate.record import Recorder
from jpd.simulate.run import simulate

RATES = {"llama31-8b": (4.0, 8.0, 12.0), "small": (8.0, 16.0, 32.0), "tiny": (2.0, 4.0, 6.0)}
"""Requests/s; the middle one is measured."""
KEPT_STEPS = 2000
"""Of each fit, in its file."""
MEASURES = ("ttft", "tpot", "e2el")


class Recorded:
    """In the engine's process: an engine, and what its steps take."""

    def __init__(self, **args: Any) -> None:
        self._llm = AsyncLLM(**args)
        self._recorder = Recorder(self._llm._engine)

    def config(self) -> EngineConfig:
        """Resolved."""
        return self._llm.config

    def serve(self, workload: Workload, seed: int) -> tuple[list[RequestRecord], StepTimes]:
        """Serves the workload; what became of its requests, and of the steps."""
        self._recorder.clear()
        chosen = client.ClientOptions(num_warmups=min(8, len(workload)), seed=seed)
        records = asyncio.run(client.run(self._llm, workload, chosen))
        source = f"steps at {workload.rate:.2f} requests/s, measured"
        return records, self._recorder.times(source)

    def close(self) -> None:
        """Ends the engine."""
        self._llm.close()


def add_case(
    report: Report,
    case: str,
    topology: str,
    real: Sequence[RequestRecord],
    simulated: Sequence[RequestRecord],
    fitted: Fit,
) -> None:
    """Adds both rows of one rate."""
    rows = {name: slo.summarize(r) for name, r in (("jpd", real), ("simulated", simulated))}
    errors = {
        f"{name}_error_pct": 100
        * abs(rows["simulated"][f"mean_{name}_ms"] / rows["jpd"][f"mean_{name}_ms"] - 1)
        for name in MEASURES
    }
    for phase in ("decode", "prompt"):
        found = getattr(fitted, phase)
        errors |= {
            f"{phase}_fit_error_pct": 100 * found.mean,
            f"{phase}_fit_error_p95_pct": 100 * found.p95,
        }
    shown = [f"{s}_{name}_ms" for name in MEASURES for s in ("mean", "p50", "p99")]
    for impl, found in rows.items():
        more = errors if impl == "simulated" else {"p99_lateness_ms": found["p99_lateness_ms"]}
        fields = {"topology": topology, **{key: found[key] for key in shown}, **more}
        if found["completed"] == found["num_prompts"]:
            report.add(case, impl, **fields)
        else:
            report.fail(case, impl, f"{found['failed']} failed, {found['truncated']} truncated")


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest errors, and those of the fits."""
    done = [row for row in rows if row["impl"] == "simulated" and row["status"] == "ok"]
    summary = {}
    for name in MEASURES:
        key = f"{name}_error_pct"
        if done:
            summary[f"{key}_max"] = max(row[key] for row in done)
    for row in done:
        fits = {key: value for key, value in row.items() if "_fit_error_" in key}
        summary |= {f"{row['topology']}_{key}": value for key, value in fits.items()}
    return summary


def measure(
    report: Report,
    model: str,
    name: str,
    workloads: Mapping[str, Workload],
    arguments: dict[str, Any],
) -> None:
    """Serves and simulates the workloads, by their cases, with one topology; adds its rows."""
    with topologies.EngineProcess(Recorded, arguments) as process:
        served = []
        for i, (case, workload) in enumerate(workloads.items()):
            served.append(process.call(Recorded.serve, workload, i))
            say(f"{case}: {len(workload)} requests served")
        config: EngineConfig = process.call(Recorded.config)
    times = served[1][1]
    fitted = fit(times)
    prepared = engine.prepare(config, 1 << 50, "the measured device")
    for (case, workload), (records, _) in zip(workloads.items(), served, strict=True):
        virtual = engine.build(prepared, fitted.model)
        simulated = simulate(workload, [virtual])
        virtual.close()
        add_case(report, case, name, records, simulated, fitted)
    kept = times.steps[:: -(-len(times.steps) // KEPT_STEPS)]
    file: Path = report.folder / f"step_times_{model}_{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    dataclasses.replace(times, steps=kept).write(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator_fidelity")
    add_arguments(parser)
    topologies.add_arguments(parser)
    choices = topologies.TOPOLOGIES
    parser.add_argument("--topologies", nargs="+", choices=choices, default=["chunked", "semi_pd"])
    parser.add_argument("--workload", choices=traces.NAMES, default="azure_conv")
    parser.add_argument("--rates", type=float, nargs=3, help="requests/s, rising [of the model]")
    parser.add_argument(
        "--point-seconds", type=float, default=20.0, help="of arrivals, a rate [20]"
    )
    options.add_merge_arguments(parser)
    args = parser.parse_args()
    end_on_sigterm()
    report = Report(
        "simulator_fidelity",
        "How far are the simulator's TTFT and TPOT from those of the engine that it simulates?",
        out=args.out,
    )
    report.summarise = summarise
    files = args.merge or [file for file in [report.path] if file.exists()]
    if files and (args.merge is not None or args.missing):
        report.merge(files)
    model, sizes = topologies.sizes(args, report.env)
    seconds = 4.0 if args.quick else args.point_seconds
    workloads = {
        rate: traces.make(
            args.workload,
            rate=rate,
            n=max(2, round(rate * seconds)),
            seed=i,
            max_total_tokens=sizes["max_model_len"],
        )
        for i, rate in enumerate(args.rates or RATES[model])
    }
    for name in args.topologies:
        cases = {f"{model} {name} {args.workload} {rate:g}/s": w for rate, w in workloads.items()}
        if args.missing and not any(map(report.lacks, cases)):
            continue
        say(f"{name}: starting {model}")
        arguments = topologies.engine_args(
            model, name, **sizes, enable_prefix_caching=False, compile_sampled_steps=False
        )
        try:
            measure(report, model, name, cases, arguments)
        except Exception as error:  # one topology must not cost the other
            report.fail(f"{model} {name} {args.workload}", "jpd", error)
        report.save()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
