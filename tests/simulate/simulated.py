"""A small model's shape and round latencies, so that times can be computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jpd.bench.slo import RequestRecord
from jpd.bench.workload import Workload
from jpd.config import EngineConfig
from jpd.semi_pd.share_models import Interference
from jpd.simulate import engine
from jpd.simulate.engine import SimulatedEngine
from jpd.simulate.latency import DecodeTime, LatencyModel, Overheads, PromptTime
from tests.tiny_models import CASES

SIZES: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "page_size": 8,
    "num_pages": 257,
}
NO_SHARES: dict[str, Any] = {"parallel": 0.0, "knee": 0.0, "knee_row": 0.0}
"""SM shares change nothing."""
ALONE = Interference(prefill_slowdown=1.0, prefill_pull=0.0, decode_slowdown=1.0, overlap_wait=0.0)
"""The phases do nothing to each other."""


def model_folder(parent: Path) -> Path:
    """A folder with a `config.json` and nothing else."""
    folder = parent / "shape"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CASES["llama3"]))
    return folder


def latencies(decode_s: float = 5e-3, prompt_s: float = 10e-3, **options: Any) -> LatencyModel:
    """Steps of one length each."""
    return LatencyModel(
        source="a test",
        decode=DecodeTime(step_s=decode_s),
        prompt=PromptTime(step_s=prompt_s),
        **{"interference": ALONE, "overheads": Overheads()} | NO_SHARES | options,
    )


made: list[SimulatedEngine] = []
"""To be closed after each test."""


def make_engine(folder: Path, model: LatencyModel, **options: Any) -> SimulatedEngine:
    """A fresh one, which `conftest` closes."""
    config = EngineConfig.from_kwargs(str(folder), **SIZES | options)
    made.append(engine.build(engine.prepare(config, 1 << 30, "a GPU"), model))
    return made[-1]


def requests(*rows: tuple[float, int, int]) -> Workload:
    """Of (arrival in s, prompt tokens, output tokens)."""
    arrivals, prompts, outputs = zip(*rows, strict=True)
    return Workload("by hand", np.array(arrivals), np.array(prompts), np.array(outputs), "a test")


def times_ms(record: RequestRecord) -> tuple[float, float]:
    """When the first and the last token came, from the start."""
    return 1e3 * record.first_token_s, 1e3 * record.finished_s
