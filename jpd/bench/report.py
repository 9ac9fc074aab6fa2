"""From the outputs of a benchmark to numbers, a table and a file. Names and meanings are vLLM's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jpd import RequestOutput
from jpd.bench import environment, slo

if TYPE_CHECKING:
    from jpd import LLM

_TIMES = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "e2el": "end-to-end latency",
}
_RATES = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "input and output tokens/s",
}


def random_prompts(llm: LLM, lengths: Sequence[int], stream: int) -> list[list[int]]:
    """Prompts of random token ids, so that none begins like another; each `stream` is new."""
    rng = np.random.default_rng([llm.config.seed, stream])
    return [rng.integers(llm.model_config.vocab_size, size=n).tolist() for n in lengths]


def summarize(outputs: Sequence[RequestOutput], duration_s: float) -> dict[str, Any]:
    """Numbers of finished requests that took `duration_s` together.

    Returns:
      Counts, `duration` in s, throughputs per second, and for ttft, tpot and e2el their `mean_*_ms`
      and `p50_*_ms`, `p90_*_ms`, `p99_*_ms` (linear interpolation); tpot is None where every
      request has one token only.
    """
    metrics = [output.metrics for output in outputs]
    times = {
        "ttft": [m.ttft_s for m in metrics],
        "tpot": [m.tpot_s for m in metrics if m.tpot_s is not None],
        "e2el": [m.finished_s - m.arrival_s for m in metrics],
    }
    inputs = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(m.num_generated_tokens for m in metrics)
    return {**slo.rates(len(outputs), inputs, generated, duration_s), **slo.latencies(times)}


def show(title: str, result: dict[str, Any]) -> None:
    """Prints what `summarize` found."""
    table = Table(title=title, title_justify="left")
    for column in ("ms", "mean", *(f"p{p}" for p in slo.PERCENTILES)):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for name, label in _TIMES.items():
        row = [result[f"{statistic}_{name}_ms"] for statistic in _statistics()]
        table.add_row(label, *("-" if value is None else f"{value:.2f}" for value in row))
    Console().print(table)
    rates = [f"{result[name]:.2f} {label}" for name, label in _RATES.items()]
    print(f"{result['completed']} requests in {result['duration']:.2f} s: " + ", ".join(rates))


def write(path: Path, llm: LLM, options: Any, result: dict[str, Any]) -> None:
    """Writes the numbers, and what they were measured with, as JSON."""
    config = {**dataclasses.asdict(options), **dataclasses.asdict(llm.config)}
    record = {**result, "config": config, "environment": environment.describe()}
    path.write_text(json.dumps(record, indent=2) + "\n")


def _statistics() -> list[str]:
    return ["mean", *(f"p{p}" for p in slo.PERCENTILES)]
