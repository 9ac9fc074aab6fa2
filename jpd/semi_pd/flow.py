"""How requests would flow through both phases: a fluid, no single request.

Prompt tokens wait, are computed, and become decoding requests, which end after so many steps in
the mean (with no memory of how many they had). Both queues are followed through time instead of in
a steady state, for at the loads that matter there is none: with more arrivals than prefill can
compute the one queue grows, and shares that let it grow shorten the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_STEPS = 20
"""Into which the time of arrivals is cut. After it, each is as long as all before it."""
_MOST_STEPS = 60
"""By then each step is longer than a day: what does not end in them never does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The requests that are here, and those that come."""

    waiting_tokens: float
    """Prompt tokens still to be computed."""
    decoding: float
    """Requests that decode."""
    tokens_per_s: float
    """Prompt tokens that arrive."""
    seconds: float
    """For which they do; nothing comes later."""
    prompt_tokens: float
    """Of a request in the mean, above 0."""
    queued_prompt_tokens: float
    """Of one that waits; at least that, and more where short prompts go first."""
    output_tokens: float
    """Of a request in the mean, above 0."""


class Flow(NamedTuple):
    """What they see."""

    wait_s: float
    """Mean time to the first token of those that have none yet, from now or from their arrival. A
    fluid that is computed as fast as it comes does not wait at all, where requests would."""
    decode_s: float
    """Mean time from there, or from now, to the end, of all."""
    new: float
    """Part, 0..1, of all that have no token yet."""
    tpot_s: float
    """Mean time of a decode step, over decoding requests, while new ones come."""


def follow(
    load: Load, token_s: Callable[[float], float], step_s: Callable[[float, float], float]
) -> Flow:
    """Lets the requests pass until all have ended.

    Args:
        load: the requests.
        token_s: seconds to compute a prompt token, above 0, from the requests that decode.
        step_s: seconds of a decode step, above 0, from the requests that decode and the part of
            the time, 0..1, in which prompts are computed meanwhile.
    """
    waiting, decoding = load.waiting_tokens, load.decoding
    now_s = waited = decoded = gaps = decoded_here = 0.0
    for number in range(_MOST_STEPS):
        arriving = number < _STEPS
        step = load.seconds / _STEPS if arriving else now_s
        come = load.tokens_per_s * step if arriving else 0.0
        if not arriving:
            if waiting < 1 and decoding < 0.5:
                break
            if waiting >= 1:  # no longer than the queue lasts: the part that works is whole then
                step = min(step, waiting * token_s(decoding))
        can = step / token_s(decoding)
        computed = min(waiting + come, can)
        gap_s = step_s(decoding, computed / can)
        ends_per_s = 1 / (load.output_tokens * gap_s)
        # d(decoding)/dt = ends_per_s * (balance - decoding), with both constant over the step.
        ended = -math.expm1(-ends_per_s * step)
        # Those that come, and those by which the queue, of other lengths, shrinks.
        begun = come / load.prompt_tokens + (computed - come) / load.queued_prompt_tokens
        balance = begun / step / ends_per_s
        requests = balance * step + (decoding - balance) * ended / ends_per_s
        if arriving:
            gaps += requests * gap_s
            decoded_here += requests
        after = waiting + come - computed
        decoded += requests
        waited += (waiting + after) / 2 * step / load.queued_prompt_tokens
        waiting, decoding = after, decoding + (balance - decoding) * ended
        now_s += step
    decoded += decoding * load.output_tokens * step_s(decoding, 0.0)  # of who is left
    new = load.waiting_tokens / load.queued_prompt_tokens
    new += load.tokens_per_s * load.seconds / load.prompt_tokens
    everyone = new + load.decoding
    return Flow(
        wait_s=waited / new if new else 0.0,
        decode_s=decoded / everyone if everyone else 0.0,
        new=new / everyone if everyone else 0.0,
        tpot_s=gaps / decoded_here if gaps else step_s(0.0, 0.0),  # nobody, or nearly so
    )
