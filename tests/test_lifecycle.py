"""What ends an engine, what does not, and what is left after it."""

import os
import signal
import weakref

import jax
import numpy as np
import pytest

import jpd
from jpd import EngineDeadError, RequestError, SamplingParams
from tests import tiny_models

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
OPTIONS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "num_pages": 40,
    "batch_buckets": (4,),
    "token_buckets": (64,),
    "context_buckets": (128,),
    "show_progress": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_checkpoint("llama3", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def llm(folder):
    with jpd.LLM(str(folder), **OPTIONS) as llm:
        yield llm


def test_an_interrupt_waits_for_the_step_and_harms_nobody(llm, monkeypatch):
    expected = llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids
    stream = llm.stream([1, 2, 3], GREEDY)
    first = next(stream)
    executor = llm._engine.executor
    launch = executor.launch

    def interrupted(plan):
        monkeypatch.setattr(executor, "launch", launch)
        os.kill(os.getpid(), signal.SIGINT)
        return launch(plan)

    monkeypatch.setattr(executor, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[4, 5, 6]], GREEDY)
    rest = [token for delta in stream for token in delta.token_ids]
    assert [*first.token_ids, *rest] == expected
    assert llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids == expected


def test_a_step_that_fails_ends_the_engine_with_its_cause(llm, monkeypatch):
    def broken(plan):
        raise MemoryError("no more")

    stream = llm.stream([1, 2, 3], GREEDY)
    next(stream)
    monkeypatch.setattr(llm._engine.executor, "launch", broken)
    with pytest.raises(MemoryError):
        llm.generate([[4, 5, 6]], GREEDY)
    with pytest.raises(EngineDeadError, match="MemoryError: no more"):
        list(stream)
    with pytest.raises(EngineDeadError, match="MemoryError: no more"):
        llm.generate([[4, 5, 6]], GREEDY)


def test_close_lets_go_of_the_device_and_of_the_engine(folder):
    llm = jpd.LLM(str(folder), **OPTIONS)
    stream = llm.stream([1, 2, 3], GREEDY)
    next(stream)
    leaf = weakref.ref(jax.tree.leaves(llm._engine.executor.kv)[0])
    output = llm._engine.coordinator._requests["0"].output
    llm.close()
    assert output.outputs[0].finish_reason == "abort"
    assert leaf() is None
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([[1]], GREEDY)
    llm.close()


def test_close_of_the_concurrent_face_lets_go_too(folder):
    llm = jpd.AsyncLLM(str(folder), **OPTIONS)
    leaf = weakref.ref(jax.tree.leaves(llm._engine.executor.kv)[0])
    llm.close()
    assert leaf() is None


def test_an_llm_that_is_dropped_frees_its_pages_without_the_collector(folder):
    llm = jpd.LLM(str(folder), **OPTIONS)
    llm.generate([[1, 2, 3]], GREEDY)
    leaf = weakref.ref(jax.tree.leaves(llm._engine.executor.kv)[0])
    del llm
    assert leaf() is None


def test_sequences_of_a_request_share_its_prompt(llm):
    prompt = list(range(1, 41))
    outputs = llm.generate([prompt], SamplingParams(n=4, temperature=1, seed=0, max_tokens=2))
    assert len(outputs[0].outputs) == 4
    # Two whole pages of 16 are computed once and found three times.
    assert llm.stats.cached_tokens == 3 * 32


def test_params_from_the_host_are_put_on_the_device_once(llm):
    before = llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids
    llm.params = jax.tree.map(np.asarray, llm.params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(llm.params))
    assert llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids == before
    with pytest.raises(jpd.ConfigError, match="structure, shapes and dtypes"):
        llm.params = jax.tree.map(lambda leaf: 0.0, llm.params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"priority": "high"}, "priority='high'"),
        ({"priority": True}, "priority=True"),
        ({"params": {"max_tokens": 3}}, "sampling_params="),
        ({"request_id": 5}, "request_id=5"),
        ({"params": SamplingParams(max_tokens=None, min_tokens=126)}, "min_tokens=126"),
    ],
)
def test_the_coordinator_refuses_what_it_cannot_serve(llm, arguments, message):
    request = {"request_id": "r", "params": GREEDY, "priority": 0} | arguments
    with pytest.raises(RequestError, match=message):
        llm._engine.coordinator.add(prompt=None, prompt_token_ids=[1, 2, 3], **request)
    assert not llm._engine.coordinator.has_work


def test_pages_that_cannot_fit_are_refused_before_they_are_made(folder):
    with pytest.raises(jpd.ConfigError, match=r"num_pages=1000000000 .* at most \d+"):
        jpd.LLM(str(folder), **OPTIONS | {"num_pages": 10**9})


def test_buckets_below_the_limits_are_said(folder, caplog):
    with jpd.LLM(str(folder), **OPTIONS | {"batch_buckets": (2,)}):
        assert "batch_buckets end at 2, max_num_seqs=4" in caplog.text
