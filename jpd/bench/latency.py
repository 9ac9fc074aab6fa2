"""How long one batch takes, alone on the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from jpd import SamplingParams
from jpd.bench import report
from jpd.config import require

if TYPE_CHECKING:  # importing it takes seconds, and the command line needs the options only
    from jpd import LLM


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """One batch after another. Names and defaults are vLLM's."""

    input_len: int = 32
    """Prompt tokens of each request."""
    output_len: int = 128
    """Tokens that each request generates."""
    batch_size: int = 8
    """Requests of a batch; they run at once."""
    num_iters_warmup: int = 10
    """Batches before the measured ones."""
    num_iters: int = 30
    """Measured batches."""
    temperature: float = 1.0
    """0 measures the greedy step, other values the one with the whole sampler."""


def run(llm: LLM, options: LatencyOptions) -> dict[str, Any]:
    """Measures; prompts differ in every batch, so that none is found in the prefix cache.

    Returns:
      What `report.summarize` gives over all measured requests, and of the batches `avg_latency`,
      `latencies` and `percentiles`, in s.

    Raises:
      ConfigError: the batch does not run at once, or nothing is measured.
    """
    batch, limit = options.batch_size, llm.config.max_num_seqs
    require(1 <= batch <= limit, "batch_size", batch, f"1 to max_num_seqs={limit}")
    require(options.num_iters >= 1, "num_iters", options.num_iters, "at least 1")
    warmup = options.num_iters_warmup
    require(warmup >= 0, "num_iters_warmup", warmup, "at least 0")
    params = SamplingParams(
        temperature=options.temperature, max_tokens=options.output_len, ignore_eos=True
    )
    outputs, latencies = [], []
    total = warmup + options.num_iters
    for i in tqdm(range(total), desc="bench", unit="batch", disable=not llm.config.show_progress):
        prompts = report.random_prompts(llm, [options.input_len] * batch, i)
        start = time.perf_counter()
        done = llm.generate(prompts, params)
        if i >= warmup:
            latencies.append(time.perf_counter() - start)
            outputs += done
    percentiles = {p: float(np.percentile(latencies, p)) for p in (10, 25, 50, 75, 90, 99)}
    return {
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": percentiles,
        **report.summarize(outputs, sum(latencies)),
    }
