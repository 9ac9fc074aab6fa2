"""A table of products whose kernel for few rows is the GEMV."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from pallas_kernels import dataflow
from pallas_kernels.gemv import GemvConfig


@pytest.fixture
def gemv_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GemvConfig]:
    """Of 64 outputs (gated: 32) and 256 inputs, one and two rows; gives its configuration."""
    config = GemvConfig(2, 1, 2)
    entry = {"kernel": "gemv", "config": asdict(config), "us": 1, "xla_us": 1}
    rows = {"1": entry, "2": entry}
    products = [{"n": 64, "k": 256, "gated": gated, "rows": rows} for gated in (False, True)]
    (tmp_path / "nvidia_h200.json").write_text(json.dumps({"products": {"132": products}}))
    monkeypatch.setattr(dataflow, "TUNED", tmp_path)
    dataflow.load_table.cache_clear()
    yield config
    dataflow.load_table.cache_clear()
