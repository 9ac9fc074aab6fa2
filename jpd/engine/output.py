"""Tokens of a request to what its caller sees: text, stop strings, log-probabilities, times."""

from __future__ import annotations

from dataclasses import dataclass, field

from jpd.engine.plan import StepResult
from jpd.engine.sequence import Sequence
from jpd.text import IncrementalDetokenizer, Tokenizer
from jpd.types import (
    CompletionOutput,
    Delta,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)


@dataclass(eq=False, slots=True)
class Request:
    """One request and its `n` sequences."""

    output: RequestOutput
    params: SamplingParams
    sequences: list[Sequence] = field(default_factory=list)
    detokenizers: list[IncrementalDetokenizer | None] = field(default_factory=list)

    @property
    def num_unfinished(self) -> int:
        """Sequences that still grow."""
        return sum(c.finish_reason is None for c in self.output.outputs)


def make_request(
    request_id: str,
    prompt: str | None,
    prompt_token_ids: list[int],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    arrival_s: float,
) -> Request:
    """A request without sequences yet."""
    output = RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        outputs=[
            CompletionOutput(
                i,
                logprobs=None if params.logprobs is None else [],
                cumulative_logprob=None if params.logprobs is None else 0.0,
            )
            for i in range(params.n)
        ],
        metrics=RequestMetrics(arrival_s),
    )
    detokenizers: list[IncrementalDetokenizer | None] = [None] * params.n
    if tokenizer is not None:
        detokenizers = [
            IncrementalDetokenizer(
                tokenizer,
                prompt_token_ids,
                params.skip_special_tokens,
                params.stop,
                params.include_stop_str_in_output,
                params.min_tokens,
            )
            for _ in range(params.n)
        ]
    return Request(output, params, detokenizers=detokenizers)


def append_token(
    request: Request, sequence: Sequence, token: int, row: int, result: StepResult, now_s: float
) -> Delta:
    """Adds a sampled token to its request.

    The delta's finish reason is set if the token ends the sequence; a stop string in the text may
    end it before the scheduler knows.
    """
    output, metrics = request.output, request.output.metrics
    completion = output.outputs[sequence.index]
    detokenizer = request.detokenizers[sequence.index]
    completion.token_ids.append(token)
    metrics.num_generated_tokens += 1
    metrics.longest_output_tokens = max(metrics.longest_output_tokens, len(completion.token_ids))
    if metrics.first_token_s is None:
        metrics.first_token_s = now_s
    if request.params.logprobs is not None:
        _append_logprobs(completion, request.params.logprobs, token, row, result)

    reason, text = sequence.finish_reason, ""
    if reason is FinishReason.STOP and token in request.params.stop_token_ids:
        completion.stop_reason = token
    if detokenizer is not None:
        if reason is not FinishReason.STOP:  # the text of a stop token is not shown
            text = detokenizer.append([token])
        if detokenizer.stopped is None and reason is not None:
            text += detokenizer.flush()
        if detokenizer.stopped is not None:
            reason, completion.stop_reason = FinishReason.STOP, detokenizer.stopped
    completion.text += text
    return end(request, sequence.index, reason, text, [token], now_s)


def end(
    request: Request,
    index: int,
    reason: FinishReason | None,
    text: str,
    token_ids: list[int],
    now_s: float,
) -> Delta:
    """Records how a sequence ended, if it did, and whether the request did with it."""
    output = request.output
    output.outputs[index].finish_reason = reason
    if reason is not None and request.num_unfinished == 0:
        output.finished = True
        output.metrics.finished_s = now_s
    return Delta(output.request_id, index, text, token_ids, reason)


def _append_logprobs(
    completion: CompletionOutput, count: int, token: int, row: int, result: StepResult
) -> None:
    found = result.logprobs
    logprob = float(found.logprobs[row])
    entry = {token: Logprob(logprob, int(found.ranks[row]))}
    top = zip(found.top_tokens[row, :count], found.top_logprobs[row, :count], strict=True)
    for rank, (other, value) in enumerate(top, start=1):
        if other >= 0:
            entry.setdefault(int(other), Logprob(float(value), rank))
    completion.logprobs.append(entry)
    completion.cumulative_logprob += logprob
