"""Engines with random weights, at the shape of a published model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.models import MODELS
from jpd import EngineConfig
from jpd.engine.build import Engine, build


def dummy_folder(model: str) -> Path:
    """A folder with nothing but the `config.json` of an entry of `benchmarks.models.MODELS`."""
    folder = Path(tempfile.mkdtemp(prefix=f"jpd-{model}-"))
    config = MODELS[model] | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dummy_engine(model: str, **engine_args: Any) -> Engine:
    """An engine that serves token ids with random weights made on the device."""
    return build(
        EngineConfig.from_kwargs(
            str(dummy_folder(model)),
            load_format="dummy",
            skip_tokenizer_init=True,
            **engine_args,
        )
    )
