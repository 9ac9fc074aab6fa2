"""A small real engine for tests, and many coordinators over its one executor.

Compiling takes nearly all the time of these tests, so an executor with a handful of shapes is
built once, and every test makes its own coordinator: requests, pages and prefix cache start empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jpd.config import EngineConfig
from jpd.engine import lowering
from jpd.engine.build import Engine, build
from jpd.engine.coordinator import Coordinator
from jpd.engine.lane import OneExecutor
from jpd.engine.shapes import StepShape
from jpd.types import RequestOutput, SamplingParams

MODEL = "llama32_v5"
"""The case of `tests.tiny_models` that these engines serve: GQA, tied embeddings, llama3 rope."""
SIZES: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "page_size": 8,
    "num_pages": 8 * 16 + 1,
    "batch_buckets": (8,),
    "token_buckets": (32,),
    "context_buckets": (128,),
}


def tiny_engine(folder: Path, **changes: Any) -> Engine:
    """An engine of four shapes: decode and mixed, greedy and sampling."""
    options = {"skip_tokenizer_init": True, "show_progress": False} | SIZES | changes
    return build(EngineConfig(model=str(folder), **options))


def shapes_traced(monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    """The shapes of the steps that this process traces from now on; it grows."""
    shapes: list[StepShape] = []
    step = lowering.step

    def counted(model: Any, shape: StepShape, *args: Any, **options: Any) -> Any:
        shapes.append(shape)
        return step(model, shape, *args, **options)

    monkeypatch.setattr(lowering, "step", counted)
    return shapes


def one_executor(config: EngineConfig, executor: Any) -> OneExecutor:
    """The topology that `build` makes."""
    return OneExecutor(executor, config.max_num_seqs, depth=1 + config.async_scheduling)


def fresh(engine: Engine, **changes: Any) -> Coordinator:
    """A coordinator without requests; `changes` may only lower what the executor was built for."""
    config = engine.config.replace(**changes)
    return Coordinator(
        config,
        engine.model_config,
        one_executor(config, engine.executor),
        engine.tokenizer,
        engine.model_config.eos_token_ids,
    )


def greedy(**options: Any) -> SamplingParams:
    """Plain greedy parameters."""
    return SamplingParams(temperature=0, **options)


def drain(coordinator: Coordinator, limit: int = 2_000) -> None:
    """Steps until nothing is left; then every page is free."""
    for _ in range(limit):
        if not coordinator.has_work:
            break
        coordinator.step()
        coordinator.scheduler.check_integrity()
    assert not coordinator.has_work, "the engine hangs"
    pool = coordinator.scheduler.pool
    assert pool.num_free == pool.num_usable
    assert coordinator.stats().running == coordinator.stats().waiting == 0


def run(
    coordinator: Coordinator,
    prompts: list[list[int]],
    params: SamplingParams | list[SamplingParams],
) -> list[RequestOutput]:
    """Serves all prompts at once."""
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    first = coordinator._arrivals
    outputs = [
        coordinator.add(f"{first + i}", None, prompt, param)
        for i, (prompt, param) in enumerate(zip(prompts, params, strict=True))
    ]
    drain(coordinator)
    assert all(o.finished for o in outputs)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    """Token ids of every sequence of every request."""
    return [[c.token_ids for c in o.outputs] for o in outputs]
