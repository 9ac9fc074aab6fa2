"""One executor for both phases: against steps that are played one by one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from jpd.semi_pd.flow import Load, follow
from jpd.semi_pd.mixed_steps import MixedSteps

TOKEN_S = 2e-5


def decode_s(decoding: float) -> float:
    """4 ms for the weights, 40 µs for each row."""
    return 0.004 + 4e-5 * decoding


def load(requests_per_s: float, prompt_tokens: float, **changes: float) -> Load:
    fields = {
        "waiting_tokens": 0.0,
        "decoding": 0.0,
        "tokens_per_s": requests_per_s * prompt_tokens,
        "seconds": 60.0,
        "prompt_tokens": prompt_tokens,
        "queued_prompt_tokens": prompt_tokens,
        "output_tokens": 100.0,
    }
    return Load(**fields | changes)


def mixed(of: Load, most_tokens: float = 2048) -> MixedSteps:
    return MixedSteps(load=of, decode_s=decode_s, token_s=TOKEN_S, most_tokens=most_tokens)


def played(of: Load, most_tokens: int) -> tuple[float, float, float]:
    """Prompt tokens of a step that has some, the mean gap between two tokens of a request, and the
    mean end-to-end time: chunked prefill of requests that come evenly, step by step."""
    gap_s = of.prompt_tokens / of.tokens_per_s
    arrivals = [i * gap_s for i in range(round(of.seconds / gap_s))]
    waiting: list[list[float]] = []  # arrival, tokens left
    running: list[list[float]] = []  # arrival, tokens to come
    now_s, chunks, gaps, times = 0.0, [], [], []
    while arrivals or waiting or running:
        while arrivals and arrivals[0] <= now_s:
            waiting.append([arrivals.pop(0), of.prompt_tokens])
        if not waiting and not running:
            now_s = arrivals[0]
            continue
        room, begun = float(most_tokens), []
        while waiting and room:
            part = min(room, waiting[0][1])
            waiting[0][1] -= part
            room -= part
            if not waiting[0][1]:
                begun.append(waiting.pop(0)[0])
        chunk = most_tokens - room
        step_s = decode_s(len(running)) + chunk * TOKEN_S
        now_s += step_s
        if chunk:
            chunks.append(chunk)
        gaps += [step_s] * len(running)
        for request in running:
            request[1] -= 1
        times += [now_s - request[0] for request in running if not request[1]]
        running = [request for request in running if request[1]]
        running += [[arrived_s, of.output_tokens] for arrived_s in begun]
    return sum(chunks) / len(chunks), sum(gaps) / len(gaps), sum(times) / len(times)


@pytest.mark.parametrize(
    ("requests_per_s", "prompt_tokens", "most_tokens"),
    [
        (10.0, 1000, 2048),  # a quarter of the time, alone in their steps
        (35.0, 250, 2048),
        (80.0, 250, 2048),  # several to a step
        (30.0, 1000, 2048),  # most of the time
        (12.0, 3000, 1024),  # in pieces
    ],
)
def test_it_says_what_steps_one_by_one_take(requests_per_s, prompt_tokens, most_tokens) -> None:
    of = load(requests_per_s, prompt_tokens)
    chunk, gap_s, e2e_s = played(of, most_tokens)
    steps = mixed(of, most_tokens)
    flow = follow(of, steps.prompt_token_s, steps.step_s)
    decoding = requests_per_s * (of.output_tokens * gap_s)  # Little's law
    assert steps.tokens(decoding) == pytest.approx(chunk, rel=0.15)
    assert flow.tpot_s == pytest.approx(gap_s, rel=0.12)
    computed_s = prompt_tokens * steps.prompt_token_s(decoding)  # which a fluid does not wait for
    assert flow.wait_s + flow.decode_s + computed_s == pytest.approx(e2e_s, rel=0.15)


def test_a_step_takes_more_prompts_the_more_come_and_no_more_than_it_may() -> None:
    chunks = [mixed(load(rate, 100)).tokens(50) for rate in (1, 20, 200, 400, 480, 600, 10_000)]
    assert chunks[0] == 100  # never less than one prompt
    assert all(a <= b for a, b in itertools.pairwise(chunks))
    assert chunks[-2:] == [2048, 2048]  # more than can be computed
    queue = replace(load(1, 100), waiting_tokens=1500.0)
    assert mixed(queue).tokens(50) == 1500
    assert mixed(load(1, 5000)).tokens(50) == 2048


def test_without_prompts_it_decodes_and_with_nothing_else_it_computes() -> None:
    steps = mixed(load(20, 1000))
    assert steps.step_s(30, 0.0) == pytest.approx(decode_s(30))
    assert steps.step_s(30, 1.0) == pytest.approx(decode_s(30) + steps.tokens(30) * TOKEN_S)
    # Of a second, each token takes its time and its part of what the step costs besides.
    assert steps.prompt_token_s(30) == pytest.approx(steps.step_s(30, 1.0) / steps.tokens(30))
