"""The model in the box: what is shipped is what its README says, and can be made again."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from jpd import box, checkpoint
from jpd.box import corpus, export, train
from jpd.models import ModelConfig, Params, config_from_hf, init_params, logits
from jpd.text import Tokenizer

TEXT = Path(box.__file__).parent / "text"
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "ffn_size": 128,
}
_EMPTY = (
    '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'
)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What the training of the shipped model wrote down."""
    return json.loads((box.path() / "training.json").read_text())


@pytest.fixture(scope="module")
def data() -> tuple[Backend, corpus.Corpus]:
    """The tokenizer that the shipped text gives, and its token ids."""
    return corpus.load(TEXT, 4096)


@pytest.fixture(scope="module")
def held_out(data: tuple[Backend, corpus.Corpus]) -> list[str]:
    """The chapters that were kept for validation."""
    backend, tokens = data
    ends = np.flatnonzero(tokens.validation == corpus.EOS_ID)
    return backend.decode_batch(np.split(tokens.validation, ends + 1)[:-1])


@pytest.fixture(scope="module")
def shipped() -> tuple[ModelConfig, Params]:
    return checkpoint.load(box.path(), dtype="float32", show_progress=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(box.path())


def losses(config: ModelConfig, params: Params, tokens: Any) -> jax.Array:
    """Negative log-likelihood `[T - 1]` in nats of every token but the first; tokens `[T]`."""
    tokens = jnp.asarray(tokens)
    chances = jax.nn.log_softmax(logits(config, params, tokens[:-1]))
    return -jnp.take_along_axis(chances, tokens[1:, None], axis=-1)[:, 0]


# ---- what is shipped


def test_the_folder_is_small_and_holds_a_llama(
    record: dict[str, Any], shipped: tuple[ModelConfig, Params]
) -> None:
    assert sum(f.stat().st_size for f in box.path().rglob("*") if f.is_file()) <= 12_000_000
    hf = json.loads((box.path() / "config.json").read_text())
    assert hf["architectures"] == ["LlamaForCausalLM"]
    config, params = shipped
    assert (config.family, config.dtype, config.max_position) == ("llama", "bfloat16", 1024)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == record["parameters"]


def test_the_tokenizer_is_the_one_that_the_text_gives(
    record: dict[str, Any], data: tuple[Backend, corpus.Corpus], held_out: list[str]
) -> None:
    _, tokens = data
    assert (len(tokens.train), len(tokens.validation)) == (
        record["train_tokens"],
        record["val_tokens"],
    )
    assert set(held_out) < set(corpus.chapters(TEXT))
    backend = Backend.from_file(str(box.path() / "tokenizer.json"))
    ids = [t for e in backend.encode_batch(held_out) for t in (*e.ids, corpus.EOS_ID)]
    np.testing.assert_array_equal(ids, tokens.validation)


@pytest.mark.parametrize(
    "text",
    [
        "She wasn't surprised, and could not say\u2014\u201cNo.\u201d\n\nHe smiled.\n\n\n",
        "na\u00efve \u6f22\u5b57 \U0001f642 \t tab\r\n x 1811",
        " leading and trailing  ",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == corpus.BOS_ID
    assert tokenizer.decode(ids) == text


def test_a_chat_is_written_as_paragraphs(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "A tale."},
        {"role": "user", "content": " Emma smiled.\n"},
    ]
    ids = tokenizer.apply_chat_template(messages)
    assert ids == tokenizer.encode("A tale.\n\nEmma smiled.\n\n")
    assert tokenizer.eos_token_ids == {corpus.EOS_ID}


def test_it_predicts_chapters_that_it_has_not_seen(
    record: dict[str, Any],
    shipped: tuple[ModelConfig, Params],
    tokenizer: Tokenizer,
    held_out: list[str],
) -> None:
    """The first 512 tokens of all held-out chapters are 1.1 % harder than all of their tokens.

    2 % is less than one part of the model is worth: 3.1 % above the recorded loss without the MLP
    of one layer, 5.9 % with the heads of one layer in the wrong order, 12 % without the weights of
    the last norm, 10 % with gate and up of one layer exchanged.
    """
    found = [losses(*shipped, tokenizer.encode(text[:3000])[:513]) for text in held_out]
    assert len(found) == 21
    assert np.concatenate(found).mean() == pytest.approx(record["val_loss"], rel=0.02)


def test_the_readme_quotes_the_record(record: dict[str, Any]) -> None:
    rows = (Path(box.__file__).parent / "README.md").read_text().splitlines()
    table = dict(
        row.strip("| ").split(" | ", 1) for row in rows if row.startswith("| ") and row != "| | |"
    )
    assert table["parameters"].startswith(f"{record['parameters']:,}, ")
    assert table["validation loss"] == (
        f"{record['val_loss']} nats a token, {record['val_bits_per_byte']} bits a byte, "
        "of the bfloat16 weights"
    )
    assert table["training"] == (
        f"{record['steps']:,} steps, {record['tokens_seen']:,} tokens, {record['seconds']} s on "
        f"one {record['device']}; best at step {record['best_step']:,}"
    )


# ---- how it is made


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    hf = export.hf_config(**TINY, max_position=64)
    config = config_from_hf(hf)
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # no two alike, so that none can take another's place
        lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.bfloat16),
        init_params(config, "bfloat16", 0),
    )
    export.save(tmp_path, hf, export.checkpoint_tensors(config, params), Backend.from_str(_EMPTY))
    got_config, got = checkpoint.load(tmp_path, show_progress=False)
    assert got_config == config
    jax.tree.map(np.testing.assert_array_equal, got, params)


def test_help_names_the_defaults_of_the_shipped_model(record: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jpd.box.train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--minutes" in done.stdout
    assert "(default: 2000)" in done.stdout
    defaults = {k: v for k, v in vars(train.parse_args([])).items() if k != "out"}
    assert defaults | {"minutes": record["arguments"]["minutes"]} == record["arguments"]


def test_a_short_training_ends_with_a_model_of_the_recorded_loss(
    tmp_path: Path, held_out: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, seq_len = tmp_path / "model", 64
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    options = ["--steps=4", "--eval-every=2", "--batch-size=2", "--learning-rate=0.01"]
    train.main([f"--out={out}", f"--seq-len={seq_len}", *options, *sizes])
    assert f"wrote {out}" in capsys.readouterr().out

    record = json.loads((out / "training.json").read_text())
    assert [point["step"] for point in record["curve"]] == [2, 4]
    first, second = (point["val_loss"] for point in record["curve"])
    assert second < first < math.log(TINY["vocab_size"])  # better than knowing nothing
    assert (record["steps"], record["best_step"], record["val_loss"]) == (4, 4, second)
    assert all(s.startswith(p) for s, p in zip(record["samples"], train.PROMPTS, strict=True))

    tokenizer = Tokenizer.load(out)
    assert tokenizer.decode(tokenizer.encode(held_out[0][:500])) == held_out[0][:500]
    backend = Backend.from_file(str(out / "tokenizer.json"))
    ids = [t for e in backend.encode_batch(held_out) for t in (*e.ids, corpus.EOS_ID)]
    assert len(ids) == record["val_tokens"]
    blocks = np.asarray(ids[: len(ids) // seq_len * seq_len]).reshape(-1, seq_len)
    blocks = np.pad(blocks, ((0, 0), (1, 0)), constant_values=corpus.BOS_ID)
    loaded = checkpoint.load(out, dtype="float32", show_progress=False)
    found = jax.lax.map(partial(losses, *loaded), jnp.asarray(blocks), batch_size=64)
    assert found.mean() == pytest.approx(second, abs=1e-4)
