"""Bad input: an error at once that names the value and the limit, and everybody else goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jpd
from jpd import config
from jpd.engine import memory
from jpd.errors import ConfigError, PromptTooLongError, RequestError, UnknownArgumentError
from tests import tiny_models
from tests.engine.tiny_engine import MODEL, SIZES, drain

GREEDY = jpd.SamplingParams(temperature=0, max_tokens=4)
# Few pages: the longest request that `max_model_len` allows does not fit them.
OPTIONS = SIZES | {"num_pages": 13, "skip_tokenizer_init": True, "show_progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> jpd.LLM:
    return jpd.LLM(str(folder), **OPTIONS)


# ---- requests

PROMPTS = [
    pytest.param("", RequestError, "the prompt is empty", id="empty-text"),
    pytest.param([[]], RequestError, "the prompt is empty", id="empty-ids"),
    pytest.param({"prompt": ""}, RequestError, "the prompt is empty", id="empty-dict"),
    pytest.param("hi", RequestError, "skip_tokenizer_init=True", id="text-without-tokenizer"),
    pytest.param([-1], RequestError, r"token id -1 is not in \[0, 256\)", id="negative"),
    pytest.param([3, 256], RequestError, r"token id 256 is not in \[0, 256\)", id="vocabulary"),
    pytest.param([10**12], RequestError, r"token id 10{12} is not in \[0, 256\)", id="huge"),
    pytest.param([1.5], RequestError, r"not list '\[1.5\]'", id="float"),
    pytest.param([5, True], RequestError, "token id True at position 1 is a bool", id="bool"),
    pytest.param(
        {"prompt_token_ids": (False,)},
        RequestError,
        "token id False at position 0 is a bool",
        id="bool-in-dict",
    ),
    pytest.param(np.array([True]), RequestError, r"not ndarray '\[ True\]'", id="bool-array"),
    pytest.param(None, RequestError, "not NoneType 'None'", id="none"),
    pytest.param(7, RequestError, "not int '7'", id="number"),
    pytest.param(b"abc", RequestError, "not bytes", id="bytes"),
    pytest.param({"promt": "x"}, RequestError, r"not \['promt'\]", id="unknown-key"),
    pytest.param({"prompt_token_ids": "a"}, RequestError, "not str 'a'", id="text-as-ids"),
    pytest.param(
        {"prompt": 5, "prompt_token_ids": [1]},
        RequestError,
        "'prompt' of a prompt dict is text, not int '5'",
        id="number-beside-ids",
    ),
    pytest.param(
        {"prompt": [1, 2]}, RequestError, r"is text, not list '\[1, 2\]'", id="ids-as-text"
    ),
    pytest.param(
        [1] * 128, PromptTooLongError, "128 tokens; max_model_len=128 .* at most 127", id="too-long"
    ),
    pytest.param(
        [1] * 125,
        PromptTooLongError,
        r"125 tokens \+ max_tokens=4 exceeds max_model_len=128",
        id="no-room-for-the-answer",
    ),
    pytest.param(
        [1] * 100, PromptTooLongError, "needs 13 pages of 8 tokens; the engine has 12", id="pages"
    ),
]


@pytest.mark.parametrize(("prompt", "error", "message"), PROMPTS)
def test_a_bad_prompt_is_refused_at_once(
    llm: jpd.LLM, prompt: Any, error: type[Exception], message: str
) -> None:
    steps = llm.stats.steps
    for call in (llm.generate, llm.stream):
        with pytest.raises(error, match=message):
            call(prompt, GREEDY)
    assert llm.stats.waiting == llm.stats.running == 0
    assert llm.stats.steps == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "end"}, r"stop=\('end',\) needs a tokenizer"),
        ({"stop_token_ids": [300]}, r"stop_token_ids 300 is not in \[0, 256\)"),
        ({"logit_bias": {256: 1.0}}, r"logit_bias token id 256 is not in \[0, 256\)"),
        ({"max_tokens": 126}, r"max_tokens=126 exceeds max_model_len=128"),
        ({"max_tokens": None}, "max_tokens=None needs 16 pages of 8 tokens; the engine has 12"),
    ],
)
def test_parameters_that_this_model_cannot_serve_are_refused(
    llm: jpd.LLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([1, 2, 3], jpd.SamplingParams(temperature=0, **options))


def test_one_bad_request_of_a_batch_starts_none_of_it(llm: jpd.LLM) -> None:
    before = llm.stats
    with pytest.raises(RequestError, match="token id 999"):
        llm.generate([[1], [2], [999]], GREEDY)
    assert llm.stats == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_params": [GREEDY]}, "1 sampling_params for 2 prompts"),
        ({"sampling_params": {"n": 1}}, r"sampling_params=\{'n': 1\} is not allowed"),
        ({"sampling_params": [GREEDY, None]}, "is not allowed: a list of SamplingParams"),
        ({"priority": [0]}, "1 priority for 2 prompts"),
        ({"priority": 3}, "priority=3 is not allowed: a list of int"),
        ({"priority": [0, 1]}, "priority=1 needs scheduling_policy='priority'"),
    ],
)
def test_arguments_that_do_not_fit_the_prompts(
    llm: jpd.LLM, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([[1], [2]], **arguments)


def test_the_others_go_on_while_bad_requests_come(llm: jpd.LLM) -> None:
    (want,) = llm.generate([5, 6, 7], jpd.SamplingParams(temperature=0, max_tokens=12))
    stream = llm.stream([5, 6, 7], jpd.SamplingParams(temperature=0, max_tokens=12))
    got = list(next(stream).token_ids)
    for case in PROMPTS:
        prompt, error, _ = case.values
        with pytest.raises(error):
            llm.generate(prompt, GREEDY)
        got += next(stream, None).token_ids if len(got) < 12 else []
    got += [t for delta in stream for t in delta.token_ids]
    assert got == want.outputs[0].token_ids


def test_a_chat_needs_a_tokenizer(llm: jpd.LLM) -> None:
    with pytest.raises(RequestError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_a_stream_that_is_never_read_or_not_to_its_end_leaves_nothing_behind(llm: jpd.LLM) -> None:
    unread = llm.stream([5, 6, 7], GREEDY)
    assert llm.stats.waiting == 0
    del unread
    before = llm.stats.requests_aborted
    stream = llm.stream([[5, 6, 7], [8, 9]], jpd.SamplingParams(temperature=0, max_tokens=50))
    next(stream)
    stream.close()
    assert llm.stats.requests_aborted == before + 2
    assert llm.stats.running == llm.stats.waiting == 0
    assert llm.stats.free_pages == OPTIONS["num_pages"] - 1
    assert not llm._streams
    drain(llm._engine.coordinator)


def test_two_streams_are_served_together(llm: jpd.LLM) -> None:
    params = jpd.SamplingParams(temperature=0, max_tokens=8)
    prompts = [[5, 6, 7], [8, 9]]
    want = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    streams = [llm.stream(p, params) for p in prompts]
    got: list[list[int]] = [[], []]
    for _ in range(8):
        for stream, ids in zip(streams, got, strict=True):
            ids += next(stream).token_ids
    assert got == want
    assert [list(s) for s in streams] == [[], []]


# ---- parameters of the model


def test_new_parameters_forget_the_prefixes_and_change_the_tokens(llm: jpd.LLM) -> None:
    prompt, old = list(range(40, 80)), llm.params
    try:
        first, again = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
        assert again.metrics.num_cached_tokens == 32
        llm.params = jax.tree.map(lambda a: -a, old)
        other = llm.generate(prompt, GREEDY)[0]
        assert other.metrics.num_cached_tokens == 0
        assert other.outputs[0].token_ids != first.outputs[0].token_ids
    finally:
        llm.params = old
    back = llm.generate(prompt, GREEDY)[0]
    assert back.metrics.num_cached_tokens == 0
    assert back.outputs[0].token_ids == first.outputs[0].token_ids


def test_parameters_swapped_in_the_middle_of_an_answer_are_not_mixed(llm: jpd.LLM) -> None:
    old = llm.params
    prompt = list(range(90, 130))
    (want,) = llm.generate(prompt, GREEDY)
    llm.params = jax.tree.map(lambda a: a * 0.5, old)
    coordinator = llm._engine.coordinator
    coordinator.add("mixed", None, prompt, jpd.SamplingParams(temperature=0, max_tokens=30))
    coordinator.step()  # the first part of the prompt is on the device, by the wrong parameters
    llm.params = old
    drain(coordinator)
    (again,) = llm.generate(prompt, GREEDY)
    assert again.metrics.num_cached_tokens == 0
    assert again.outputs[0].token_ids == want.outputs[0].token_ids


@pytest.mark.parametrize(
    "change",
    [
        lambda p: jax.tree.map(lambda a: a.astype("bfloat16"), p),
        lambda p: jax.tree.map(lambda a: a[..., :1], p),
        lambda p: {k: v for k, v in p.items() if k != "norm"},
    ],
    ids=["dtype", "shape", "missing"],
)
def test_parameters_of_another_shape_are_refused(llm: jpd.LLM, change: Callable) -> None:
    old = llm.params
    with pytest.raises(ConfigError, match="structure, shapes and dtypes"):
        llm.params = change(old)
    assert llm.params is old


# ---- engines


def refuse(folder: Path | str, error: type[Exception], message: str, **options: Any) -> None:
    """The engine is not built, and the model is not loaded for finding that out."""
    with pytest.raises(error, match=message):
        jpd.LLM(str(folder), **(OPTIONS | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 0}, "max_model_len=0 is not allowed: an int >= 1"),
        ({"max_model_len": True}, "max_model_len=True is not allowed"),
        ({"max_model_len": 513}, "max_model_len=513 .* max_position_embeddings=512"),
        ({"max_num_seqs": "8"}, "max_num_seqs='8' is not allowed"),
        (
            {"max_num_batched_tokens": 7},
            "max_num_batched_tokens=7 is not allowed: at least max_num_seqs=8",
        ),
        ({"max_num_batched_tokens": 10**6}, "max_num_batched_tokens=1000000 .* at most 65536"),
        ({"max_num_mixed_tokens": 0}, "max_num_mixed_tokens=0 is not allowed: an int >= 1"),
        (
            {"max_num_mixed_tokens": 7},
            "max_num_mixed_tokens=7 is not allowed: at least max_num_seqs=8",
        ),
        (
            {"max_num_mixed_tokens": 9999},
            "max_num_mixed_tokens=9999 is not allowed: at most max_num_batched_tokens=",
        ),
        ({"page_size": 12}, "page_size=12 is not allowed: a power of two"),
        ({"page_size": None}, "page_size=None is not allowed"),
        ({"num_pages": 1}, "num_pages=1 is not allowed: an int >= 2"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan .* in (0, 1]"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9'"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"dtype": "int8"}, "dtype='int8' is not allowed: one of"),
        ({"load_format": "pt"}, "load_format='pt' is not allowed: one of"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy='lifo' is not allowed: one of"),
        ({"batch_buckets": ()}, r"batch_buckets=\(\) is not allowed"),
        ({"batch_buckets": 8}, "batch_buckets=8 is not allowed"),
        ({"context_buckets": (0,)}, r"context_buckets=\(0,\) is not allowed"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching='no' is not allowed"),
        ({"seed": "x"}, "seed='x' is not allowed"),
        ({"kernels": "xla"}, "kernels='xla' is not allowed"),
        ({"kernels": {"linear": "fast"}}, "kernels.linear='fast' .* known: auto, .*xla"),
    ],
)
def test_a_bad_engine_argument(folder: Path, options: dict[str, Any], message: str) -> None:
    refuse(folder, ConfigError, message.replace("(0, 1]", r"\(0, 1\]"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 4}, "'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"gpu_memory_utilisation": 0.5}, "did you mean 'gpu_memory_utilization'"),
        ({"gpu_share": 0.5}, "has no field 'gpu_share'; known: model, tokenizer, "),
        ({"kernels": {"linaer": "xla"}}, "'linaer'; did you mean 'linear'"),
    ],
)
def test_an_unknown_engine_argument_names_the_nearest(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    refuse(folder, UnknownArgumentError, message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 of vLLM .* by tensor_parallel"),
        ({"quantization": "fp8"}, "quantization='fp8' of vLLM is not supported by jpd"),
        ({"block_size": 16}, "block_size=16 of vLLM .* jpd calls it page_size"),
        ({"num_gpu_blocks_override": 9}, "num_gpu_blocks_override=9 .* jpd calls it num_pages"),
        ({"trust_remote_code": True}, "trust_remote_code=True .* never runs code"),
    ],
)
def test_an_argument_of_vllm_says_what_jpd_has_instead(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    refuse(folder, UnknownArgumentError, message, **options)


def test_names_of_vllm_that_jpd_has_are_not_refused() -> None:
    fields = {f.name for f in dataclasses.fields(jpd.EngineConfig)}
    assert fields & config._VLLM_NAMES.keys() == set()


def test_a_folder_without_config(tmp_path: Path) -> None:
    refuse(tmp_path, ConfigError, r"config\.json")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    config = tiny_models.CASES[MODEL] | {"architectures": ["GPTBigCodeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse(tmp_path, ConfigError, r"GPTBigCodeForCausalLM.* is not supported; known: LlamaFor")


@pytest.mark.parametrize("num_pages", [13, None])
def test_a_model_too_large_for_the_memory(
    folder: Path, num_pages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: 16 << 30)
    monkeypatch.setattr("jpd.checkpoint.param_bytes", lambda config, dtype: 15 << 30)
    monkeypatch.setattr("jpd.checkpoint.load", lambda *a, **k: pytest.fail("it was loaded"))
    refuse(
        folder,
        ConfigError,
        r"weights need 15\.00 GiB; .* has 16\.00 GiB, .*utilization=0\.9 allows 14\.40 GiB",
        num_pages=num_pages,
    )


def test_no_memory_for_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: 1 << 24)
    monkeypatch.setattr("jpd.checkpoint.load", lambda *a, **k: pytest.fail("it was loaded"))
    refuse(
        folder,
        ConfigError,
        "no memory is left for KV pages: .*max_num_batched_tokens=32.*max_num_seqs=8",
        num_pages=None,
    )
