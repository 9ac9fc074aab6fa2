"""Prefill and decode on devices of their own: prompts are sent layer by layer while they are
computed, whatever becomes of who sends and who waits for them. A CPU has only one device."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpd import LLM, SamplingParams
from jpd.child import Child
from jpd.engine.plan import StepPlan
from jpd.errors import ConfigError
from jpd.semi_pd import shared_model
from jpd.semi_pd.remote import RemoteExecutor, RemoteStep
from jpd.types import RequestOutput
from tests import tiny_models
from tests.engine.tiny_engine import MODEL, SIZES
from tests.processes import stop, wait_until

PAGES, STEP_TOKENS, PAGE_SIZE = 33, SIZES["max_num_batched_tokens"], SIZES["page_size"]
OPTIONS = SIZES | {"num_pages": PAGES, "skip_tokenizer_init": True, "show_progress": False}
LAYERS = 12
"""So many that a step takes a while from its first layer to its last."""
VOCAB = tiny_models.CASES[MODEL]["vocab_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    deep = tiny_models.CASES[MODEL] | {"num_hidden_layers": LAYERS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.CASES, "deep", deep)
        patch.setitem(tiny_models.SEEDS, "deep", 1)
        return tiny_models.make_checkpoint("deep", tmp_path_factory.mktemp("model"))


def work() -> tuple[list[dict], list[SamplingParams]]:
    """Prompts of one step and of several, some with common beginnings; more than fit at once."""
    rng = np.random.default_rng(0)
    common = rng.integers(5, VOCAB, 40).tolist()
    lengths = [(int(rng.integers(0, 40)), int(rng.integers(1, 40))) for _ in range(40)]
    prompts = [common[:shared] + rng.integers(5, VOCAB, own).tolist() for shared, own in lengths]
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=8 + i % 20, ignore_eos=True)
        for i in range(len(prompts))
    ]
    return [{"prompt_token_ids": p} for p in prompts], params


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [c.token_ids for output in outputs for c in output.outputs]


@pytest.fixture(scope="module")
def in_one_process(folder: Path) -> LLM:
    llm = LLM(str(folder), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def wanted(in_one_process: LLM) -> list[list[int]]:
    outputs = in_one_process.generate(*work())
    assert in_one_process.stats.preemptions > 0
    return tokens(outputs)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LLM]:
    llm = LLM(str(folder), **OPTIONS, topology="disaggregated")
    yield llm
    llm.close()


@pytest.fixture
def llm(engine: LLM) -> Iterator[LLM]:
    """With an executor in each phase; in the end no page may be missing."""
    coordinator = engine._engine.coordinator
    wait_until(
        lambda: coordinator.rest() or len(engine.executors) == 2,
        "what was killed before is not replaced",
    )
    yield engine
    while coordinator.has_work:
        coordinator.step()
    scheduler = coordinator.scheduler
    scheduler.check_integrity()
    assert scheduler.pool.num_free == scheduler.decode_pool.num_free == PAGES - 1, "a page leaked"


def decode_pages(llm: LLM) -> list[np.ndarray]:
    """Keys and values of each layer in the decode executors' pool, as they are."""
    model = llm._engine.topology._models[1]
    (handle,) = model.pages
    memory = mmap.mmap(handle.fd, handle.nbytes)
    return [np.ndarray(f.shape, f.dtype, memory, f.offset) for f in model._pages.fields]


def test_the_tokens_of_one_process_and_what_was_sent_for_them(
    llm: LLM, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[StepPlan] = []
    launch = RemoteExecutor.launch

    def noted(executor: RemoteExecutor, plan: StepPlan) -> RemoteStep:
        plans.append(plan)
        return launch(executor, plan)

    monkeypatch.setattr(RemoteExecutor, "launch", noted)
    prefill, decode = llm._engine.topology.prefill.pool, llm._engine.topology.decode.pool
    before, copied, overlapped = llm.stats, prefill.copied_bytes, prefill.overlapped_bytes
    for _ in range(20):  # what there is time for depends on the machine
        assert tokens(llm.generate(*work())) == wanted
        stats = llm.stats
        if stats.preemptions > before.preemptions and prefill.overlapped_bytes > overlapped:
            break
    assert stats.preemptions > before.preemptions
    assert stats.cached_tokens > before.cached_tokens
    assert stats.recompiles == 0
    assert all(len(plan.copies) == len(plan.chunks) for plan in plans)
    sent = sum(len(copy.source) for plan in plans for copy in plan.copies)
    model = llm.model_config
    page = 2 * LAYERS * PAGE_SIZE * model.num_kv_heads * model.head_dim * 4
    assert prefill.copied_bytes - copied == sent * page
    assert 0 < prefill.overlapped_bytes - overlapped <= prefill.copied_bytes - copied
    assert decode.copied_bytes == 0


@pytest.fixture
def waiting_executor(llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Prefill is done by `waits_in_a_step`, which does so while there is this file."""
    file, spawn = tmp_path / "wait", shared_model.spawn
    coordinator, seat = llm._engine.coordinator, llm._engine.topology.prefill
    # What it compiles nobody else may get.
    more = {"WAIT_FILE": str(file), "JAX_ENABLE_COMPILATION_CACHE": "false"}

    def spawn_waiting(module: str, *, env: dict[str, str], **options: Any) -> Child:
        return spawn("tests.semi_pd.waits_in_a_step", env=env | more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shared_model, "spawn", spawn_waiting)
        first = seat.executor.pid
        os.kill(first, signal.SIGKILL)
        wait_until(
            lambda: coordinator.rest() or getattr(seat.executor, "pid", first) != first,
            "the executor is not replaced",
        )
    return file


def test_a_prefill_executor_that_is_killed_in_the_middle_of_sending(
    llm: LLM, in_one_process: LLM, waiting_executor: Path
) -> None:
    """When the first layer has arrived, and the others are not yet computed."""
    there = decode_pages(llm)
    rng = np.random.default_rng(1)
    prompt = [{"prompt_token_ids": rng.integers(5, VOCAB, STEP_TOKENS).tolist()}]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    lane, before = llm._engine.topology.lanes[0], llm.stats
    for array in there:
        array[:] = 0  # nobody has a page now
    waiting_executor.touch()
    (output,) = llm._queue(llm._checked(prompt, params, None))
    while not lane.in_flight:
        llm._step()
    (copy,) = lane.in_flight[0].plan.copies
    wait_until(there[0][copy.target[0]].any, "nothing is sent")
    assert not any(array.any() for array in there[2:]), "all is sent at once"
    os.kill(lane.executor.pid, signal.SIGKILL)
    while not output.finished:
        llm._step()
    assert tokens([output]) == tokens(in_one_process.generate(prompt, params))
    assert llm.stats.requeued == before.requeued + 1
    assert llm.stats.executors_lost == before.executors_lost + 1


def test_a_decode_executor_that_is_killed_costs_no_prompt(llm: LLM, in_one_process: LLM) -> None:
    """Its pages stay with the storage owner."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(7, 7 + n))} for n in (9, 16, 35)]
    before = llm.stats
    outputs = llm._queue(llm._checked(prompts, params, None))
    while not all(len(o.outputs[0].token_ids) > 3 for o in outputs):
        llm._step()
    sent = llm._engine.topology.prefill.pool.copied_bytes
    os.kill(llm._engine.topology.decode.executor.pid, signal.SIGKILL)
    while not all(o.finished for o in outputs):
        llm._step()
    assert tokens(outputs) == tokens(in_one_process.generate(prompts, params))
    stats = llm.stats
    assert stats.executors_lost == before.executors_lost + 1
    assert stats.requeued == before.requeued
    assert stats.prompt_tokens - before.prompt_tokens == sum(
        len(p["prompt_token_ids"]) for p in prompts
    )
    assert llm._engine.topology.prefill.pool.copied_bytes == sent


def test_pages_of_an_aborted_request_are_nobodys_until_the_step_that_sends_them_has_run(
    llm: LLM, wanted: list[list[int]]
) -> None:
    lane, scheduler = llm._engine.topology.lanes[0], llm._engine.coordinator.scheduler
    params = SamplingParams(temperature=0, max_tokens=4)
    prompt = [{"prompt_token_ids": list(range(5, 5 + STEP_TOKENS))}]
    stop(lane.executor.pid)
    try:
        (output,) = llm._queue(llm._checked(prompt, params, None))
        while not lane.in_flight:
            llm._step()
        (copy,) = lane.in_flight[0].plan.copies
        assert llm._engine.coordinator.abort(output.request_id)
        assert scheduler.num_running == 0
        for pool, pages in ((scheduler.pool, copy.source), (scheduler.decode_pool, copy.target)):
            assert len(pages) == STEP_TOKENS // PAGE_SIZE
            assert all(pool.references(page) == 1 for page in pages)
            assert pool.num_free == PAGES - 1 - len(pages)
        scheduler.check_integrity()
    finally:
        os.kill(lane.executor.pid, signal.SIGCONT)
    while llm._engine.coordinator.has_work:
        llm._step()
    assert scheduler.decode_pool.num_free == PAGES - 1
    assert tokens(llm.generate(*work())) == wanted


def test_a_pool_that_is_lost_while_pages_are_sent_to_it(llm: LLM, wanted: list[list[int]]) -> None:
    """Prefill executors map the pages of the storage owner that takes its place."""
    before = llm.stats
    outputs = llm._queue(llm._checked(*work(), None))
    while not all(lane.in_flight for lane in llm._engine.topology.lanes):
        llm._step()
    os.kill(llm._engine.topology._models[1]._owner._child.process.pid, signal.SIGKILL)
    while not all(o.finished for o in outputs):
        llm._step()
    assert tokens(outputs) == wanted
    assert llm.stats.pages_lost == before.pages_lost + 1


def test_without_a_compiler_it_says_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "nowhere-g++")
    with pytest.raises(
        ConfigError,
        match=r"the prefill executor could not be started: .*kv_push.cc.*CXX='nowhere-g\+\+'",
    ):
        LLM(str(folder), **OPTIONS, topology="disaggregated")
