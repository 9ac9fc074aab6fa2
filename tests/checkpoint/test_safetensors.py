"""Parameters from Hugging Face folders: right values, in every type and layout of files."""

import json
import os
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jpd.checkpoint import load, param_bytes
from jpd.checkpoint import safetensors as reader
from jpd.errors import CheckpointError, ConfigError
from jpd.models import abstract_params
from tests import tiny_models

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def read(folder, **options):
    return load(folder, show_progress=False, **options)[1]


def assert_same(got, want):
    """Same structure, shapes, types and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(
            np.asarray(a).reshape(-1).view(np.uint8), np.asarray(b).reshape(-1).view(np.uint8)
        )


def expected(name, stored="float32"):
    """The parameter tree built from the case's tensors by hand."""
    case = tiny_models.CASES[name]
    t = {k: v.astype(NUMPY[stored]) for k, v in tiny_models.make_tensors(name).items()}

    def joined(prefix, *parts):
        return {
            kind: np.concatenate([t[f"{prefix}.{part}.{kind}"] for part in parts])
            for kind in ("weight", "bias")
            if f"{prefix}.{parts[0]}.{kind}" in t
        }

    layers = {}
    for i in range(case["num_hidden_layers"]):
        at = f"model.layers.{i}"
        layers[i] = {
            "attention_norm": joined(at, "input_layernorm"),
            "attention": {
                "qkv": joined(f"{at}.self_attn", "q_proj", "k_proj", "v_proj"),
                "out": joined(f"{at}.self_attn", "o_proj"),
            },
            "mlp_norm": joined(at, "post_attention_layernorm"),
            "mlp": {
                "gate_up": joined(f"{at}.mlp", "gate_proj", "up_proj"),
                "down": joined(f"{at}.mlp", "down_proj"),
            },
        }
        if case["model_type"] == "qwen3":
            layers[i]["attention"]["q_norm"] = joined(f"{at}.self_attn", "q_norm")
            layers[i]["attention"]["k_norm"] = joined(f"{at}.self_attn", "k_norm")
    tree = {
        "embed": joined("model", "embed_tokens"),
        "layers": layers,
        "norm": joined("model", "norm"),
    }
    if not case["tie_word_embeddings"]:
        tree["lm_head"] = {"weight": t["lm_head.weight"]}
    return tree


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_every_family_gives_the_tree_of_its_model(name, tmp_path):
    config, params = load(tiny_models.make_checkpoint(name, tmp_path), show_progress=False)
    assert_same(params, expected(name))
    want = abstract_params(config, "float32")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )
    assert param_bytes(config, "float32") == sum(x.nbytes for x in jax.tree.leaves(params))
    assert param_bytes(config, "bfloat16") == param_bytes(config, "float32") // 2


@pytest.mark.parametrize("asked", NUMPY)
@pytest.mark.parametrize("stored", NUMPY)
def test_every_stored_type_as_every_asked_type(stored, asked, tmp_path):
    folder = tiny_models.make_checkpoint("llama_bias", tmp_path, dtype=stored)
    want = jax.tree.map(lambda x: x.astype(NUMPY[asked]), expected("llama_bias", stored))
    assert_same(read(folder, dtype=asked), want)


@pytest.mark.parametrize("stored", NUMPY)
def test_auto_takes_the_type_of_the_config(stored, tmp_path):
    folder = tiny_models.make_checkpoint("qwen2", tmp_path, dtype=stored)
    assert_same(read(folder), expected("qwen2", stored))


def test_file_of_the_safetensors_library(tmp_path):
    folder = tiny_models.make_checkpoint("qwen3_bias", tmp_path)
    tensors = tiny_models.make_tensors("qwen3_bias")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert_same(read(folder), expected("qwen3_bias"))


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_equal_one_file(indexed, tmp_path):
    folder = tiny_models.make_checkpoint("qwen2", tmp_path, shards=4)
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
    assert_same(read(folder), expected("qwen2"))


def test_files_beside_the_index_are_not_read(tmp_path):
    """Mistral's repositories hold all weights a second time, under other names."""
    folder = tiny_models.make_checkpoint("qwen2", tmp_path, shards=2)
    tiny_models.write_safetensors(
        folder / "consolidated.safetensors", {"tok_embeddings": np.ones(3, np.float32)}, "float32"
    )
    assert_same(read(folder), expected("qwen2"))


def test_small_pieces_join_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_PIECE_BYTES", 1000)
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    want = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), expected("llama2"))
    assert_same(read(folder, dtype="bfloat16"), want)
    assert_same(read(folder), expected("llama2"))


def rewrite(folder, change):
    """Writes the folder's tensors again after `change` has worked on the dict of them."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_tensors_that_follow_from_others_are_passed_over(tmp_path):
    folder = tiny_models.make_checkpoint("llama3", tmp_path)  # tied
    extra = {
        "lm_head.weight": np.ones((256, 64), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    rewrite(folder, lambda tensors: tensors.update(extra))
    assert_same(read(folder), expected("llama3"))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_values_beyond_float16_are_refused(stored, tmp_path):
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    tensors = tiny_models.make_tensors("llama2")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = 1e6
    safetensors.numpy.save_file(
        {k: v.astype(NUMPY[stored]) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    assert jax.tree.leaves(read(folder, dtype="bfloat16"))[0].dtype == ml_dtypes.bfloat16
    with pytest.raises(CheckpointError, match=r"float16 cannot hold \(1\)") as error:
        read(folder, dtype="float16")
    assert "layers.1.attention.out.weight" in str(error.value)


def test_parameters_are_the_callers_own(tmp_path):
    """On a CPU an array may share its memory with what it came from: nothing else may write it."""
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    params = read(folder)
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    other = tiny_models.make_checkpoint("llama2", tmp_path / "other", dtype="bfloat16")
    read(other, dtype="float32")
    assert_same(params, expected("llama2"))


def test_arguments_are_checked(tmp_path):
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    with pytest.raises(ConfigError, match=r"dtype='int8' is not allowed: one of.*bfloat16"):
        read(folder, dtype="int8")
    with pytest.raises(ConfigError, match=r"load_format='pt' is not allowed: one of.*safetensors"):
        read(folder, load_format="pt")


def test_progress_goes_to_stderr_in_bytes(tmp_path, capfd):
    folder = tiny_models.make_checkpoint("llama2", tmp_path)
    load(folder, show_progress=True)
    shown = capfd.readouterr()
    assert "Loading weights: 100%" in shown.err
    assert "B/s" in shown.err
    assert shown.out == ""
    load(folder, show_progress=False)
    assert capfd.readouterr() == ("", "")


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, sprung):
        self.sprung = str(sprung)

    def __reduce__(self):
        return os.mkdir, (self.sprung,)


def test_nothing_of_a_folder_is_executed(tmp_path):
    folder = tiny_models.make_checkpoint("llama2", tmp_path / "model")
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)
    assert sprung.exists()  # the trap works
    sprung.rmdir()
    for name in ("pytorch_model.bin", "training_args.bin", "scheduler.pt"):
        (folder / name).write_bytes(trap)
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(read(folder), expected("llama2"))
    assert not sprung.exists()

    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, scheduler.pt, training_args"):
        read(folder)
    assert not sprung.exists()
