"""Every fault of a checkpoint is found before loading, and all of them are in one error."""

import json

import jax
import numpy as np
import pytest

from jpd.checkpoint import load
from jpd.errors import CheckpointError
from tests import tiny_models

SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
Q, GATE = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def single(tmp_path):
    return tiny_models.make_checkpoint("llama31", tmp_path)


@pytest.fixture
def sharded(tmp_path):
    return tiny_models.make_checkpoint("llama31", tmp_path, shards=3)


def message(folder, monkeypatch):
    """The error's text; fails if anything went to a device before it was raised."""
    monkeypatch.setattr(jax, "device_put", lambda *a, **k: pytest.fail("loaded before checked"))
    with pytest.raises(CheckpointError) as error:
        load(folder, show_progress=False)
    return str(error.value)


def edit(path, change):
    """Lets `change` work on a file's header, and writes it back before the same data."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def rename(old, new):
    return lambda header: header.update({new: header.pop(old)})


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_and_unexpected_tensors(single, monkeypatch):
    edit(single / "model.safetensors", rename(Q, Q.removeprefix("model.")))
    text = message(single, monkeypatch)
    assert "2 faults" in text
    assert f"missing tensors (1):\n    {Q}" in text
    assert "unexpected tensors (1):\n    layers.0.self_attn.q_proj.weight [96, 96]" in text


def test_wrong_shape(single, monkeypatch):
    edit(single / "model.safetensors", lambda header: header[GATE].update(shape=[96, 192]))
    text = message(single, monkeypatch)
    assert "1 fault found" in text
    assert f"wrong shapes (1):\n    {GATE}: [96, 192], config.json makes it [192, 96]" in text


def test_parts_of_a_stacked_parameter_are_checked_one_by_one(single, monkeypatch):
    """q of 96 rows and k of 32 stack to as many rows as q of 32 and k of 96."""
    k = Q.replace("q_proj", "k_proj")

    def swap(header):
        header[Q], header[k] = header[k], header[Q]

    edit(single / "model.safetensors", swap)
    text = message(single, monkeypatch)
    assert "wrong shapes (2)" in text
    assert f"{Q}: [32, 96], config.json makes it [96, 96]" in text


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
def test_unsupported_dtype(dtype, single, monkeypatch):
    tensors = tiny_models.make_tensors("llama31")
    path = single / "model.safetensors"
    tiny_models.write_safetensors(path, tensors, "float32")

    def shrink(header):
        begin, end = header[Q]["data_offsets"]
        # The same bytes under two names: no hole, and the wanted one keeps its shape.
        half = begin + (end - begin) // 4
        header[Q].update(dtype=dtype, data_offsets=[begin, half])
        header["rest.rotary_emb.inv_freq"] = {
            "dtype": "U8",
            "shape": [end - half],
            "data_offsets": [half, end],
        }

    edit(path, shrink)
    text = message(single, monkeypatch)
    assert "1 fault found" in text
    assert f"unsupported dtypes (1):\n    {Q}: {dtype}, allowed: F32, F16, BF16" in text


def cut_data(raw):
    return raw[:-1]


def cut_header(raw):
    return raw[:100]


def cut_length(raw):
    return raw[:5]


def empty(raw):
    return b""


def lengthen(raw):
    return raw + b"\0\0"


def garbage(raw):
    return b"\xff" * 64


def break_json(raw):
    return raw[:8] + b"[" + raw[9:]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut_data, "cut short, "),
        (lengthen, "2 bytes after its last tensor"),
        (cut_header, "100 bytes, too few for its header"),
        (cut_length, "5 bytes, too few for its header"),
        (empty, "0 bytes, too few for its header"),
        (garbage, "64 bytes, too few for its header"),
        (break_json, "model.safetensors: "),
    ],
)
def test_damaged_file(damage, why, single, monkeypatch):
    path = single / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    text = message(single, monkeypatch)
    assert "damaged files (1):\n    model.safetensors: " in text
    assert why in text
    # What a readable header lists is not missing; of an unreadable one nobody knows.
    known = damage in (cut_data, lengthen)
    assert ("missing tensors" not in text) if known else ("may be in the damaged files" in text)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: h[Q].update(shape=[95, 96]), "F32 of shape [95, 96] in 36864 bytes"),
        (lambda h: h[Q].update(shape=[-1, 96]), "is malformed"),
        (lambda h: h[Q].update(data_offsets=[0]), "is malformed"),
        (lambda h: h.update({Q: 3}), "is malformed"),
        (lambda h: h.pop(Q), "starts at byte"),
        (lambda h: h.update(again=h[Q]), "starts at byte"),
    ],
)
def test_header_that_contradicts_itself(change, why, single, monkeypatch):
    edit(single / "model.safetensors", change)
    text = message(single, monkeypatch)
    assert "damaged files (1)" in text
    assert why in text


def test_name_twice_in_a_header(single, monkeypatch):
    path = single / "model.safetensors"
    raw = path.read_bytes()
    other = Q.replace("q_proj", "o_proj")  # as long, and of the same shape
    path.write_bytes(raw.replace(other.encode(), Q.encode(), 1))
    assert "a name stands in its header twice" in message(single, monkeypatch)


def test_shard_that_the_index_names_but_does_not_exist(sharded, monkeypatch):
    (sharded / SHARDS[1]).unlink()
    text = message(sharded, monkeypatch)
    assert "1 fault found" in text  # its tensors are not listed a second time as missing
    assert f"missing files (1):\n    {SHARDS[1]}, which the index names for 10 tensors" in text


def test_tensor_that_the_index_promises_but_no_file_holds(sharded, monkeypatch):
    change_index(sharded, lambda names: names.update({"model.extra": SHARDS[0]}))
    text = message(sharded, monkeypatch)
    assert f"missing tensors (1):\n    model.extra, not in {SHARDS[0]} as indexed" in text


def test_tensor_in_two_files(sharded, monkeypatch):
    (sharded / INDEX).unlink()
    (sharded / "more.safetensors").write_bytes((sharded / SHARDS[0]).read_bytes())
    text = message(sharded, monkeypatch)
    assert "tensors in more than one file (10)" in text
    assert "model.embed_tokens.weight, in 2 files" in text


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "a/b", "", 3])
def test_index_reads_nothing_outside_of_the_folder(outside, sharded, monkeypatch):
    change_index(sharded, lambda names: names.update({Q: outside}))
    assert "not a safetensors file of the folder" in message(sharded, monkeypatch)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_damaged_index(text, sharded, monkeypatch):
    (sharded / INDEX).write_text(text)
    got = message(sharded, monkeypatch)
    assert "damaged files (1)" in got
    assert INDEX in got


def test_folder_without_weights(single, monkeypatch):
    (single / "model.safetensors").unlink()
    assert "missing files (1)" in message(single, monkeypatch)


def test_all_faults_together(sharded, monkeypatch):
    # Shard 1 lacks one tensor, has an unknown one and a wrong shape, and is cut short.
    names = list(json.loads((sharded / INDEX).read_text())["weight_map"].items())
    first = [n for n, file in names if file == SHARDS[0] and n.startswith("model.layers")]
    lost, turned, odd = first[0], *[n for n in first if "_proj.weight" in n][-2:]

    def spoil(header):
        header["model.stranger"] = header.pop(lost)
        header[turned]["shape"] = [1, *header[turned]["shape"]]
        header[odd].update(dtype="F8_NEW")

    edit(sharded / SHARDS[0], spoil)
    with (sharded / SHARDS[0]).open("r+b") as file:
        file.truncate((sharded / SHARDS[0]).stat().st_size - 7)
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[2]).write_bytes(b"")
    text = message(sharded, monkeypatch)
    assert "7 faults found" in text
    assert f"{SHARDS[0]}: cut short" in text
    assert f"{SHARDS[1]}, which the index names" in text
    assert f"{SHARDS[2]}: 0 bytes, too few" in text
    assert f"missing tensors (1):\n    {lost}, not in {SHARDS[0]} as indexed" in text
    assert "unexpected tensors (1):\n    model.stranger" in text
    assert f"wrong shapes (1):\n    {turned}" in text
    assert f"unsupported dtypes (1):\n    {odd}: F8_NEW" in text


def test_long_lists_are_cut(single, monkeypatch):
    """The tensors of a base model, which lack the prefix `model.`: all are missing, all unknown."""
    names = list(tiny_models.make_tensors("llama31"))

    def strip(header):
        for name in names:
            header["base." + name] = header.pop(name)

    edit(single / "model.safetensors", strip)
    text = message(single, monkeypatch)
    assert f"{2 * len(names)} faults found" in text
    assert f"missing tensors ({len(names)})" in text
    assert f"unexpected tensors ({len(names)})" in text
    assert text.count(f"    ... and {len(names) - 20} more") == 2
    assert len(text.splitlines()) == 1 + 2 * (1 + 20 + 1)


def test_file_that_is_cut_while_it_is_read(single, monkeypatch):
    path = single / "model.safetensors"
    put = jax.device_put

    def cut_then_put(value, device):
        with path.open("r+b") as file:
            file.truncate(20_000)
        return put(np.array(value), device)

    monkeypatch.setattr(jax, "device_put", cut_then_put)
    with pytest.raises(CheckpointError, match=r"was cut short while .* was read"):
        load(single, show_progress=False)
