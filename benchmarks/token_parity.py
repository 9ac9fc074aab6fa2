"""Greedy tokens of a run, checked token by token: the reference's own, a tie, or wrong.

In 16 bits the logits of a row depend on what else is in its step by a rounding, so where the two
best tokens are nearly equal two correct runs may part. A difference counts as a tie if the
reference run gives the other token a log-probability less than a threshold below that of its own
(which is the margin of the logits). What follows it is another text, so the reference goes on from
that text, in rounds: at first each request whole, then those that have parted, a piece at a time,
with the tokens that are judged already as part of the prompt. Each token is compared with what the
reference says after the same text. A wrong token ends its request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from benchmarks.engine_load import Load, LoadRequest
from jpd.engine.coordinator import Coordinator
from jpd.types import MAX_LOGPROBS

LOGPROBS = MAX_LOGPROBS
"""Best tokens that the reference says at each position. With five, three requests of 995 had a
token outside of them (random weights, an H200, a trial): whether it was a tie nobody could say."""
BF16_TIE = 0.1
"""Threshold for bfloat16. Logits of random weights are some tenths apart; a wrong page or product
moves them by ones."""
PIECE = 64
"""Tokens of a round after the first. With random weights 23 came before the first tie, in the mean
(Llama-3.1-8B on an H200, 256 requests, a trial that is not kept)."""


class Said(NamedTuple):
    """What the reference says at one position."""

    token: int
    """Its own."""
    logprobs: Mapping[int, float]
    """Of the best tokens, its own among them."""


@dataclass(slots=True)
class Parity:
    """How much of each kind there was."""

    identical: int = 0
    """Requests without any difference."""
    ties: int = 0
    """Tokens."""
    faults: list[str] = field(default_factory=list)
    """What is wrong, for each request with a wrong token, or too few or too many."""
    compared_tokens: int = 0

    @property
    def wrong(self) -> int:
        """Requests with a fault."""
        return len(self.faults)

    @property
    def named(self) -> str:
        """The first faults, for a message: ten of them at most."""
        return "; ".join(self.faults[:10])


def verify(
    generate: Callable[[list[LoadRequest]], list[list[Said]]],
    work: Sequence[LoadRequest],
    got: Sequence[Sequence[int]],
    tie_below: float,
) -> Parity:
    """Checks each request's tokens.

    Args:
        generate: runs requests as the reference; what it says at each of their tokens.
        work: the requests.
        got: tokens of each.
        tie_below: margin below which a difference is a tie; 0 allows none.
    """
    parity = Parity()
    left: dict[int, int] = {}  # from which token on each request is to be checked
    for i, (request, tokens) in enumerate(zip(work, got, strict=True)):
        if len(tokens) == request.output_tokens:
            left[i] = 0
        else:
            parity.faults.append(f"request {i}: {len(tokens)} tokens, not {request.output_tokens}")
    longest = max(map(len, got), default=0)
    while left:
        pieces = [got[i][at : at + longest] for i, at in left.items()]
        said = generate(
            [
                LoadRequest([*work[i].prompt, *got[i][:at]], len(piece))
                for (i, at), piece in zip(left.items(), pieces, strict=True)
            ]
        )
        longest = PIECE
        for (i, at), piece, here in zip([*left.items()], said, pieces, strict=True):
            end = at + _judge(parity, f"request {i}", at, piece, here, tie_below)
            parity.identical += at == 0 and end == len(got[i]) and got[i][-1] == piece[-1].token
            if at < end < len(got[i]):
                left[i] = end
            else:
                del left[i]
    return parity


def _judge(
    parity: Parity, request: str, at: int, piece: list[Said], got: Sequence[int], tie_below: float
) -> int:
    """Counts the tokens up to the first difference, and that too; how many, 0 if it is wrong."""
    if len(piece) != len(got):
        parity.faults.append(
            f"{request}, position {at}: the reference gave {len(piece)} of {len(got)} tokens"
        )
        return 0
    for n, (said, token) in enumerate(zip(piece, got, strict=True)):
        parity.compared_tokens += 1
        if token == said.token:
            continue
        own = said.logprobs[said.token]
        margin = own - said.logprobs.get(token, -np.inf)
        if margin < tie_below:
            parity.ties += 1
            return n + 1
        text = f"{margin:.3g}"
        if token not in said.logprobs:
            text = f"{own - min(said.logprobs.values()):.3g} or more"
        parity.faults.append(
            f"{request}, position {at + n}: token {token}, not {said.token}, margin {text}"
        )
        return 0
    return len(piece)


def reference(coordinator: Coordinator, at_once: int) -> Callable[..., list[list[Said]]]:
    """An engine as what `verify` compares with.

    Args:
        coordinator: of the engine.
        at_once: requests in the engine.
    """

    def generate(requests: list[LoadRequest]) -> list[list[Said]]:
        load = Load(coordinator, requests, at_once, logprobs=LOGPROBS)
        load.finish()
        return [
            [
                Said(token, {t: lp.logprob for t, lp in step.items()})
                for token, step in zip(out.token_ids, out.logprobs, strict=True)
            ]
            for out in (output.outputs[0] for output in load.outputs)
        ]

    return generate
