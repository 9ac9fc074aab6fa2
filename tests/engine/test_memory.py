"""How many KV pages are made, and what they take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jpd import checkpoint, models
from jpd.config import EngineConfig
from jpd.engine import memory
from jpd.engine.build import resolve
from jpd.engine.shapes import shape_table
from jpd.errors import ConfigError
from jpd.models import ModelConfig
from tests import tiny_models
from tests.engine.tiny_engine import MODEL, SIZES, fresh, greedy, run, tiny_engine

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return checkpoint.read_config(folder)


def config_of(**changes) -> EngineConfig:
    return EngineConfig(model="none", **(SIZES | {"num_pages": None, "dtype": "float32"} | changes))


def pages_in(limit: int, model: ModelConfig, config: EngineConfig, model_bytes: int = 0) -> int:
    shapes = shape_table(config)
    return memory.num_pages(config, model, shapes, limit=limit, model_bytes=model_bytes, itemsize=4)


def test_the_limit_of_a_device_is_what_it_reports() -> None:
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7 * GIB})
    assert memory.device_memory(device) == 7 * GIB


@pytest.mark.parametrize("stats", [None, {}])
def test_without_a_report_it_is_the_memory_of_the_machine(stats: dict | None) -> None:
    found = memory.device_memory(SimpleNamespace(memory_stats=lambda: stats))
    assert 1 << 26 < found < 1 << 50


def test_pages_fill_what_weights_and_work_space_leave(model: ModelConfig) -> None:
    config = config_of(max_model_len=512, max_num_seqs=32, gpu_memory_utilization=0.5)
    work = memory.work_bytes(config, model, shape_table(config))
    page = memory.page_bytes(config, model, 4)
    for pages in (2, 3, 100):
        usable = work + 1_000 + pages * page
        assert pages_in(2 * usable, model, config, model_bytes=1_000) == pages
        assert pages_in(2 * usable - 2 * page, model, config, model_bytes=1_000 - page) == pages


def test_never_more_pages_than_full_rows_can_use(model: ModelConfig) -> None:
    config = config_of(max_model_len=125, page_size=16)
    assert pages_in(1 << 45, model, config) == 8 * 8 + 1


def test_no_room_for_a_page_is_an_error_with_all_sizes(model: ModelConfig) -> None:
    config = config_of()
    work = memory.work_bytes(config, model, shape_table(config))
    with pytest.raises(ConfigError, match=r"no memory is left .*utilization=0\.9 - weights 2\.00 "):
        pages_in(work, model, config, model_bytes=2 * GIB)


def test_a_model_that_fits_exactly_passes_and_a_byte_more_does_not() -> None:
    memory.check_model_fits(8 * GIB, 16 * GIB, 0.5, "cpu:0")
    with pytest.raises(ConfigError, match=r"need 8\.00 GiB; cpu:0 has 16\.00 GiB, .*=0\.5 allows"):
        memory.check_model_fits(8 * GIB + 1, 16 * GIB, 0.5, "cpu:0")


def test_work_space_grows_with_everything_that_makes_steps_larger(model: ModelConfig) -> None:
    def work(**changes) -> int:
        config = config_of(batch_buckets=None, token_buckets=None, **changes)
        return memory.work_bytes(config, model, shape_table(config))

    base = work()
    assert work(max_num_batched_tokens=4_096) > base
    assert work(max_num_seqs=32) > base
    assert work(max_prefills_per_step=64) > base


def test_the_estimates_are_what_an_engine_takes(folder: Path) -> None:
    engine = tiny_engine(folder, num_pages=None, max_num_seqs=4, batch_buckets=(4,))
    config, executor = engine.config, engine.executor
    assert config.num_pages == 4 * 16 + 1
    kv_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(executor.kv))
    assert kv_bytes == config.num_pages * memory.page_bytes(config, engine.model_config, 4)
    params_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(executor.params))
    assert params_bytes == checkpoint.param_bytes(engine.model_config, "float32")
    work = memory.work_bytes(config, engine.model_config, executor.shapes)
    assert 0 < executor.compiled.temp_bytes() <= work
    # All rows at full length are what the pages were counted for: nothing is preempted.
    coordinator = fresh(engine)
    run(coordinator, [[i] * 64 for i in range(4)], greedy(max_tokens=64, ignore_eos=True))
    assert coordinator.stats().preemptions == 0


@pytest.mark.parametrize(
    ("given", "seqs", "tokens", "mixed"),
    [
        ({}, 16, 512, 512),
        ({"max_num_seqs": 1_000}, 1_000, 1_000, 1_000),
        ({"max_num_batched_tokens": 8}, 8, 8, 8),
        ({"max_num_seqs": 4}, 4, 512, 512),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 32}, 4, 32, 32),
        ({"max_num_mixed_tokens": 16}, 16, 512, 16),
        ({"max_num_mixed_tokens": 1_000}, 16, 1_000, 1_000),
        ({"max_num_batched_tokens": 64, "max_num_mixed_tokens": 32}, 16, 64, 32),
    ],
)
def test_what_is_not_given_is_resolved_consistently(
    model: ModelConfig, given: dict[str, int], seqs: int, tokens: int, mixed: int
) -> None:
    device = jax.devices("cpu")[0]
    config = resolve(EngineConfig(model="none", **given), model, on_cpu=device.platform == "cpu")
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (seqs, tokens)
    assert config.max_num_mixed_tokens == mixed
    assert config.max_model_len == model.max_position
    assert config.dtype == model.dtype == "float32"


@pytest.mark.parametrize(
    ("given", "mixed"),
    [
        ({}, 2048),
        ({"topology": "semi_pd"}, 2048),
        ({"topology": "auto"}, 1024),
        ({"topology": "auto", "max_num_seqs": 1_500}, 1_500),
        ({"topology": "auto", "max_num_batched_tokens": 512}, 512),
        ({"topology": "auto", "max_num_mixed_tokens": 2048}, 2048),
    ],
)
def test_mixed_steps_of_auto_are_small_on_a_gpu(
    model: ModelConfig, given: dict, mixed: int
) -> None:
    config = resolve(EngineConfig(model="none", **given), model, on_cpu=False)
    assert config.max_num_mixed_tokens == mixed
    config = resolve(EngineConfig(model="none", **given), model, on_cpu=True)
    assert config.max_num_mixed_tokens == given.get(
        "max_num_mixed_tokens", config.max_num_batched_tokens
    )


def test_bytes_of_parameters_follow_the_dtype(model: ModelConfig) -> None:
    wide, narrow = (checkpoint.param_bytes(model, d) for d in ("float32", "bfloat16"))
    assert wide == 2 * narrow
    assert models.abstract_params(model, "bfloat16")["norm"]["weight"].dtype == jnp.bfloat16
