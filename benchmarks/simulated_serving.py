"""How far is `jpd simulate` from a served run that it is not fitted to?

The requests of a stored `semi_pd_serving.json` are simulated again, at the same rates and with the
same engine sizes, on the latencies that `jpd.simulate.hardware` works out for an H200, of which
what shares do is fitted to single steps (`sm_share_surface.json`). That takes no GPU. Only
implementations that do not change are compared, since who steers the others may have changed after
the run. `ttft_error_pct`, `tpot_error_pct` and `e2el_error_pct` are 100 (simulated mean / measured
mean - 1); the summary has the largest and the mean of their sizes for each implementation, and the
capacity of the reference (requests/s, see `benchmarks/semi_pd_serving.py`) as simulated over that
measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import options, topologies
from benchmarks.readme import RESULTS
from benchmarks.report import Report, add_arguments
from benchmarks.semi_pd_serving import REFERENCE, second_half_per_s
from benchmarks.serving_impls import ENGINES, FIXED, parts
from jpd import checkpoint
from jpd.bench import slo, traces
from jpd.bench.slo import RequestRecord
from jpd.bench.workload import Workload
from jpd.config import EngineConfig
from jpd.parallel import Split
from jpd.simulate import engine, hardware
from jpd.simulate.run import simulate

COMPARED = [impl for impl in ENGINES if ENGINES[impl] == "unified" or impl in FIXED]
MEASURES = ("ttft", "tpot", "e2el")


def serve(model: str, impl: str, workload: Workload) -> list[RequestRecord]:
    """The requests in virtual time."""
    of, shares = parts(impl), FIXED.get(impl)
    changes: dict[str, Any] = dict(topologies.SIZES[model])
    if of.shortest:
        changes["scheduling_policy"] = "shortest"
    if of.mixed_tokens is not None:
        changes["max_num_mixed_tokens"] = of.mixed_tokens
    if shares is not None:
        changes["semi_pd"] = {"prefill_share": shares.prefill, "decode_share": shares.decode}
    name = of.plain if shares is None else "semi_pd"
    config = EngineConfig.from_kwargs(**topologies.engine_args(model, name, **changes))
    split = Split(checkpoint.read_config(Path(config.model)), 1)
    rank_bytes = checkpoint.param_bytes(split.rank_model, "bfloat16")
    latencies = hardware.arithmetic(split, rank_bytes, page_size=config.page_size)
    gpu = hardware.H200
    virtual = engine.build(engine.prepare(config, gpu.memory_bytes, gpu.name), latencies)
    records = simulate(workload, [virtual])
    virtual.close()
    return records


def capacity(model: str, name: str) -> float:
    """Requests/s of the reference when all come at once, as `semi_pd_serving.calibrate` has it."""
    sizes = topologies.SIZES[model]
    at_once, limit = 2 * sizes["max_num_seqs"], sizes["max_model_len"]
    # No two at one instant, which the simulator would take in any order.
    requests = traces.make(name, rate=1e6, n=at_once, seed=1, max_total_tokens=limit)
    ends = sorted(record.finished_s for record in serve(model, REFERENCE, requests))
    return second_half_per_s(ends[: at_once // 2])


def add_point(report: Report, model: str, measured: Mapping[str, Any]) -> None:
    """Simulates what a row was measured with, and adds how far it is."""
    workload, rate = measured["workload"], measured["rate"]
    limit = topologies.SIZES[model]["max_model_len"]
    requests = traces.make(
        workload,
        rate=rate,
        n=measured["num_prompts"],
        seed=measured["seed"],
        max_total_tokens=limit,
    )
    simulated = slo.summarize(serve(model, measured["impl"], requests))
    fields: dict[str, Any] = {"workload": workload, "rate": rate, "load": measured["load"]}
    for name in MEASURES:
        key = f"mean_{name}_ms"
        fields |= {key: simulated[key], f"measured_{key}": measured[key]}
        fields[f"{name}_error_pct"] = 100 * (simulated[key] / measured[key] - 1)
    report.add(measured["case"], measured["impl"], **fields)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sizes of the errors."""
    done = [row for row in rows if row["status"] == "ok"]
    summary: dict[str, Any] = {}
    for impl in COMPARED:
        for name in MEASURES:
            sizes = [abs(row[f"{name}_error_pct"]) for row in done if row["impl"] == impl]
            if sizes:
                summary[f"{impl}_{name}_error_pct_max"] = max(sizes)
                summary[f"{impl}_{name}_error_pct_mean"] = float(np.mean(sizes))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated_serving")
    add_arguments(parser)
    stored = RESULTS / "h200" / "semi_pd_serving.json"
    parser.add_argument(
        "file", nargs="?", type=options.stored, default=stored, help=f"[{stored.name}]"
    )
    args = parser.parse_args()
    served = json.loads(args.file.read_text())
    model, gpu = served["summary"].get("model"), served["env"]["gpu"]
    if model not in topologies.SIZES or gpu != "NVIDIA H200":
        parser.error(
            f"{args.file}: model {model!r} on {gpu!r}, not a semi_pd_serving.json of an H200"
        )
    report = Report(
        "simulated_serving",
        "How far is `jpd simulate` from a served run that it is not fitted to?",
        out=args.out,
        host_only=True,
    )
    ok = [row for row in served["rows"] if row["status"] == "ok"]
    capacities = {
        row["case"].split()[0]: row["capacity"] for row in ok if row.get("capacity") is not None
    }
    ratios = {name: capacity(model, name) / of_run for name, of_run in capacities.items()}
    run = {"run": f"{served['git']}, {gpu}, {served['date']}"}
    report.summarise = lambda rows: (
        run | summarise(rows) | {f"{name}_capacity_ratio": r for name, r in ratios.items()}
    )
    points = [row for row in ok if row["impl"] in COMPARED and "rate" in row]
    for row in points[:1] if args.quick else points:
        add_point(report, model, row)
    report.finish()


if __name__ == "__main__":
    main()
