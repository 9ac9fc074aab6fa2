"""Which part of a parameter each rank gets, and what is refused; no devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jpd
from jpd import checkpoint
from jpd.engine import build, memory
from jpd.engine.shapes import shape_table
from jpd.errors import ConfigError
from jpd.models import ModelConfig, abstract_params, config_from_hf
from jpd.models.family import flatten
from jpd.parallel import AXES, RULES, Split
from tests import tiny_models

QKV = ("layers", 0, "attention", "qkv", "weight")
GATE_UP = ("layers", 1, "mlp", "gate_up", "weight")
DOWN = ("layers", 0, "mlp", "down", "weight")


def model_of(name: str, **changes: Any) -> ModelConfig:
    return config_from_hf(tiny_models.CASES[name] | changes)


def heads_of(split: Split, rank: int) -> list[int]:
    """Rows of the packed weight that a rank has, in heads."""
    cut = split.cut(QKV)
    size = split.model.head_dim
    rows = np.concatenate([np.arange(*run) for run in cut.ranges[rank]])
    assert (rows.reshape(-1, size) % size == np.arange(size)).all()
    return (rows[::size] // size).tolist()


def test_each_rank_has_its_query_heads_and_the_kv_heads_that_they_read() -> None:
    model = model_of("llama3")  # 8 query heads, then 2 of k, then 2 of v
    assert [heads_of(Split(model, 2), r) for r in range(2)] == [
        [0, 1, 2, 3, 8, 10],
        [4, 5, 6, 7, 9, 11],
    ]
    # More ranks than KV heads: each is on several.
    assert [heads_of(Split(model, 4), r) for r in range(4)] == [
        [0, 1, 8, 10],
        [2, 3, 8, 10],
        [4, 5, 9, 11],
        [6, 7, 9, 11],
    ]
    assert Split(model, 4).rank_model.num_kv_heads == 1


def test_each_rank_has_its_own_gates_and_ups() -> None:
    split = Split(model_of("llama3"), 2)  # 160 channels
    assert split.cut(GATE_UP).ranges == (((0, 80), (160, 240)), ((80, 160), (240, 320)))
    assert split.cut(DOWN).axis == 1
    assert split.cut(DOWN).ranges == (((0, 80),), ((80, 160),))
    assert split.cut(DOWN).in_order
    assert not split.cut(GATE_UP).in_order
    assert split.cut(("norm", "weight")) is None


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["llama_bias", "mistral_window", "qwen2", "qwen3_bias"])
def test_the_parts_of_all_ranks_are_the_whole(name: str, ranks: int) -> None:
    model = model_of(name)
    split = Split(model, ranks)
    for path, leaf in flatten(abstract_params(model, "float32")):
        cut = split.cut(path)
        if cut is None:
            assert path[-2] in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "norm") or (
                path[-1] == "bias" and path[-2] in ("out", "down")
            )
            continue
        whole = np.arange(np.prod(leaf.shape)).reshape(leaf.shape)
        parts = [cut.part(whole, rank) for rank in range(ranks)]
        assert {p.shape for p in parts} == {
            dict(flatten(abstract_params(split.rank_model, "float32")))[path].shape
        }
        assert set(np.concatenate([p.ravel() for p in parts])) == set(whole.ravel())


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("llama_bias", 3, "tensor_parallel_size=3 .* num_attention_heads=4; .* takes 1, 2, 4"),
        ("llama31", 2, "tensor_parallel_size=2 .* num_attention_heads=3; this model takes 1"),
        ("llama2", 2, "tensor_parallel_size=2 .* vocab_size=257; this model takes 1"),
        ("qwen2_untied", 3, "num_key_value_heads=2 or be a multiple of it; .* takes 1, 2"),
    ],
)
def test_what_cannot_be_split_names_the_size_and_what_can(
    name: str, ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Split(model_of(name), ranks)


def test_an_ffn_that_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="intermediate_size=163"):
        Split(model_of("llama_bias", intermediate_size=163), 2)


@pytest.mark.parametrize(
    ("axes", "rules", "message"),
    [
        ({}, {"heads": None}, "heads and kv_heads go together"),
        ({}, {"width": "tp"}, r"RULES\['width'\]='tp' is not allowed: None, or 'tp' for heads"),
        ({}, {"vocab": "data"}, r"RULES\['vocab'\]='data' is not allowed"),
        ({"layers.{i}.mlp.down.weight": ("ffn", "width")}, {}, r"down.weight \(160, 64\), it is"),
        ({"layers.{i}.mlp.gate_up.weight": ("ffn", "width")}, {}, "gate_up.weight"),
    ],
)
def test_tables_that_do_not_fit_a_model(
    axes: dict[str, Any], rules: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Split(model_of("llama_bias"), 2, AXES | axes, RULES | rules)


def test_the_table_names_every_parameter_and_no_other() -> None:
    paths = {
        ".".join("{i}" if isinstance(key, int) else key for key in path)
        for name in tiny_models.CASES
        for path, _ in flatten(abstract_params(model_of(name), "float32"))
    }
    assert paths == set(AXES)
    missing = {name: axes for name, axes in AXES.items() if name != "norm.weight"}
    with pytest.raises(ConfigError, match=r"AXES has no entry 'norm\.weight'"):
        Split(model_of("llama_bias"), 2, missing)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_a_size_that_is_no_count(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=.* an int >= 1"):
        jpd.EngineConfig(model="m", tensor_parallel_size=value)


def test_more_ranks_than_devices(tmp_path: Any) -> None:
    folder = tiny_models.make_checkpoint("llama_bias", tmp_path)
    more = jax.local_device_count() + 1
    message = f"tensor_parallel_size={more} is not allowed: at most {more - 1}, the number of cpu"
    with pytest.raises(ConfigError, match=message):
        jpd.LLM(str(folder), tensor_parallel_size=more)


def test_memory_is_counted_for_one_rank(tmp_path: Any) -> None:
    """Twice the ranks: half of the weights and half of every page beside them."""
    folder = tiny_models.make_checkpoint("qwen3_bias", tmp_path)
    config = jpd.EngineConfig(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=32,
        gpu_memory_utilization=1,
    )
    model = model_of("qwen3_bias")
    whole = checkpoint.param_bytes(model, "float32")
    work = memory.work_bytes(config, model, shape_table(config))
    limit = work + whole + 64 * memory.page_bytes(config, model, 4)
    found = {
        ranks: build.prepare(
            config.replace(tensor_parallel_size=ranks), on_cpu=True, limit=limit, device="cpu"
        )
        for ranks in (1, 2, 4)
    }
    assert found[1].model_bytes == whole
    assert whole / 2 < found[2].model_bytes < whole * 0.51  # norms are on every rank
    assert whole / 4 < found[4].model_bytes < whole * 0.27
    pages = [found[ranks].config.num_pages for ranks in (1, 2, 4)]
    assert pages[0] == 64
    assert 2 * pages[0] < pages[1] < pages[2]
