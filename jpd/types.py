"""What callers give to the engine and get from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from jpd.config import check_names
from jpd.errors import RequestError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKEN_IDS = 20


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token id or a stop string."""
    LENGTH = "length"
    """`max_tokens` or `max_model_len` was reached."""
    ABORT = "abort"
    """The caller gave the request up."""
    TIMEOUT = "timeout"
    """`timeout_s` was over."""
    ERROR = "error"
    """Every executor that computed it was lost."""


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{name}={value!r} is not allowed: {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(name: str, values: object) -> tuple:
    _check(values is None or isinstance(values, Iterable), name, values, "None or a sequence")
    return tuple(values or ())


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names and defaults are vLLM's.

    Raises:
      RequestError: a value is out of range, or two values contradict each other.
      UnknownArgumentError: there is no such parameter.
    """

    n: int = 1
    """Sequences to generate from the prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p, after top_k."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that was generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was generated."""
    repetition_penalty: float = 1.0
    """Divides (positive) or multiplies (negative) logits of tokens in prompt and output."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; at most 300 entries of [-100, 100]."""
    seed: int | None = None
    """Makes the request's random numbers independent of the batch that it is sampled in. Its tokens
    are too in float32; in 16 bits logits depend on the batch by a rounding, and a near tie may
    fall the other way."""
    max_tokens: int | None = 16
    """Tokens to generate; None generates up to `max_model_len`."""
    timeout_s: float | None = None
    """Seconds from the request's arrival after which it ends with the tokens that it has."""
    min_tokens: int = 0
    """No end of sequence, stop token or stop string ends the output before this many tokens."""
    stop: str | Sequence[str] = ()
    """Strings that end the output; not part of it unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the output; the token stays in `token_ids`, its text is not shown."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    logprobs: int | None = None
    """Return the log-probability of the sampled token and of this many most likely ones."""
    skip_special_tokens: bool = True
    """Leave special tokens out of `text`."""
    include_stop_str_in_output: bool = False
    """Keep the matched stop string in `text`."""

    def __new__(cls, **options: object) -> SamplingParams:
        check_names(cls, options)  # before the dataclass, which would not name the nearest
        return super().__new__(cls)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        set_(self, "stop", stop)
        set_(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        if self.top_k == -1:
            set_(self, "top_k", 0)
        _check(_is_int(self.n) and self.n >= 1, "n", self.n, "an int >= 1")
        ranges = (
            ("temperature", 0.0, 100.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        )
        for name, low, high in ranges:
            value = getattr(self, name)
            _check(_is_number(value) and low <= value <= high, name, value, f"[{low}, {high}]")
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "(0, 1]")
        _check(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "greater than 0",
        )
        _check(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an int >= -1")
        for name, low in (("max_tokens", 1), ("logprobs", 0), ("seed", -(2**63))):
            value = getattr(self, name)
            if value is not None:
                _check(_is_int(value) and value >= low, name, value, f"None or an int >= {low}")
        _check(self.seed is None or self.seed < 2**63, "seed", self.seed, "below 2**63")
        _check(
            self.logprobs is None or self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"at most {MAX_LOGPROBS}",
        )
        _check(
            self.timeout_s is None or (_is_number(self.timeout_s) and self.timeout_s > 0),
            "timeout_s",
            self.timeout_s,
            "None or seconds greater than 0",
        )
        _check(
            _is_int(self.min_tokens) and self.min_tokens >= 0,
            "min_tokens",
            self.min_tokens,
            "an int >= 0",
        )
        if self.max_tokens is not None:
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                self.min_tokens,
                f"at most max_tokens={self.max_tokens}",
            )
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, value, "True or False")
        for text in stop:
            _check(isinstance(text, str) and text != "", "stop", text, "non-empty strings")
        _check(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS
            and all(_is_int(t) and t >= 0 for t in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            f"at most {MAX_STOP_TOKEN_IDS} ints >= 0",
        )
        self._check_contradictions()
        if self.logit_bias is not None:
            ok = isinstance(self.logit_bias, Mapping)
            _check(ok, "logit_bias", self.logit_bias, "a mapping of token ids to numbers")
            bias = dict(self.logit_bias)
            count = f"{len(bias)} entries"
            _check(len(bias) <= MAX_LOGIT_BIAS, "logit_bias", count, f"at most {MAX_LOGIT_BIAS}")
            for token, value in bias.items():
                ok = _is_int(token) and token >= 0 and _is_number(value) and -100 <= value <= 100
                allowed = "an int token id >= 0 and a bias in [-100, 100]"
                _check(ok, f"logit_bias[{token!r}]", value, allowed)
            set_(self, "logit_bias", bias)

    def _check_contradictions(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise RequestError(f"n={self.n} with temperature=0 would give {self.n} equal outputs")
        if self.include_stop_str_in_output and not self.stop:
            raise RequestError("include_stop_str_in_output=True needs a stop string")

    @property
    def is_plain_greedy(self) -> bool:
        """True when the token is the argmax of the model's own logits and nothing else is asked."""
        return (
            self.temperature == 0
            and self.logprobs is None
            and not self.logit_bias
            and not self.uses_penalties
            and self.min_tokens == 0
        )

    @property
    def uses_penalties(self) -> bool:
        """True when logits depend on the tokens seen before."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token under the model's own distribution (before penalties)."""

    logprob: float
    rank: int
    """1 is the most likely token."""


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end of sequence."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token: token id -> logprob, for the sampled token and the most likely ones."""
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request on the engine's monotonic clock, in seconds."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    num_preemptions: int = 0
    num_generated_tokens: int = 0
    """Over all `n` sequences."""
    longest_output_tokens: int = 0
    """Of the longest of them."""

    @property
    def ttft_s(self) -> float | None:
        """Time from arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first, of the longest sequence; None below two tokens.

        vLLM's definition, (E2E - TTFT) / (output tokens - 1), where there is one sequence.
        """
        if self.finished_s is None or self.longest_output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.longest_output_tokens - 1)


@dataclass(slots=True)
class RequestOutput:
    """What a request has produced so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sequence of a request."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
