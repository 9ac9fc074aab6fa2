"""Workloads from published traces, and some like them; the same seed gives the same workload.

`data/README.md` has sources, licences and statistics of the traces.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from jpd.bench.workload import Workload, check_count, generator, poisson, rescale, select

DATA = Path(__file__).parent / "data"
TRACES = {
    "azure_conv": "azure2023_conv.csv.gz",
    "azure_code": "azure2023_code.csv.gz",
}
"""Traces with arrival times of their own, and their files."""
NAMES = (*TRACES, "arxiv", "sharegpt_like")
"""What `make` knows."""

SHAREGPT_TOKENS = (196.0, 1.1)
"""Median and standard deviation of the logarithm of prompt tokens, before the cut."""
SHAREGPT_OUTPUT_TOKENS = (247.0, 0.9)
"""The same of output tokens."""
SHAREGPT_MAX_TOKENS = 2048
"""Most prompt and output tokens of a request together."""


def azure_conv() -> Workload:
    """The Azure 2023 conversation trace: 19,366 requests in 58 minutes, 5.53/s."""
    return _trace("azure_conv")


def azure_code() -> Workload:
    """The Azure 2023 code completion trace: 8,819 requests in 57 minutes, 2.57/s, in bursts."""
    return _trace("azure_code")


def arxiv(arrivals_s: np.ndarray, seed: int, max_total_tokens: int | None = None) -> Workload:
    """Rows drawn at random, each at most once, from 28,257 arXiv papers and their abstracts.

    Stands in for LongBench: long prompts, short outputs, at most 4,096 Llama-2 tokens together.

    Args:
      arrivals_s: one request for each; the data has no times.
      seed: of the draw.
      max_total_tokens: only rows with at most so many prompt and output tokens are drawn from;
        `left_out` counts the others in the whole data.

    Raises:
      ValueError: there are fewer such rows than arrivals.
    """
    prompts, outputs = _read("arxiv_summarization.csv.gz").T
    source = "arXiv summarization lengths (Vidur)"
    rows = Workload("arxiv", np.zeros(len(prompts)), prompts, outputs, source)
    rows = select(rows, max_total_tokens=max_total_tokens)
    n = len(arrivals_s)
    check_count(n, len(rows))
    drawn = generator(seed, "lengths").choice(len(rows), size=n, replace=False)
    return replace(
        rows,
        arrivals_s=arrivals_s,
        prompt_tokens=rows.prompt_tokens[drawn],
        output_tokens=rows.output_tokens[drawn],
        source=f"{rows.source}; {n} drawn with seed {seed}",
    )


def sharegpt_like(
    arrivals_s: np.ndarray, seed: int, max_total_tokens: int = SHAREGPT_MAX_TOKENS
) -> Workload:
    """Lognormal lengths with the means of ShareGPT and the cut of vLLM's and SGLang's benchmarks.

    The cut keeps 4 to 1,024 prompt tokens, 4 output tokens or more and 2,048 together; 8 % of the
    draws fall outside and are drawn again. What remains has means of 251 prompt tokens (semi-PD,
    arXiv:2504.19867, section 7.1.3) and 338 output tokens (vLLM, SOSP 2023, figure 11).

    Neither paper gives a spread. Sigma is that of the first 302 turns of Sarathi-Serve's ShareGPT
    lengths (microsoft/sarathi-serve, commit 72339db5,
    `data/processed_traces/sharegpt_8k_filtered_stats_llama2_tokenizer.csv`): the logarithms of user
    messages of 4 to 1,024 tokens have a standard deviation of 1.03 (1.10 by their quartiles), of
    answers 0.94 (0.81).

    Args:
      arrivals_s: one request for each.
      seed: of the draw.
      max_total_tokens: 8 to 2,048. A lower limit also lowers the means.

    Raises:
      ValueError: `max_total_tokens` is out of range.
    """
    if not 8 <= max_total_tokens <= SHAREGPT_MAX_TOKENS:
        allowed = f"8 to {SHAREGPT_MAX_TOKENS}"
        raise ValueError(f"max_total_tokens must be {allowed}, got {max_total_tokens}")
    n, drawn = len(arrivals_s), 0
    random = generator(seed, "lengths")
    kept: list[tuple[int, int]] = []
    while len(kept) < n:
        drawn += 1
        prompt, output = (
            round(median * math.exp(sigma * random.standard_normal()))
            for median, sigma in (SHAREGPT_TOKENS, SHAREGPT_OUTPUT_TOKENS)
        )
        if 4 <= prompt <= 1024 and output >= 4 and prompt + output <= max_total_tokens:
            kept.append((prompt, output))
    lengths = np.array(kept).reshape(-1, 2)
    source = f"lognormal lengths like ShareGPT's, seed {seed}, at most {max_total_tokens} tokens"
    return Workload("sharegpt_like", arrivals_s, lengths[:, 0], lengths[:, 1], source, drawn - n)


def fixed(arrivals_s: np.ndarray, prompt_tokens: int, output_tokens: int) -> Workload:
    """Requests that are all of one size."""
    n = len(arrivals_s)
    return Workload(
        f"fixed_{prompt_tokens}_{output_tokens}",
        arrivals_s,
        np.full(n, prompt_tokens),
        np.full(n, output_tokens),
        f"{prompt_tokens} prompt and {output_tokens} output tokens each",
    )


def make(
    name: str, *, rate: float, n: int, seed: int, max_total_tokens: int | None = None
) -> Workload:
    """`n` requests of a named workload at `rate` requests/s.

    A trace gives consecutive rows from one drawn with `seed` on, with its own arrivals scaled to
    the rate; the others give lengths drawn with `seed` at the times of a Poisson process.

    Args:
      name: one of `NAMES`.
      rate: requests/s.
      n: number of requests; at least 2 of a trace.
      seed: of everything that is drawn.
      max_total_tokens: rows with more prompt and output tokens are left out.

    Raises:
      ValueError: an argument is out of range.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if name in TRACES:
        trace = _trace(name)
        fitting = select(trace, max_total_tokens=max_total_tokens)
        check_count(n, len(fitting))
        first = generator(seed, "lengths").integers(len(fitting) - n + 1)
        start_s = float(fitting.arrivals_s[first])
        rows = select(trace, start_s=start_s, n=n, max_total_tokens=max_total_tokens)
        return rescale(rows, rate)
    arrivals_s = poisson(rate, n, seed)
    if name == "arxiv":
        return arxiv(arrivals_s, seed, max_total_tokens)
    limit = SHAREGPT_MAX_TOKENS if max_total_tokens is None else max_total_tokens
    return sharegpt_like(arrivals_s, seed, min(limit, SHAREGPT_MAX_TOKENS))


def _trace(name: str) -> Workload:
    arrivals_us, prompts, outputs = _read(TRACES[name]).T
    source = f"{TRACES[name].removesuffix('.csv.gz')} (Azure public dataset, Splitwise)"
    return Workload(name, arrivals_us / 1e6, prompts, outputs, source)


def _read(file: str) -> np.ndarray:
    return np.loadtxt(DATA / file, dtype=np.int64, delimiter=",", skiprows=1)
