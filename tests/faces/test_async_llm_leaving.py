"""AsyncLLM: aborts in every form, a dying engine, closing."""

import asyncio
import contextlib
import gc
import subprocess
import sys
from dataclasses import replace

import pytest

from jpd import AsyncLLM, EngineDeadError, FinishReason
from tests.faces.callers import GREEDY, LONG, PROMPTS, in_step, last, pages_in_use, run, until_idle
from tests.faces.tiny import SHAPES

# ---- aborts


def test_abort_leaves_others_alone(llm, monkeypatch):
    in_step(llm, monkeypatch)

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
    in_step(llm, monkeypatch)

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


def test_two_tasks_cannot_await_one_request(llm, monkeypatch):
    in_step(llm, monkeypatch)

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
    in_step(llm, monkeypatch)

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


def test_dropping_the_last_reference_stops_the_thread(built, folder):
    other = AsyncLLM(str(folder), **SHAPES)
    thread = other._thread._thread

    async def main():
        nonlocal other
        stream = other.generate([5], GREEDY)
        other = None
        gc.collect()
        return await last(stream)  # an open request keeps its engine

    assert run(main()).outputs[0].finish_reason is FinishReason.LENGTH
    gc.collect()
    thread.join(120)
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
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert (process.returncode, process.stdout) == (0, "end\n"), process.stderr
