"""The command `jpd simulate`: options, what it computes, what it shows.

How many engines of two GPUs each keep 90 % of 40 requests a second below 0.5 s and 50 ms a token:

    jpd simulate FOLDER --rate 40 --tensor-parallel-size 2 --most-replicas 16 --ttft-slo-s 0.5
        --tpot-slo-s 0.05

The same with `--tensor-parallel-size 4`, or another `--topology`, says which needs fewer GPUs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jpd
from jpd.bench import report, slo, traces, workload
from jpd.config import EngineConfig, SemiPDConfig, require
from jpd.errors import ConfigError

if TYPE_CHECKING:  # importing them takes seconds, and the command line needs the options only
    from jpd.engine.build import Prepared
    from jpd.simulate.engine import SimulatedEngine
    from jpd.simulate.fit import Fit

_ALONE = 20
"""Requests that are sent one at a time for the unloaded latency."""
_PASSES = 0.9
"""Joint attainment that is enough."""


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What is sent, and to what."""

    workload: Literal[traces.NAMES] = "azure_conv"
    """Arrivals and lengths, see `jpd.bench.traces`."""
    rate: float = 8.0
    """Requests a second, over all replicas."""
    num_prompts: int = 1000
    """Requests. They should come for much longer than one takes: a queue that would grow without
    end has to show."""
    replicas: int = 1
    """Engines, each on `tensor_parallel_size` GPUs of its own, and on twice as many with
    topology="disaggregated"."""
    most_replicas: int | None = None
    """Find how many are needed for 90 % joint SLO attainment: `replicas`, one more, ... up to so
    many are tried."""
    router: Literal["round_robin", "least_tokens"] = "round_robin"
    """Where a request goes: to the next one, or to the one with the fewest tokens to compute."""
    step_times: Path | None = None
    """Measured steps to fit the latencies to, as `benchmarks/simulator_fidelity.py` writes them, of
    an engine of the same `tensor_parallel_size`. When not given, latencies are arithmetic for
    H200s, not measured."""
    start_s: float = 15.0
    """Seconds until an executor that is not kept ready can serve."""
    ttft_slo_s: float | None = None
    """SLO of the time to the first token, together with `tpot_slo_s`. When not given, what
    `semi_pd.ttft_slo_s` and `semi_pd.tpot_slo_s` are, or else `slo_scale` says."""
    tpot_slo_s: float | None = None
    """SLO of the time per token after the first."""
    slo_scale: float = slo.TIGHT
    """SLO over the unloaded latency of the unified engine on as many GPUs as a phase has here. To
    compare numbers of GPUs give `ttft_slo_s` and `tpot_slo_s`."""

    def check(self) -> None:
        """Raises `ConfigError` for what is out of range."""
        for name, least in (("num_prompts", 2), ("replicas", 1)):
            value = getattr(self, name)
            require(value >= least, name, value, f"at least {least}")
        require(self.rate > 0, "rate", self.rate, "above 0")
        require(self.start_s >= 0, "start_s", self.start_s, "at least 0")
        require(self.slo_scale > 0, "slo_scale", self.slo_scale, "above 0")
        for name, other in (("ttft_slo_s", "tpot_slo_s"), ("tpot_slo_s", "ttft_slo_s")):
            value, with_it = getattr(self, name), getattr(self, other)
            require(value is None or value > 0, name, value, "above 0")
            ok = value is not None or with_it is None
            require(ok, name, value, f"a time, as {other}={with_it} is given")
        most, least = self.most_replicas, self.replicas
        ok = most is None or most >= least
        require(ok, "most_replicas", most, f"at least replicas={least}")


def run(config: EngineConfig, options: SimulateOptions) -> dict[str, Any]:
    """Simulates.

    Returns:
      What `slo.summarize` gives of the last number of replicas that was tried, with the fields of
      `Workload.describe` and `latency_model`, `slo` (seconds), `attainment`, `replicas`, `gpus`,
      `request_goodput` (requests/s that keep the SLO), `request_goodput_per_gpu`, `enough` (90 %
      keep the SLO), `tried` (attainment with each number of replicas), `engines` (counters of
      each), `times_real_time` (seconds simulated for one of this process), `config` and
      `environment`.

    Raises:
      ConfigError: an option, the configuration or the model's folder does not allow it.
    """
    from jpd.simulate import engine, hardware
    from jpd.simulate.run import simulate

    options.check()
    gpu = hardware.H200
    prepared = engine.prepare(config, gpu.memory_bytes, gpu.name)
    config = prepared.config
    fitted = _latencies(prepared, options)
    try:
        requests = traces.make(
            options.workload,
            rate=options.rate,
            n=options.num_prompts,
            seed=config.seed,
            max_total_tokens=config.max_model_len,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    limits = _limits(prepared, fitted, requests, options)
    tried: dict[int, slo.Attainment] = {}
    for count in range(options.replicas, (options.most_replicas or options.replicas) + 1):
        engines = [engine.build(prepared, fitted.model) for _ in range(count)]
        begun_s = time.process_time()
        records = simulate(requests, engines, router=options.router)
        spent_s = time.process_time() - begun_s
        for each in engines:
            each.close()
        tried[count] = slo.attainment(records, limits)
        if tried[count].joint >= _PASSES:
            break
    result = slo.summarize(records)
    gpus = count * config.tensor_parallel_size * (2 if config.topology == "disaggregated" else 1)
    goodput = tried[count].joint * len(records) / result["duration"]
    return {
        **result,
        **requests.describe(),
        "latency_model": _describe(fitted),
        "slo": dataclasses.asdict(limits),
        "attainment": tried[count]._asdict(),
        "replicas": count,
        "gpus": gpus,
        "request_goodput": goodput,
        "request_goodput_per_gpu": goodput / gpus,
        "enough": tried[count].joint >= _PASSES,
        "tried": {str(n): found._asdict() for n, found in tried.items()},
        "engines": [_counters(each) for each in engines],
        "times_real_time": result["duration"] / spent_s,
        "config": {**dataclasses.asdict(options), **dataclasses.asdict(config)},
        # Not what runs here: to look for devices would start them.
        "environment": {"jpd": jpd.__version__, "python": platform.python_version()},
    }


def _latencies(prepared: Prepared, options: SimulateOptions) -> Fit:
    from jpd.simulate import fit, hardware

    config = prepared.config
    if options.step_times is not None:
        return fit.fit(fit.StepTimes.read(options.step_times), start_s=options.start_s)
    model = hardware.arithmetic(
        prepared.split,
        prepared.model_bytes,
        page_size=config.page_size,
        sm_shares=config.semi_pd.sm_shares,
    )
    return fit.Fit(dataclasses.replace(model, start_s=options.start_s), None, None)


def _limits(
    prepared: Prepared, fitted: Fit, requests: workload.Workload, options: SimulateOptions
) -> slo.Slo:
    from jpd.simulate import engine
    from jpd.simulate.run import simulate_alone

    for given in (options, prepared.config.semi_pd):
        if given.ttft_slo_s is not None and given.tpot_slo_s is not None:
            return slo.Slo(given.ttft_slo_s, given.tpot_slo_s)
    config = prepared.config.replace(topology="unified", semi_pd=SemiPDConfig())
    unified = dataclasses.replace(prepared, config=config)
    alone = workload.select(requests, n=min(_ALONE, len(requests)))
    one = engine.build(unified, fitted.model)
    records = simulate_alone(alone, one)
    one.close()
    return slo.slo_from_unloaded(records, options.slo_scale)


def _describe(fitted: Fit) -> dict[str, Any]:
    found = dataclasses.asdict(fitted)
    return {**found.pop("model"), "fit_error": found}


def _counters(engine: SimulatedEngine) -> dict[str, Any]:
    stats = engine.coordinator.stats()
    return {
        "num_pages": engine.config.num_pages,
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "mode": stats.mode,
        "mode_changes": stats.mode_changes,
        "switches": [dataclasses.asdict(switch) for switch in engine.switches],
    }


def show(result: dict[str, Any]) -> None:
    """Prints what `run` found."""
    title = (
        f"jpd simulate: {result['workload']}, replicas: {result['replicas']}, "
        f"GPUs: {result['gpus']}"
    )
    report.show(title, result)
    print(f"latencies: {result['latency_model']['source']}")
    limits = result["slo"]
    print(f"SLO: TTFT {1e3 * limits['ttft_s']:.1f} ms, TPOT {1e3 * limits['tpot_s']:.2f} ms")
    for replicas, found in result["tried"].items():
        print(
            f"replicas: {replicas}: {found['joint']:.1%} keep both, {found['ttft']:.1%} TTFT, "
            f"{found['tpot']:.1%} TPOT"
        )
    print(
        f"requests/s that keep both: {result['request_goodput']:.2f}, "
        f"{result['request_goodput_per_gpu']:.2f} a GPU"
    )


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes what `run` found as JSON."""
    # A controller that is an object is named.
    path.write_text(json.dumps(result, indent=2, default=repr) + "\n")
