"""AsyncLLM: concurrent callers, aborts in every form, a dying engine, closing."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from jpd import (
    AsyncLLM,
    EngineConfig,
    EngineDeadError,
    FinishReason,
    PromptTooLongError,
    RequestError,
    SamplingParams,
    UnknownArgumentError,
)
from jpd.engine.build import build
from jpd.engine.coordinator import Coordinator
from tests.faces import SHAPES, make_model

PROMPTS = [[5, 6, 7], [9] * 20, [30, 31], [40, 41, 42, 43, 44], [8, 5, 9], [77] * 11]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    return build(EngineConfig(model=str(folder), **SHAPES))


@pytest.fixture
def llm(engine, monkeypatch):
    """An AsyncLLM with a new coordinator on the executor that was compiled once."""

    def rebuild(config):
        coordinator = Coordinator(
            engine.config,
            engine.model_config,
            engine.executor,
            engine.tokenizer,
            engine.model_config.eos_token_ids,
        )
        return replace(engine, coordinator=coordinator)

    monkeypatch.setattr("jpd.async_llm.build", rebuild)
    llm = AsyncLLM("unused")
    yield llm
    llm.close()
    llm._engine.coordinator.scheduler.check_integrity()


def run(coroutine):
    """Runs a test on an event loop; nothing here may take half a minute."""
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def last(stream):
    return [output async for output in stream][-1]


async def until_idle(llm):
    while llm.stats.running or llm.stats.waiting:
        await asyncio.sleep(0.01)


def pages_in_use(llm):
    return llm.config.num_pages - 1 - llm.stats.free_pages


# ---- answers


def test_concurrent_requests_equal_lone_ones(llm):
    async def main():
        alone = [await last(llm.generate(prompt, GREEDY)) for prompt in PROMPTS]
        together = await asyncio.gather(*(last(llm.generate(p, GREEDY)) for p in PROMPTS))
        return alone, together

    alone, together = run(main())
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert [o.outputs[0].text for o in together] == [o.outputs[0].text for o in alone]
    assert [o.prompt_token_ids for o in together] == PROMPTS
    assert len({o.request_id for o in alone + together}) == 2 * len(PROMPTS)
    assert all(o.finished and o.metrics.ttft_s > 0 and o.metrics.tpot_s > 0 for o in together)
    assert llm.stats.requests_finished == 2 * len(PROMPTS)


def test_snapshots_grow_and_do_not_change_later(llm):
    params = replace(GREEDY, logprobs=2)

    async def main():
        snapshots, seen = [], []
        async for output in llm.generate("the cat", params):
            completion = output.outputs[0]
            snapshots.append(output)
            seen.append((list(completion.token_ids), completion.text, len(completion.logprobs)))
        return snapshots, seen

    snapshots, seen = run(main())
    assert [o.finished for o in snapshots] == [False] * (len(snapshots) - 1) + [True]
    for output, (tokens, text, logprobs) in zip(snapshots, seen, strict=True):
        completion = output.outputs[0]
        assert (completion.token_ids, completion.text) == (tokens, text)
        assert len(completion.logprobs) == logprobs == len(tokens)
        assert output.metrics.num_generated_tokens == len(tokens)
    lengths = [len(tokens) for tokens, _, _ in seen]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == 12
    assert all(seen[-1][0][: len(tokens)] == tokens for tokens, _, _ in seen)
    assert snapshots[-1].prompt == "the cat"


def test_slow_caller_gets_the_newest_state(llm):
    async def main():
        stream = llm.generate([5, 6], LONG)
        await anext(stream)
        await until_idle(llm)
        return [len(o.outputs[0].token_ids) async for o in stream]

    counts = run(main())
    assert counts[-1] == 50
    assert len(counts) <= 2  # the last state may come while the one before it is taken


def test_stream_misses_nothing(llm):
    params = SamplingParams(n=2, seed=3, max_tokens=15, ignore_eos=True)

    async def main():
        whole = await last(llm.generate("a bird", params))
        stream = llm.stream("a bird", params)
        await until_idle(llm)  # all deltas wait for a caller this slow
        return whole, [delta async for delta in stream]

    whole, deltas = run(main())
    for completion in whole.outputs:
        own = [delta for delta in deltas if delta.index == completion.index]
        assert [t for delta in own for t in delta.token_ids] == completion.token_ids
        assert "".join(delta.text for delta in own) == completion.text
        assert [d.finish_reason for d in own] == [None] * 14 + [FinishReason.LENGTH]


def test_chat(llm):
    messages = [{"role": "user", "content": "the cat"}]

    async def main():
        return await last(llm.chat(messages, GREEDY))

    assert run(main()).prompt_token_ids == llm.tokenizer.encode("<s>the cat")
    assert llm.chat_tokens(messages) == llm.tokenizer.encode("<s>the cat")


def test_one_call_into_the_loop_for_each_step(llm):
    async def main():
        loop = asyncio.get_running_loop()
        calls = []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), original(*args))[1]
        await asyncio.gather(*(last(llm.stream(p, GREEDY)) for p in PROMPTS[:4]))
        return len(calls)

    calls = run(main())
    assert llm.stats.generated_tokens == 48
    assert calls <= llm.stats.steps < 48


# ---- bad requests


def test_bad_requests_raise_at_the_call(llm):
    async def main():
        with pytest.raises(PromptTooLongError, match="max_model_len=64"):
            llm.generate([5] * 64, GREEDY)
        with pytest.raises(RequestError, match=r"999 is not in \[0, 256\)"):
            llm.stream([999], GREEDY)
        with pytest.raises(RequestError, match="empty"):
            llm.generate("", GREEDY)
        with pytest.raises(RequestError, match="scheduling_policy"):
            llm.generate("a", GREEDY, priority=1)
        with pytest.raises(RequestError, match="role"):
            llm.chat([{"content": "a"}])
        stream = llm.generate("a", LONG, request_id="mine")
        with pytest.raises(RequestError, match="'mine' is in use"):
            llm.generate("a", GREEDY, request_id="mine")
        return await last(stream)

    assert run(main()).request_id == "mine"
    assert llm.stats.requests_finished == 1


def test_unknown_engine_argument():
    with pytest.raises(UnknownArgumentError, match="max_num_seqs"):
        AsyncLLM("unused", max_num_seq=3)


# ---- aborts


def test_abort_leaves_others_alone(llm, monkeypatch):
    slowly(llm, monkeypatch)

    async def main():
        expected = await last(llm.generate(PROMPTS[0], LONG))
        other = asyncio.create_task(last(llm.generate(PROMPTS[0], LONG)))
        stream = llm.generate(PROMPTS[1], replace(LONG, max_tokens=40), request_id="x")
        async for output in stream:
            if len(output.outputs[0].token_ids) >= 3:  # a slow caller may miss the third
                await llm.abort("x")
        await llm.abort("x")  # finished
        await llm.abort("never heard of")
        return expected, await other, output

    expected, other, aborted = run(main())
    assert other.outputs[0].token_ids == expected.outputs[0].token_ids
    assert aborted.finished
    assert aborted.outputs[0].finish_reason is FinishReason.ABORT
    assert 3 <= len(aborted.outputs[0].token_ids) < 40
    assert llm.stats.requests_aborted == 1


def test_abort_of_a_waiting_request(llm):
    async def main():
        running = [llm.generate(p, LONG) for p in ([5], [6], [7], [8])]
        waiting = llm.generate([9], LONG, request_id="waits")
        await llm.abort("waits")
        output = await last(waiting)
        await asyncio.gather(*map(last, running))
        return output

    output = run(main())
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "abort")


def test_late_abort_spares_the_next_owner_of_the_id(llm):
    async def main():
        first = llm.generate([5], GREEDY, request_id="x")
        mailbox = llm._thread.find("x")
        await last(first)
        second = llm.generate([6], LONG, request_id="x")
        llm._thread.abort(mailbox)
        return await last(second)

    assert run(main()).outputs[0].finish_reason is FinishReason.LENGTH


def leave_by_break(llm):
    async def leave():
        async for _ in llm.generate([5], LONG, request_id="x"):
            break

    return leave()


def leave_by_aclose(llm):
    async def leave():
        async with contextlib.aclosing(llm.stream([5], LONG, request_id="x")) as stream:
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    return leave()


def leave_by_cancellation(llm):
    async def leave():
        started = asyncio.Event()

        async def caller():
            async for _ in llm.generate([5], LONG, request_id="x"):
                started.set()

        task = asyncio.create_task(caller())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    return leave()


def leave_without_starting(llm):
    async def leave():
        llm.generate([5], LONG, request_id="x")

    return leave()


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_aclose, leave_by_cancellation, leave_without_starting]
)
def test_leaving_the_iterator_aborts(llm, monkeypatch, leave):
    slowly(llm, monkeypatch)

    async def main():
        await leave(llm)
        again = await last(llm.generate([6], GREEDY, request_id="x"))  # the id is free at once
        await until_idle(llm)
        return again

    again = run(main())
    assert again.prompt_token_ids == [6]
    assert again.outputs[0].finish_reason is FinishReason.LENGTH
    assert (llm.stats.requests_finished, llm.stats.requests_aborted) == (1, 1)
    assert pages_in_use(llm) == 0


def slowly(llm, monkeypatch):
    """Makes steps take 10 ms, so that callers act before requests end."""
    step = llm._engine.coordinator.step
    monkeypatch.setattr(llm._engine.coordinator, "step", lambda: (time.sleep(0.01), step())[1])


def test_two_tasks_cannot_await_one_request(llm, monkeypatch):
    slowly(llm, monkeypatch)

    async def main():
        stream = llm.generate([5], GREEDY)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="awaited by another task"):
            await anext(stream)
        return await first, await last(stream)

    first, output = run(main())
    assert not first.finished
    assert output.outputs[0].finish_reason is FinishReason.LENGTH


# ---- event loops and threads


def test_several_event_loops(llm):
    async def main():
        return await asyncio.gather(*(last(llm.generate(p, GREEDY)) for p in PROMPTS))

    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: run(main())})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    tokens = [[o.outputs[0].token_ids for o in results[i]] for i in range(3)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert all(len(ids) == 12 for ids in tokens[0])


def test_closed_event_loop_aborts_its_requests(llm, monkeypatch):
    slowly(llm, monkeypatch)
    kept = []

    async def leave():
        kept.append(llm.generate([5], LONG))
        await anext(kept[0])

    async def main():
        output = await last(llm.generate([6], GREEDY))
        while not llm.stats.requests_aborted:
            await asyncio.sleep(0.01)
        return output

    run(leave())
    assert run(main()).outputs[0].finish_reason is FinishReason.LENGTH
    assert pages_in_use(llm) == 0


def test_idle_engine_uses_no_cpu(llm):
    async def main():
        await last(llm.generate([5], GREEDY))

    run(main())
    steps = llm.stats.steps
    clock = time.pthread_getcpuclockid(llm._thread._thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before < 0.03
    assert llm.stats.steps == steps


# ---- death


def test_every_caller_learns_of_a_dead_engine(llm, engine, monkeypatch, caplog):
    launch, launched = engine.executor.launch, []

    def failing_launch(plan):
        launched.append(plan)
        if len(launched) > 3:
            raise FloatingPointError("boom")
        return launch(plan)

    monkeypatch.setattr(engine.executor, "launch", failing_launch)

    async def main():
        streams = [llm.generate(p, LONG) for p in ([5], [6], [7], [8], [9])]  # one waits
        streams.append(llm.stream([10], LONG))
        results = await asyncio.gather(*map(last, streams), return_exceptions=True)
        with pytest.raises(EngineDeadError, match="FloatingPointError: boom") as later:
            llm.generate([5])
        return [*results, later.value]

    errors = run(main())
    assert len(errors) == len(set(map(id, errors))) == 7
    assert all(isinstance(error, EngineDeadError) for error in errors)
    assert all(isinstance(error.__cause__, FloatingPointError) for error in errors)
    assert not llm.is_running
    assert "the engine has stopped" in caplog.text
    llm.close()


# ---- the end


def test_close_ends_unfinished_requests(llm, monkeypatch):
    slowly(llm, monkeypatch)

    async def main():
        async with llm:
            assert llm.is_running
            streams = [llm.generate(p, LONG) for p in ([5], [6], [7], [8], [9])]  # one waits
            deltas = llm.stream([10], LONG)
            first = await anext(streams[0])
        assert not llm.is_running
        return first, [await last(s) for s in streams], [d async for d in deltas]

    first, outputs, deltas = run(main())
    assert not first.finished
    assert all(output.finished for output in outputs)
    assert {output.outputs[0].finish_reason for output in outputs} == {FinishReason.ABORT}
    assert deltas[-1].finish_reason is FinishReason.ABORT
    assert not llm._thread._thread.is_alive()
    assert pages_in_use(llm) == 0
    llm.close()  # again

    async def late():
        llm.generate([5])

    with pytest.raises(EngineDeadError, match="closed"):
        run(late())


def test_dropping_the_last_reference_stops_the_thread(llm):
    other = AsyncLLM("unused")
    thread = other._thread._thread

    async def main():
        nonlocal other
        stream = other.generate([5], GREEDY)
        other = None
        gc.collect()
        return await last(stream)  # an open request keeps its engine

    assert run(main()).outputs[0].finish_reason is FinishReason.LENGTH
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_process_may_end_without_closing(folder):
    code = f"""
import asyncio
from jpd import AsyncLLM, SamplingParams
async def main():
    await anext(llm.generate([5], SamplingParams(max_tokens=60, ignore_eos=True)))
llm = AsyncLLM({str(folder)!r}, **{SHAPES!r})
asyncio.run(main())
print("end")
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (process.returncode, process.stdout) == (0, "end\n"), process.stderr
