"""Greedy tokens of two runs: identical, different where two tokens tie, or wrong.

In 16 bits the logits of a row depend on what else is in its step by a rounding, so where the two
best tokens are nearly equal two correct runs may part. A difference counts as a tie if the
reference run gives the other token a log-probability less than a threshold below that of its own
(which is the margin of the logits). What follows it belongs to another text and is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jpd.types import RequestOutput

LOGPROBS = 5
"""Best tokens that the reference remembers at each position."""
BF16_TIE = 0.1
"""Threshold for bfloat16. Logits of random weights are some tenths apart; a wrong page or product
moves them by ones."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the reference run gave for one request."""

    tokens: list[int]
    logprobs: list[Mapping[int, float]]
    """Of the best tokens at each position."""


@dataclass(slots=True)
class Parity:
    """Requests of each kind, and how much was compared."""

    identical: int = 0
    ties: int = 0
    wrong: int = 0
    compared_tokens: int = 0
    """Up to each request's first difference."""
    first_wrong: str | None = None


def references(outputs: Sequence[RequestOutput]) -> list[Reference]:
    """References of requests that were run with `logprobs=LOGPROBS`."""
    return [
        Reference(
            list(o.outputs[0].token_ids),
            [{t: lp.logprob for t, lp in step.items()} for step in o.outputs[0].logprobs],
        )
        for o in outputs
    ]


def compare(want: Sequence[Reference], got: Sequence[Sequence[int]], tie_below: float) -> Parity:
    """Compares each request's tokens with the reference's.

    Args:
        want: of each request.
        got: tokens of each request.
        tie_below: margin below which a difference is a tie; 0 allows none.
    """
    parity = Parity()
    for i, (reference, tokens) in enumerate(zip(want, got, strict=True)):
        if list(tokens) == reference.tokens:
            parity.identical += 1
            parity.compared_tokens += len(tokens)
            continue
        pairs = enumerate(zip(reference.tokens, tokens, strict=False))
        at = next((at for at, (a, b) in pairs if a != b), None)
        if at is None:
            parity.wrong += 1
            text = f"request {i}: {len(tokens)} tokens, not {len(reference.tokens)}"
            parity.first_wrong = parity.first_wrong or text
            continue
        parity.compared_tokens += at
        known = reference.logprobs[at]
        margin = known[reference.tokens[at]] - known.get(tokens[at], -np.inf)
        if margin < tie_below:
            parity.ties += 1
        else:
            parity.wrong += 1
            text = (
                f"request {i}, position {at}: token {tokens[at]}, not {reference.tokens[at]}, "
                f"margin {margin:.3g}"
            )
            parity.first_wrong = parity.first_wrong or text
    return parity
