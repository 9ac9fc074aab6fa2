"""How many tokens a second the engine makes when all requests are there at the start."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jpd import SamplingParams
from jpd.bench import report
from jpd.config import require

if TYPE_CHECKING:  # importing it takes seconds, and the command line needs the options only
    from jpd import LLM


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """All requests at once. Names are vLLM's."""

    input_len: int = 128
    """Prompt tokens of a request."""
    output_len: int = 128
    """Tokens that a request generates."""
    num_prompts: int = 256
    """Requests."""
    random_range_ratio: float = 0.0
    """Draw both lengths from [len * (1 - ratio), len * (1 + ratio)]."""
    temperature: float = 1.0
    """0 measures the greedy step, other values the one with the whole sampler."""


def run(llm: LLM, options: ThroughputOptions) -> dict[str, Any]:
    """Measures, after a short warm-up with other prompts.

    Returns:
      What `report.summarize` gives.

    Raises:
      ConfigError: an option is out of range.
    """
    require(options.num_prompts >= 1, "num_prompts", options.num_prompts, "at least 1")
    ratio = options.random_range_ratio
    require(0 <= ratio < 1, "random_range_ratio", ratio, "in [0, 1)")
    rng = np.random.default_rng(llm.config.seed)

    def lengths(middle: int) -> list[int]:
        low, high = max(1, round(middle * (1 - ratio))), round(middle * (1 + ratio))
        return rng.integers(low, high, size=options.num_prompts, endpoint=True).tolist()

    prompts = report.random_prompts(llm, lengths(options.input_len), 1)
    params = [
        SamplingParams(temperature=options.temperature, max_tokens=n, ignore_eos=True)
        for n in lengths(options.output_len)
    ]
    first = [len(prompt) for prompt in prompts[: llm.config.max_num_seqs]]
    llm.generate(report.random_prompts(llm, first, 0), replace(params[0], max_tokens=2))
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=llm.config.show_progress)
    return report.summarize(outputs, time.perf_counter() - start)
