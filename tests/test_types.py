"""What a request may ask for, and the times that are read from its metrics."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

import jpd
from jpd.errors import JpdError, RequestError, UnknownArgumentError
from jpd.types import FinishReason, RequestMetrics, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", "2"),
        ("n", True),
        ("n", 0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", 1.5),
        ("top_k", -2),
        ("top_k", True),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("seed", 2**63),
        ("seed", 1.0),
        ("seed", True),
        ("max_tokens", 0),
        ("timeout_s", 0),
        ("timeout_s", float("nan")),
        ("timeout_s", "1"),
        ("max_tokens", "16"),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", None),
        ("min_tokens", 17),  # max_tokens is 16
        ("stop", [""]),
        ("stop", ""),
        ("stop", [1]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 5),
        ("stop_token_ids", range(21)),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("logit_bias", [1]),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1.5: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: "x"}),
        ("logit_bias", dict.fromkeys(range(301), 0)),
        ("ignore_eos", "no"),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", "yes"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match="is not allowed") as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name)
    shown = value
    if isinstance(value, dict):
        ((key, shown),) = list(value.items())[:1]
        if len(value) > 1:
            shown = f"{len(value)} entries"
        else:
            assert f"[{key!r}]" in message
    elif isinstance(value, list | range):
        shown = value[0]
    assert repr(shown).strip("'") in message
    assert error.value.http_status == 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0"),
        ({"include_stop_str_in_output": True}, "needs a stop string"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 .* at most max_tokens=4"),
    ],
)
def test_a_contradiction_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("name", "near"),
    [("temprature", "temperature"), ("max_token", "max_tokens")],
)
def test_an_unknown_parameter_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownArgumentError, match=f"{name!r}; did you mean '{near}"):
        SamplingParams(**{name: 1})


def test_an_unknown_parameter_is_the_type_error_that_python_users_expect() -> None:
    with pytest.raises(TypeError, match="'xyzzy'; known: n, temperature"):
        SamplingParams(xyzzy=1)
    with pytest.raises(TypeError):
        SamplingParams(2)
    assert issubclass(UnknownArgumentError, JpdError)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3, "temperature": 100, "top_p": 1e-6, "top_k": -1, "min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 0.1},
        {"seed": -(2**63), "max_tokens": None, "min_tokens": 50, "logprobs": 20},
        {"seed": 2**63 - 1, "max_tokens": 1, "min_tokens": 1, "logprobs": 0},
        {"stop": ["a", "b"], "stop_token_ids": list(range(20)), "ignore_eos": True},
        {"logit_bias": dict.fromkeys(range(300), -100)},
    ],
)
def test_the_limits_themselves_are_allowed(options: dict[str, Any]) -> None:
    SamplingParams(**options)


def test_forms_are_brought_to_one() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3, 4], top_k=-1, logit_bias={5: 1})
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.top_k == 0
    empty = SamplingParams(stop=None, stop_token_ids=None)
    assert empty.stop == empty.stop_token_ids == ()


def test_parameters_can_be_copied_pickled_and_changed() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"], logit_bias={1: 2.0})
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, temperature=0).temperature == 0
    with pytest.raises(RequestError, match="top_p=2"):
        dataclasses.replace(params, top_p=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.1},
        {"logprobs": 0},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
    ],
)
def test_plain_greedy_asks_for_nothing_but_the_argmax(option: dict[str, Any]) -> None:
    neutral = {"logit_bias": {}, "top_k": 5, "seed": 1, "stop_token_ids": [1], "ignore_eos": True}
    assert SamplingParams(temperature=0, **neutral).is_plain_greedy
    assert not SamplingParams(**({"temperature": 0} | option)).is_plain_greedy
    assert SamplingParams(**option).uses_penalties == any("penalty" in name for name in option)


def test_times_to_and_between_tokens() -> None:
    metrics = RequestMetrics(arrival_s=10.0)
    assert metrics.ttft_s is metrics.tpot_s is None
    metrics.first_token_s, metrics.longest_output_tokens = 10.5, 1
    assert metrics.ttft_s == 0.5
    metrics.finished_s = 12.5
    assert metrics.tpot_s is None
    metrics.longest_output_tokens = 5
    assert metrics.tpot_s == 0.5


def test_finish_reasons_are_their_strings() -> None:
    assert [str(r) for r in FinishReason] == ["stop", "length", "abort", "timeout", "error"]
    assert FinishReason.STOP == "stop"


def test_the_public_names_are_there() -> None:
    for name in jpd.__all__:
        assert getattr(jpd, name) is not None
