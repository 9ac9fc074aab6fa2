"""What the JSON files of a model folder say, and where the folder comes from."""

import json
import os
import re
import subprocess
import sys

import huggingface_hub
import pytest

from jpd.checkpoint import read_config, resolve_folder
from jpd.errors import ConfigError
from tests import tiny_models


@pytest.fixture
def folder(tmp_path):
    return tiny_models.make_checkpoint("llama31", tmp_path / "model")


def write_generation(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_eos_of_config_json_without_generation_config(folder):
    assert read_config(folder).eos_token_ids == (2, 3, 4)


@pytest.mark.parametrize(
    ("eos", "want"), [(7, (7,)), ([9, 8, 9], (9, 8)), (None, (2, 3, 4)), (0, (0,))]
)
def test_eos_of_generation_config_wins(folder, eos, want):
    write_generation(folder, eos_token_id=eos)
    assert read_config(folder).eos_token_ids == want


@pytest.mark.parametrize("eos", ["</s>", [2, "x"], 256, -1, [True]])
def test_eos_that_is_no_token_is_refused(folder, eos):
    write_generation(folder, eos_token_id=eos)
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id=.*\[0, 256\)"):
        read_config(folder)


def test_folder_without_config_json(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json") as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_config_of_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"architectures": [', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"{}", r"architectures=\[\] is not supported"),
        (b'{"architectures": ["GPT2LMHeadModel"]}', "GPT2LMHeadModel.*LlamaForCausalLM"),
        (b'{"architectures": ["LlamaForCausalLM"]}', "vocab_size=None is not allowed"),
    ],
)
def test_config_that_is_of_no_use_is_named_with_its_path(folder, text, why):
    path = folder / "config.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=why) as error:
        read_config(folder)
    assert str(error.value).count(str(path)) == 1


def test_folder_resolves_to_itself(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("fetch"))
    assert resolve_folder(folder) == folder
    assert resolve_folder(str(folder)) == folder


def test_file_is_not_fetched(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("fetch"))
    with pytest.raises(ConfigError, match=r"config\.json is a file, not the folder"):
        resolve_folder(folder / "config.json")


@pytest.mark.parametrize("weights", [True, False])
def test_name_is_fetched_without_anything_that_could_run(tmp_path, monkeypatch, weights):
    """The patterns go through the library's own filter, over the names of real repositories."""
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_folder("someone/model", weights=weights) == tmp_path
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    others = [
        "modeling_x.py",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/params.json",
        "onnx/model.safetensors",
        "model.gguf",
        "README.md",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        wanted + others,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert asked["name"] == "someone/model"
    small = [name for name in wanted if not name.endswith(".safetensors")]
    assert list(kept) == (wanted if weights else small)


@pytest.mark.parametrize(
    "name", ["/no/folder", "./no", "../no", "~/no", "no/such/folder", "no folder", "no/", "a--b"]
)
def test_what_no_repository_is_called_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("fetch"))
    with pytest.raises(ConfigError, match=re.escape(f"no such folder: {name!r}")):
        resolve_folder(name)


def test_offline_error_says_both_facts(tmp_path):
    code = """
from jpd.checkpoint import resolve_folder
from jpd.errors import ConfigError
try:
    resolve_folder("someone/model")
except ConfigError as error:
    print(error)
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert (
        "'someone/model' is not a folder, and fetching it from Hugging Face failed" in result.stdout
    )
