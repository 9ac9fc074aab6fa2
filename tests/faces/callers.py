"""Callers of an AsyncLLM."""

import asyncio
import time

from jpd import SamplingParams

PROMPTS = [[5, 6, 7], [9] * 20, [30, 31], [40, 41, 42, 43, 44], [8, 5, 9], [77] * 11]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)


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


def slowly(llm, monkeypatch):
    """Makes steps take 10 ms, so that callers act before requests end."""
    step = llm._engine.coordinator.step
    monkeypatch.setattr(llm._engine.coordinator, "step", lambda: (time.sleep(0.01), step())[1])
