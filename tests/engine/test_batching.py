"""Batching changes nothing: whatever else runs, a request gets the tokens that it gets alone.

"Alone" is shown twice, by means that share nothing with the paged engine under test: the dense
model says after the fact that each token was the argmax of its own logits (which, token by token,
is what a greedy loop without a cache computes), and an engine with other pages, other chunks, no
sharing and one row serves each request by itself.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from jpd import models
from jpd.engine.build import Engine
from jpd.engine.coordinator import Coordinator
from jpd.types import FinishReason, RequestOutput, SamplingParams
from tests import tiny_models
from tests.engine.tiny_engine import MODEL, drain, fresh, greedy, run, tiny_engine, tokens

VOCAB = tiny_models.CASES[MODEL]["vocab_size"]
CLEAR = 1e-4
"""The two best logits of every greedy choice below are at least this far apart, a hundred times
the rounding errors, so that tokens may be compared for equality on any machine."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine under test; whatever the tests do, it never compiles while it serves."""
    engine = tiny_engine(tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model")))
    yield engine
    assert engine.executor.compiled.recompiles == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One row, whole prompts in one chunk, other pages, no sharing, nothing in flight."""
    folder = tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model"))
    return tiny_engine(
        folder,
        max_num_seqs=1,
        max_num_batched_tokens=128,
        max_prefills_per_step=1,
        page_size=16,
        num_pages=9,
        batch_buckets=(1,),
        token_buckets=(128,),
        enable_prefix_caching=False,
        async_scheduling=False,
    )


def dense_logits(engine: Engine, ids: list[int]) -> np.ndarray:
    """Logits `[n, V]` float32 without pages; padded at the end, so that it compiles once."""
    padded = ids + [0] * (engine.config.max_model_len - len(ids))
    logits = models.logits(engine.model_config, engine.executor.params, padded)
    return np.asarray(logits)[: len(ids)]


def assert_greedy(engine: Engine, prompt: list[int], output: list[int]) -> None:
    """Every token is the argmax after those before it, and clearly so."""
    if not output:
        return
    logits = dense_logits(engine, prompt + output)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(logits.argmax(-1), output)
    best = np.sort(logits, axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > CLEAR, "a near tie: choose another seed"


@dataclass
class Work:
    """A request, when it comes, and when it is given up."""

    prompt: list[int]
    params: SamplingParams
    arrives: int
    lives: int | None


def workload(count: int, seed: int) -> list[Work]:
    """Prompts of 1 to 90 tokens, a third of them with a common beginning; one in six aborted."""
    rng = np.random.default_rng(seed)
    common = [rng.integers(5, VOCAB, 56).tolist() for _ in range(3)]
    work = []
    for i in range(count):
        prompt = rng.integers(5, VOCAB, int(rng.choice([1, 7, 8, 9, 30, 33, 60, 90]))).tolist()
        if i % 3 == 0:
            prompt = common[i % 9 // 3][: int(rng.integers(8, 56))] + prompt[:30]
        stops = rng.integers(5, VOCAB, 8).tolist() if i % 4 == 0 else []
        params = greedy(
            max_tokens=int(rng.integers(1, 36)), ignore_eos=i % 2 == 0, stop_token_ids=stops
        )
        lives = int(rng.integers(0, 40)) if i % 6 == 5 else None
        work.append(Work(prompt, params, i // 2, lives))
    return work


def serve(coordinator: Coordinator, work: list[Work], seen: Counter[str]) -> list[RequestOutput]:
    """Runs the workload; counts in `seen` what happened on the way."""
    plan = coordinator.scheduler.plan

    def counting(**phases):
        step = plan(**phases)
        if step is not None:
            seen["chunks that end no prompt"] += sum(not c.last for c in step.chunks)
            seen["mixed steps"] += bool(len(step.rows) and step.chunks)
            seen["most rows"] = max(seen["most rows"], len(step.rows))
        return step

    coordinator.scheduler.plan = counting
    outputs: dict[int, RequestOutput] = {}
    for now in range(5_000):
        for i, w in enumerate(work):
            if w.arrives == now:
                outputs[i] = coordinator.add(str(i), None, w.prompt, w.params)
            if w.lives is not None and w.arrives + w.lives == now:
                seen["aborts"] += bool(coordinator.abort(str(i)))
        coordinator.step()
        coordinator.scheduler.check_integrity()
        if len(outputs) == len(work) and not coordinator.has_work:
            break
    drain(coordinator)
    return [outputs[i] for i in range(len(work))]


def test_200_requests_get_the_tokens_that_they_get_alone(engine: Engine, alone: Engine) -> None:
    work = workload(200, seed=1)
    coordinator = fresh(engine, num_pages=41)
    seen: Counter[str] = Counter()
    outputs = serve(coordinator, work, seen)
    stats = coordinator.stats()

    by_itself = fresh(alone)
    for w, output in zip(work, outputs, strict=True):
        got = output.outputs[0].token_ids
        assert_greedy(alone, w.prompt, got)
        (want,) = run(by_itself, [w.prompt], w.params)
        if output.outputs[0].finish_reason is FinishReason.ABORT:
            assert got == want.outputs[0].token_ids[: len(got)]
        else:
            assert got == want.outputs[0].token_ids
            assert output.outputs[0].finish_reason == want.outputs[0].finish_reason

    reasons = Counter(o.outputs[0].finish_reason for o in outputs)
    assert reasons[FinishReason.ABORT] == seen["aborts"] == stats.requests_aborted
    assert stats.requests_finished == 200 - seen["aborts"]
    assert min(seen["aborts"], reasons[FinishReason.STOP], stats.preemptions) >= 10
    assert seen["chunks that end no prompt"] >= 50
    assert seen["mixed steps"] >= 50
    assert seen["most rows"] == 8
    assert stats.cached_tokens >= 500
    assert sum(o.metrics.num_cached_tokens for o in outputs) == stats.cached_tokens


def sampled_params(count: int) -> list[SamplingParams]:
    """Every way to sample, each with its own seed, and some greedy among them."""
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 12, "n": 2},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"temperature": 0, "frequency_penalty": 1.5},
        {"temperature": 0},
        {"temperature": 1.0, "min_tokens": 6, "logit_bias": {2: 8.0, 3: 8.0}, "n": 2},
    ]
    return [
        SamplingParams(**kinds[i % len(kinds)], seed=i - 5, max_tokens=8 + i % 17)
        for i in range(count)
    ]


def random_prompts(count: int, seed: int, longest: int = 70) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCAB, int(rng.integers(1, longest))).tolist() for _ in range(count)]


def test_a_seed_gives_the_same_tokens_in_a_batch_and_alone(engine: Engine, alone: Engine) -> None:
    prompts, params = random_prompts(40, seed=2), sampled_params(40)
    crowded = fresh(engine, num_pages=41)
    together = run(crowded, prompts, params)
    assert crowded.stats().preemptions > 0
    by_itself = fresh(alone)
    apart = [run(by_itself, [p], [q])[0] for p, q in zip(prompts, params, strict=True)]
    assert tokens(together) == tokens(apart)
    two = tokens(together)[2]
    assert two[0] != two[1], "the sequences of one request drew the same numbers"


def test_the_seed_decides_and_nothing_else_does(engine: Engine) -> None:
    prompt = random_prompts(1, seed=3)[0]
    params = [SamplingParams(temperature=1.5, seed=s, max_tokens=12) for s in (7, 8, 7)]
    first, other, again = tokens(run(fresh(engine), [prompt] * 3, params))
    assert first == again != other


def test_one_step_in_flight_changes_no_token(engine: Engine) -> None:
    prompts, params = random_prompts(40, seed=4), sampled_params(40)
    results = []
    for asynchronous in (True, False):
        coordinator = fresh(engine, num_pages=41, async_scheduling=asynchronous)
        results.append(tokens(run(coordinator, prompts, params)))
        assert coordinator.stats().preemptions > 0
    assert results[0] == results[1]


def test_prefix_sharing_changes_no_token(engine: Engine) -> None:
    common = random_prompts(1, seed=5)[0]
    prompts = [common + p[:20] for p in random_prompts(20, seed=6)]
    params = sampled_params(20)
    results = []
    for sharing in (True, False):
        coordinator = fresh(engine, enable_prefix_caching=sharing)
        results.append(tokens(run(coordinator, prompts, params)))
        assert (coordinator.stats().cached_tokens > 0) == sharing
    assert results[0] == results[1]


def test_a_prompt_served_again_comes_from_the_cache_with_the_same_tokens(engine: Engine) -> None:
    coordinator = fresh(engine)
    prompt = random_prompts(1, seed=7)[0][:20] * 2
    first, again = (run(coordinator, [prompt], greedy(max_tokens=12))[0] for _ in range(2))
    assert first.metrics.num_cached_tokens == 0
    # Whole pages of 8, and at least one token is left to compute.
    assert again.metrics.num_cached_tokens == (len(prompt) - 1) // 8 * 8 > 0
    assert coordinator.stats().cached_tokens == again.metrics.num_cached_tokens
    assert tokens([first]) == tokens([again])


def test_logprobs_are_those_of_the_dense_model(engine: Engine) -> None:
    prompts = random_prompts(6, seed=8)
    params = [
        SamplingParams(temperature=t, seed=1, max_tokens=10, logprobs=k, logit_bias=bias)
        for t, k, bias in [
            (0, 0, None),
            (0, 5, None),
            (1.0, 20, None),
            (0.5, 3, {9: 5.0}),
            (1.0, 1, None),
            (0, None, None),
        ]
    ]
    for prompt, param, output in zip(
        prompts, params, run(fresh(engine), prompts, params), strict=True
    ):
        completion = output.outputs[0]
        if param.logprobs is None:
            assert completion.logprobs is completion.cumulative_logprob is None
            continue
        logits = dense_logits(engine, prompt + completion.token_ids)[len(prompt) - 1 : -1]
        want = np.asarray(jax.nn.log_softmax(logits.astype(np.float64), axis=-1))
        total = 0.0
        assert len(completion.logprobs) == len(completion.token_ids)
        for row, token, entry in zip(want, completion.token_ids, completion.logprobs, strict=True):
            top = np.argsort(-row)[: param.logprobs].tolist()
            assert list(entry) == [token, *(t for t in top if t != token)]
            for other, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[other], abs=2e-5)
                assert logprob.rank == 1 + (row > row[other]).sum()
            total += entry[token].logprob
        assert completion.cumulative_logprob == pytest.approx(total)


def test_min_tokens_holds_back_every_end(engine: Engine) -> None:
    (prompt,) = random_prompts(1, seed=9)
    first = tokens(run(fresh(engine), [prompt], greedy(max_tokens=1)))[0][0][0]
    biased = {"logit_bias": {2: 100.0}, "max_tokens": 9}
    params = [
        greedy(**biased),
        greedy(**biased, min_tokens=4),
        greedy(max_tokens=9, stop_token_ids=[first]),
        greedy(max_tokens=9, stop_token_ids=[first], min_tokens=4),
        greedy(**biased, ignore_eos=True),
    ]
    eos, late_eos, stop, late_stop, ignored = (
        o.outputs[0] for o in run(fresh(engine), [prompt] * len(params), params)
    )
    assert (eos.token_ids, eos.finish_reason, eos.stop_reason) == ([2], "stop", None)
    assert late_eos.token_ids[4:] == [2]
    assert not {2, 3, 4} & set(late_eos.token_ids[:4])
    assert (stop.token_ids, stop.stop_reason) == ([first], first)
    assert len(late_stop.token_ids) >= 5
    assert first not in late_stop.token_ids[:4]
    assert ignored.token_ids == [2] * 9
    assert ignored.finish_reason is FinishReason.LENGTH


def test_max_tokens_none_runs_to_max_model_len(engine: Engine) -> None:
    (prompt,) = random_prompts(1, seed=10)
    (output,) = run(fresh(engine), [prompt], greedy(max_tokens=None, ignore_eos=True))
    completion = output.outputs[0]
    assert len(prompt) + len(completion.token_ids) == engine.config.max_model_len
    assert completion.finish_reason is FinishReason.LENGTH
    assert_greedy(engine, prompt, completion.token_ids)


def test_greedy_requests_alone_need_no_sampled_steps(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model"))
    other = tiny_engine(folder, compile_sampled_steps=False)
    assert len(other.executor.compiled._steps) == len(engine.executor.compiled._steps) - 2
    prompts = random_prompts(3, seed=12, longest=60)
    for params, compiled in (
        (greedy(max_tokens=9), 0),
        (SamplingParams(temperature=0.8, seed=5, max_tokens=9), 2),
        (greedy(max_tokens=9, logprobs=2), 2),
    ):
        served, wanted = (run(fresh(e), prompts, params) for e in (other, engine))
        assert tokens(served) == tokens(wanted)
        assert other.executor.recompiles == compiled


def test_a_shape_that_was_not_compiled_is_counted_and_logged(
    alone: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = fresh(alone)
    before = alone.executor.compiled.recompiles
    assert before == coordinator.stats().recompiles == 0
    shapes = alone.executor.shapes
    shapes.contexts = (64,)  # as if the user had named too short a bucket
    try:
        with caplog.at_level(logging.WARNING, logger="jpd"):
            run(coordinator, random_prompts(1, seed=11, longest=30), greedy(max_tokens=4))
    finally:
        shapes.contexts = (128,)
    assert coordinator.stats().recompiles == 2
    messages = [r.getMessage() for r in caplog.records if "while serving" in r.getMessage()]
    assert len(messages) == 2
    assert "context=64" in messages[0]
