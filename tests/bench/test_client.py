"""The load generator on a tiny engine, and on one that fails in every way."""

import asyncio
import itertools
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

import jpd
from jpd import ConfigError, Delta, EngineDeadError, FinishReason, RequestError
from jpd.bench import client, slo
from jpd.bench.client import ClientOptions, run, run_alone, run_at_once
from jpd.bench.traces import fixed
from jpd.bench.workload import Workload, poisson
from jpd.errors import JpdError
from tests.engine.tiny_engine import MODEL, SIZES
from tests.faces.callers import in_step
from tests.tiny_models import make_checkpoint

BARE = ClientOptions(num_warmups=0)


def finish(coroutine):
    """Runs it on an event loop; nothing takes minutes unless it hangs."""
    return asyncio.run(asyncio.wait_for(coroutine, 300))


@pytest.fixture
def clock(monkeypatch):
    """The client's; setting `ahead_s` lets time pass, on event loops that `follow` it too."""
    clock = SimpleNamespace(ahead_s=0.0)
    perf_counter = time.perf_counter
    played = SimpleNamespace(perf_counter=lambda: perf_counter() + clock.ahead_s)
    monkeypatch.setattr(client, "time", played)

    def follow(loop):
        really = loop.time
        loop.time = lambda: really() + clock.ahead_s

    clock.follow = follow
    return clock


# ---- a real engine


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_checkpoint(MODEL, tmp_path_factory.mktemp("model"))
    options = {"skip_tokenizer_init": True, "show_progress": False, "compilation_cache_dir": ""}
    llm = jpd.AsyncLLM(str(folder), **SIZES | options)
    yield llm
    llm.close()


def test_a_workload_on_a_real_engine(llm):
    workload = Workload(
        "mixed",
        arrivals_s=poisson(100.0, 20, seed=0),
        prompt_tokens=np.arange(20) * 4 + 1,
        output_tokens=[1, 2, 7, 30] * 5,
        source="here",
    )
    before = llm.stats
    records = finish(run(llm, workload, ClientOptions(num_warmups=2, token_times=True)))
    assert llm.stats.requests_finished - before.requests_finished == 22
    assert len(records) == 20
    for record, due_s, prompt, wanted in zip(
        records,
        workload.arrivals_s,
        workload.prompt_tokens,
        workload.output_tokens,
        strict=True,
    ):
        assert record.ok
        assert (record.due_s, record.prompt_tokens, record.output_tokens) == (due_s, prompt, wanted)
        assert record.due_s <= record.sent_s < record.first_token_s <= record.finished_s
        assert len(record.token_times_s) == wanted
        assert list(record.token_times_s) == sorted(record.token_times_s)
        assert record.token_times_s[0] == record.first_token_s
        assert record.token_times_s[-1] == record.finished_s
    summary = slo.summarize(records)
    assert summary["completed"] == 20
    assert summary["total_input_tokens"] == workload.prompt_tokens.sum()
    assert slo.attainment(records, slo.Slo(300.0, 300.0)).joint == 1
    assert (llm.stats.running, llm.stats.waiting) == (0, 0)


def test_one_at_a_time_on_a_real_engine(llm):
    records = finish(run_alone(llm, fixed(np.zeros(4), 9, 5), BARE))
    for earlier, later in itertools.pairwise(records):
        assert earlier.finished_s <= later.sent_s
    assert slo.slo_from_unloaded(records, slo.TIGHT).tpot_s > 0
    assert records[0].token_times_s == ()


def test_at_once_until_some_have_ended(llm, monkeypatch):
    in_step(llm, monkeypatch)
    outputs = [100, 3, 100, 6]
    workload = Workload("w", [0, 50, 100, 150], [9] * 4, outputs, "here")
    before = llm.stats
    records = finish(run_at_once(llm, workload, BARE, until=2))
    assert [(record.ok, record.output_tokens) for record in records] == [(True, 3), (True, 6)]
    assert {record.due_s for record in records} == {0.0}
    # The engine is free for the next run.
    assert all(record.ok for record in finish(run(llm, fixed(np.zeros(2), 9, 5), BARE)))
    assert llm.stats.requests_finished - before.requests_finished == 2 + 2
    assert llm.stats.requests_aborted - before.requests_aborted == 2
    with pytest.raises(ConfigError, match="until=5 is not allowed: 1 to the 4 requests"):
        finish(run_at_once(llm, workload, BARE, until=5))


def test_a_request_that_can_never_be_served_is_recorded(llm):
    workload = Workload("w", [0, 0.01], [100, 9], [100, 3], "here")  # 200 tokens of 128
    too_long, good = finish(run(llm, workload, BARE))
    assert too_long.error.startswith("PromptTooLongError: ")
    assert "128" in too_long.error
    assert (too_long.output_tokens, too_long.first_token_s) == (0, None)
    assert good.ok
    with pytest.raises(JpdError, match="warm-up request failed: PromptTooLongError"):
        finish(run(llm, workload, ClientOptions(num_warmups=1)))


def test_a_request_that_takes_too_long_is_given_up(llm, monkeypatch, clock):
    in_step(llm, monkeypatch)
    workload = Workload("w", [0, 0], [9, 9], [100, 3], "here")
    options = ClientOptions(num_warmups=0, timeout_s=100)
    before = llm.stats.requests_finished

    async def until_the_time_is_over():
        clock.follow(asyncio.get_running_loop())
        records = asyncio.create_task(run(llm, workload, options))
        while llm.stats.requests_finished == before:
            await asyncio.sleep(0)
        tokens = llm.stats.generated_tokens
        while llm.stats.generated_tokens < tokens + 3:  # by then the client knows of that end
            await asyncio.sleep(0)
        clock.ahead_s = 200
        return await records

    long, short = finish(until_the_time_is_over())
    assert long.error == "not finished after timeout_s=100"
    assert 0 < long.output_tokens < 100
    assert long.e2e_s >= 100
    assert short.ok

    async def until_idle():
        while llm.stats.running or llm.stats.waiting:
            await asyncio.sleep(0.01)

    finish(until_idle())  # it was aborted


# ---- a fake one


@dataclass
class FakeLLM:
    """Gives tokens when `answer` does; remembers what it was sent."""

    answer: object
    sent: list = field(default_factory=list)
    config = SimpleNamespace(seed=0)
    model_config = SimpleNamespace(vocab_size=1000)

    def stream(self, prompt, params):
        self.sent.append((prompt, params))
        return self.answer(len(self.sent) - 1, params.max_tokens)


async def _tokens(counts):
    for count in counts:
        yield Delta("0", 0, "", [1] * count, None)


def test_arrivals_do_not_wait_for_answers():
    """No request gets a token before the last one was sent: a closed loop would hang."""
    last_sent = asyncio.Event()
    workload = fixed(poisson(200.0, 30, seed=0), 4, 2)

    async def answer(i, _):
        if i == len(workload) - 1:
            last_sent.set()
        await last_sent.wait()
        async for delta in _tokens([1, 1]):
            yield delta

    llm = FakeLLM(answer)
    records = finish(run(llm, workload, BARE))
    assert all(record.ok for record in records)
    assert min(r.first_token_s for r in records) >= max(r.sent_s for r in records)
    assert [r.due_s for r in records] == workload.arrivals_s.tolist()
    assert min(r.lateness_s for r in records) >= 0


def test_a_slow_client_shows_its_lateness():
    async def answer(i, _):
        if i == 0:
            time.sleep(0.2)  # holds the loop that sends
        yield Delta("0", 0, "", [1], None)

    records = finish(run(FakeLLM(answer), fixed(np.arange(10) * 0.01, 4, 1), BARE))
    summary = slo.summarize(records)
    assert summary["max_lateness_ms"] > 150
    assert summary["p50_lateness_ms"] > 100


def test_the_clock_starts_after_the_warm_up(clock):
    async def answer(i, n):
        if i == 0:
            clock.ahead_s += 1000
        yield Delta("0", 0, "", [1] * n, None)

    records = finish(run(FakeLLM(answer), fixed(np.zeros(2), 4, 2), ClientOptions(num_warmups=1)))
    assert len(records) == 2
    assert max(r.finished_s for r in records) < 1000


def test_the_command_line_gets_options_without_waiting_for_jax():
    names = "client, slo, traces, workload"
    code = f"import sys; from jpd.bench import {names}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0


def test_prompts_are_random_fixed_by_the_seed_and_new_in_the_warm_up():
    def prompts(**options):
        llm = FakeLLM(lambda i, n: _tokens([n]))
        finish(run(llm, fixed(np.zeros(3), 8, 2), ClientOptions(**options)))
        assert all(p.ignore_eos and p.max_tokens == 2 for _, p in llm.sent)
        return [tuple(prompt) for prompt, _ in llm.sent]

    once = prompts(num_warmups=2)
    assert len(set(once)) == 5
    assert all(len(prompt) == 8 for prompt in once)
    assert prompts(num_warmups=2) == once
    assert prompts(num_warmups=0) == once[2:]
    assert not set(prompts(seed=1, num_warmups=0)) & set(once)


def test_several_tokens_at_once_and_a_truncated_answer():
    def answer(i, n):
        return _tokens([0, 3, n - 3] if i == 0 else [2])

    whole, truncated = finish(
        run(FakeLLM(answer), fixed(np.zeros(2), 4, 5), ClientOptions(num_warmups=0, token_times=1))
    )
    assert whole.ok
    assert len(whole.token_times_s) == 5
    assert len(set(whole.token_times_s)) == 2
    assert (truncated.ok, truncated.error, truncated.output_tokens) == (False, None, 2)
    with pytest.raises(JpdError, match="2 of 5 tokens came"):
        finish(run(FakeLLM(lambda i, n: _tokens([2])), fixed(np.zeros(2), 4, 5), ClientOptions()))


def test_an_engine_that_dies_fails_every_request_that_is_left():
    async def dying():
        yield Delta("0", 0, "", [1], None)
        raise EngineDeadError("the engine has stopped")

    def answer(i, n):
        if i == 0:
            return _tokens([n])
        if i == 1:
            return dying()
        raise EngineDeadError("the engine is closed") if i == 2 else RequestError("no")

    records = finish(run(FakeLLM(answer), fixed(np.zeros(4), 4, 2), BARE))
    assert [r.error for r in records] == [
        None,
        "EngineDeadError: the engine has stopped",
        "EngineDeadError: the engine is closed",
        "RequestError: no",
    ]
    assert records[1].output_tokens == 1
    assert slo.attainment(records, slo.Slo(30, 30)).joint == 0.25


def test_an_aborted_request_is_truncated():
    async def answer(i, n):
        yield Delta("0", 0, "", [1], None)
        yield Delta("0", 0, "", [], FinishReason.ABORT)

    (record,) = finish(run(FakeLLM(answer), fixed(np.zeros(1), 4, 2), BARE))
    assert (record.ok, record.error, record.output_tokens) == (False, None, 1)


def test_a_bug_is_not_taken_for_a_failed_request():
    def answer(i, n):
        raise TypeError("a bug")

    with pytest.raises(ExceptionGroup) as raised:
        finish(run(FakeLLM(answer), fixed(np.zeros(2), 4, 2), BARE))
    assert raised.group_contains(TypeError, match="a bug")


@pytest.mark.parametrize("options", [{"num_warmups": 3}, {"num_warmups": -1}, {"timeout_s": 0}])
def test_options_out_of_range(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.* is not allowed"):
        finish(run(FakeLLM(None), fixed(np.zeros(2), 4, 2), ClientOptions(**options)))
