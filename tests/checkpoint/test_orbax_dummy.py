"""Orbax folders of jpd, and weights made up on the device."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpd.checkpoint import load, save_orbax
from jpd.errors import CheckpointError, ConfigError
from jpd.models import abstract_params, logits
from jpd.models.family import flatten
from tests import tiny_models

DTYPES = ["float32", "float16", "bfloat16"]


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def source(tmp_path):
    """A Hugging Face folder with a tokenizer and something that must not be copied."""
    folder = tiny_models.make_checkpoint("qwen3_v5", tmp_path / "hf")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def converted(source, tmp_path):
    config, params = load(source, show_progress=False)
    save_orbax(config, params, tmp_path / "orbax", source)
    return tmp_path / "orbax"


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_returns_the_same_bits(dtype, source, tmp_path):
    config, params = load(source, dtype=dtype, show_progress=False)
    save_orbax(config, params, tmp_path / "orbax", source)
    again, restored = load(tmp_path / "orbax")
    assert_same(restored, params)
    assert again == config.replace(dtype=dtype)
    assert again.eos_token_ids == (5, 6)


def test_orbax_as_another_type(converted):
    config, params = load(converted, dtype="bfloat16", load_format="orbax")
    want = load(converted)[1]
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), want))
    assert config.dtype == "float32"


def test_converted_folder_is_a_whole_model_folder(source, converted):
    names = {path.name for path in converted.iterdir()}
    files = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert names == files | {"orbax", "orbax.json"}
    for name in files - {"config.json"}:
        assert (converted / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((converted / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_nothing_is_overwritten(source, converted, tmp_path):
    config, params = load(source, show_progress=False)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    for place in (source, converted, source / "config.json"):
        with pytest.raises(ConfigError, match="is not an empty folder; nothing is overwritten"):
            save_orbax(config, params, place, source)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))


def test_only_the_models_own_parameters_are_saved(source, tmp_path):
    config, params = load(source, show_progress=False)
    params["norm"]["weight"] = jnp.ones(3)
    params["stray"] = {"weight": jnp.ones(2, jnp.bfloat16)}
    del params["layers"][1]["mlp"]["down"]
    with pytest.raises(CheckpointError) as error:
        save_orbax(config, params, tmp_path / "orbax", source)
    text = str(error.value)
    assert "4 faults" in text
    assert "norm.weight: [3], config.json makes it [64]" in text
    assert "missing parameters (1):\n    layers.1.mlp.down.weight" in text
    assert "unexpected parameters (1):\n    stray.weight" in text
    assert "mixed dtypes (1):\n    stray.weight: bfloat16, embed.weight: float32" in text
    assert not (tmp_path / "orbax").exists()


def test_orbax_faults_come_together(converted):
    path = converted / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 96, "num_hidden_layers": 1}))
    data = sorted(converted.glob("orbax/ocdbt.process_0/d/*"))
    data[0].write_bytes(data[0].read_bytes()[:-1])
    (converted / "orbax" / "_METADATA").unlink()
    with pytest.raises(CheckpointError) as error:
        load(converted)
    text = str(error.value)
    assert "missing files (1):\n    orbax/_METADATA" in text
    assert f"damaged files (1):\n    orbax/ocdbt.process_0/d/{data[0].name}" in text
    assert "wrong shapes (2)" in text
    assert "unexpected parameters (8)" in text


def test_orbax_data_that_cannot_be_unpacked(converted):
    """Sizes are right: the fault is met by the storage library, and still is a CheckpointError.

    In its own process, for the library then leaves threads and coroutines behind that complain.
    """
    for path in converted.glob("orbax/ocdbt.process_0/d/*"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    code = """
import sys
from jpd.checkpoint import load
from jpd.errors import CheckpointError
try:
    load(sys.argv[1])
except CheckpointError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(converted)], capture_output=True, text=True, check=True
    )
    assert f"{converted / 'orbax'} cannot be read: " in result.stdout
    assert len(result.stdout) < 1000


@pytest.mark.parametrize("content", [None, "{}"])
def test_conversion_that_did_not_finish(content, converted):
    (converted / "orbax.json").unlink()
    if content is not None:
        (converted / "orbax.json").write_text(content)
    with pytest.raises(CheckpointError, match="not to its end"):
        load(converted)


def test_orbax_asked_for_but_not_there(source):
    with pytest.raises(CheckpointError, match="has no Orbax checkpoint"):
        load(source, load_format="orbax")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dummy_is_a_model_of_the_right_shape(dtype, tmp_path):
    name = "qwen3_bias"  # has every kind of parameter
    folder = tiny_models.make_checkpoint(name, tmp_path)
    (folder / "model.safetensors").unlink()
    config, params = load(folder, load_format="dummy", dtype=dtype)
    want = abstract_params(config, dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )
    for path, leaf in flatten(params):
        values = np.asarray(leaf, np.float32)
        if path[-1] == "bias":
            assert not values.any()
        elif leaf.ndim == 1:
            assert (values == 1).all()
        else:
            assert values.std() * leaf.shape[1] ** 0.5 == pytest.approx(1, abs=0.05)
            assert abs(values.mean()) < 5 * values.std() / leaf.size**0.5
    out = logits(config, params, tiny_models.random_prompt(name))
    assert np.isfinite(out).all()
    assert np.std(out) > 0.1


def test_dummy_is_the_same_in_every_type(tmp_path):
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    wide = load(folder, load_format="dummy", dtype="float32")[1]
    narrow = load(folder, load_format="dummy", dtype="bfloat16")[1]
    assert_same(narrow, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide))


def test_dummy_follows_its_seed(tmp_path):
    folder = tiny_models.make_checkpoint("llama2", tmp_path)

    def make(seed):
        return load(folder, load_format="dummy", seed=seed)[1]

    assert_same(make(1), make(1))
    matrices = [x for x in jax.tree.leaves((make(1), make(2))) if x.ndim == 2]
    for i, a in enumerate(matrices):  # no two matrices alike, of one seed or of two
        assert all(a.shape != b.shape or (a != b).any() for b in matrices[:i])
