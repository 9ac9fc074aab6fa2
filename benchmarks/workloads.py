"""Requests of the Azure conversation trace, for benchmarks that queue them all at once."""

from __future__ import annotations

from typing import NamedTuple

from jpd.bench import traces, workload


class TracedRequest(NamedTuple):
    """Lengths of one request of a trace."""

    prompt_tokens: int
    output_tokens: int


class Workload(NamedTuple):
    """Requests in order of arrival, and how many rows were passed over for their length.

    A result measured on a workload should name `left_out`: leaving long requests out makes the
    remaining ones look easier than the trace is.
    """

    requests: list[TracedRequest]
    left_out: int


def azure_conv(n: int, *, max_total: int) -> Workload:
    """The first `n` requests of the Azure 2023 conversation trace that fit.

    Args:
        n: number of requests.
        max_total: most prompt + output tokens of a request; a row with more is passed over whole
            and counted, so the result has exactly `n` requests.

    Raises:
        ValueError: `n` is below 1 or above the number of rows that fit.
    """
    rows = workload.select(traces.azure_conv(), n=n, max_total_tokens=max_total)
    lengths = zip(rows.prompt_tokens.tolist(), rows.output_tokens.tolist(), strict=True)
    return Workload([TracedRequest(*pair) for pair in lengths], rows.left_out)
