"""Callers of an AsyncLLM."""

import asyncio
import contextlib
import threading
import time

from jpd import SamplingParams

PROMPTS = [[5, 6, 7], [9] * 20, [30, 31], [40, 41, 42, 43, 44], [8, 5, 9], [77] * 11]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)


def run(coroutine):
    """Runs a test on an event loop; none takes minutes unless it hangs."""
    return asyncio.run(asyncio.wait_for(coroutine, 300))


async def last(stream):
    return [output async for output in stream][-1]


async def until_idle(llm):
    while llm.stats.running or llm.stats.waiting:
        await asyncio.sleep(0.01)


def pages_in_use(llm):
    """When no step runs any more: one may, after the last request has ended."""
    deadline = time.monotonic() + 120
    while llm._engine.coordinator.has_work:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return llm.config.num_pages - 1 - llm.stats.free_pages


def in_step(llm, monkeypatch):
    """The engine takes a step only when a caller waits for it: they act before requests end."""
    thread, step = llm._thread, llm._engine.coordinator.step

    def is_awaited(mailbox):
        seen = threading.Event()
        with contextlib.suppress(RuntimeError):  # the loop is closed; the step will find out
            mailbox.loop.call_soon_threadsafe(seen.set)  # after what the last step put there
        return (seen.wait(0.01) and mailbox.is_awaited) or mailbox.loop.is_closed()

    def next_step():
        while thread._inbox.empty():
            live = list(thread._live.values())
            if not live or any(is_awaited(mailbox) for mailbox in live):
                return step()
        return []  # what callers ask for comes first

    monkeypatch.setattr(llm._engine.coordinator, "step", next_step)
