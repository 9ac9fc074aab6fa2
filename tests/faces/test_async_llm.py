"""AsyncLLM: concurrent callers, on any number of event loops, and what they get."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from jpd import (
    AsyncLLM,
    FinishReason,
    PromptTooLongError,
    RequestError,
    SamplingParams,
    UnknownArgumentError,
)
from tests.faces.callers import GREEDY, LONG, PROMPTS, in_step, last, pages_in_use, run, until_idle

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


def test_one_call_into_the_loop_for_each_step(llm, monkeypatch):
    all_sent, step = threading.Event(), llm._engine.coordinator.step
    monkeypatch.setattr(llm._engine.coordinator, "step", lambda: (all_sent.wait(120), step())[1])

    async def main():
        loop = asyncio.get_running_loop()
        calls = []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), original(*args))[1]
        streams = [llm.stream(p, GREEDY) for p in PROMPTS[:4]]
        all_sent.set()
        await asyncio.gather(*map(last, streams))
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
        thread.join(600)
    tokens = [[o.outputs[0].token_ids for o in results[i]] for i in range(3)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert all(len(ids) == 12 for ids in tokens[0])


def test_closed_event_loop_aborts_its_requests(llm, monkeypatch):
    in_step(llm, monkeypatch)
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

    def used():
        before = time.clock_gettime(clock)
        time.sleep(0.3)
        return time.clock_gettime(clock) - before

    # What is left of the last step, or a garbage collection, may fall into one of them.
    assert min(used() for _ in range(3)) < 0.03
    assert llm.stats.steps == steps
