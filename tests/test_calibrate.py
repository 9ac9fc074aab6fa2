"""Calibration of the unified softmax values: what is seen, what is written, who may use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jpd import box, calibrate, checkpoint, cli, models
from jpd.checkpoint import phi as phi_file
from jpd.errors import ConfigError
from jpd.layers.attention import causal_attend
from jpd.models import bind
from tests import tiny_models
from tests.engine.tiny_engine import MODEL, fresh, greedy, run, tiny_engine, tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.make_checkpoint(MODEL, tmp_path / "model")


def test_the_ranges_are_those_of_the_rows_log_sum_exps(folder: Path) -> None:
    config, params = checkpoint.load(folder, show_progress=False)
    prompts = [tiny_models.random_prompt(MODEL, n, stream=n) for n in (70, 3)]
    observed = calibrate.observe(config, params, [*prompts, []])
    shape = (config.num_layers, config.num_heads)
    assert observed.lse_min.shape == observed.phi().shape == shape
    assert (observed.prompts, observed.tokens) == (2, 73)

    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    edges = calibrate.HISTOGRAM_EDGES
    counts = np.zeros((config.num_layers, len(edges) - 1), int)
    on_an_edge = np.zeros(config.num_layers, int)
    for prompt in prompts:

        def look(layer: int, scores: jnp.ndarray, seen: jnp.ndarray) -> None:
            rows = np.asarray(scores, np.float64).reshape(config.num_heads, *seen.shape)
            mask = np.asarray(seen)
            for row in range(len(mask)):
                lse = np.log(np.exp(rows[:, row, mask[row]]).sum(-1))
                low[layer] = np.minimum(low[layer], lse)
                high[layer] = np.maximum(high[layer], lse)
            seen_scores = rows[:, mask]
            counts[layer] += np.histogram(np.clip(seen_scores, -128, 127.9), edges)[0]
            on_an_edge[layer] += (np.abs(seen_scores - np.round(seen_scores)) < 1e-5).sum()

        bind(config, params).hidden(
            jnp.asarray(prompt), jnp.arange(len(prompt)), causal_attend(config, look)
        )
    np.testing.assert_allclose(observed.lse_min, low, atol=1e-4)
    np.testing.assert_allclose(observed.lse_max, high, atol=1e-4)
    np.testing.assert_allclose(observed.phi(), (low + high) / 2, atol=1e-4)
    # Two compilations may round a score to either side of an edge; every other has its bin.
    np.testing.assert_array_equal(observed.counts.sum(1), counts.sum(1))
    assert np.all(np.abs(observed.counts - counts).sum(1) <= 2 * on_an_edge)
    assert on_an_edge.sum() <= 10


def test_no_prompt_is_an_error(folder: Path) -> None:
    config, params = checkpoint.load(folder, show_progress=False)
    with pytest.raises(ConfigError, match="at least one token"):
        calibrate.observe(config, params, [[]])


def saved(folder: Path, **changes: object) -> np.ndarray:
    """A table beside a checkpoint, with some entries of its file changed."""
    config = checkpoint.read_config(folder)
    table = np.arange(config.num_layers * config.num_heads, dtype=np.float32)
    table = table.reshape(config.num_layers, config.num_heads)
    path = checkpoint.save_phi(folder, table, {"prompts": 1})
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return table


def test_a_table_is_read_back(folder: Path) -> None:
    config = checkpoint.read_config(folder)
    assert checkpoint.load_phi(folder, config) is None
    np.testing.assert_array_equal(saved(folder), checkpoint.load_phi(folder, config))


def test_a_table_of_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    saved(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # the same names, shapes and size
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match=r"jpd_phi.json was made from another checkpoint"):
        tiny_engine(folder)
    # Random weights are no checkpoint.
    engine = tiny_engine(folder, load_format="dummy", batch_buckets=(1,), max_num_seqs=1)
    assert engine.executor._phi is None


@pytest.mark.parametrize("table", [None, [[1.0]], "x", [[float("nan")] * 4] * 2])
def test_what_is_no_table_is_refused(folder: Path, table: object) -> None:
    saved(folder, phi=table)
    with pytest.raises(ConfigError, match=r"phi must be a finite table of \(2, 4\)"):
        checkpoint.load_phi(folder, checkpoint.read_config(folder))


def test_config_and_weights_make_the_fingerprint(folder: Path) -> None:
    first = phi_file.fingerprint(folder)
    (folder / "README.md").write_text("not a part of the model")
    assert phi_file.fingerprint(folder) == first
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert phi_file.fingerprint(folder) != first


def test_an_engine_passes_each_layer_its_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jpd.ops import registry

    plain = tokens(run(fresh(tiny_engine(folder)), [[5, 6, 7]], greedy(max_tokens=4)))
    table, passed = saved(folder), []
    xla = registry.ops()["decode_attention"].implementations["xla"]

    def watched(*args, phi=None, **kwargs):
        passed.append(np.asarray(phi))
        return xla(*args, phi=phi, **kwargs)

    monkeypatch.setitem(registry.ops()["decode_attention"].implementations, "xla", watched)
    engine = tiny_engine(folder)
    assert tokens(run(fresh(engine), [[5, 6, 7]], greedy(max_tokens=4))) == plain
    decoding = [shape for shape in engine.executor.shapes.all() if shape.batch]
    assert len(passed) == len(table) * len(decoding)
    for i, row in enumerate(passed):
        np.testing.assert_array_equal(row, table[i % len(table)])


def test_the_command_writes_beside_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "box"
    shutil.copytree(box.path(), folder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The captain looked at the sea.\n\nIt is a truth\n")
    arguments = ["calibrate", str(folder), "--prompts", str(prompts), "--max-tokens", "8"]
    assert cli.main([*arguments, "--no-plot"]) == 0
    out = capsys.readouterr().out
    content = json.loads((folder / phi_file.FILE).read_text())
    assert f"wrote {folder / phi_file.FILE}: 2 prompts, {content['tokens']} tokens" in out
    assert 2 < content["tokens"] <= 16
    config = models.config_from_hf(json.loads((folder / "config.json").read_text()))
    assert checkpoint.load_phi(folder, config).shape == (config.num_layers, config.num_heads)
    assert np.sum(content["histogram"]["counts"]) > 0

    assert cli.main(["calibrate", str(folder), "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err


def test_the_plot(folder: Path, tmp_path: Path) -> None:
    config, params = checkpoint.load(folder, show_progress=False)
    observed = calibrate.observe(config, params, [[1, 2, 3]])
    path = tmp_path / "scores.svg"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not calibrate.plot(observed, path)
        assert not path.exists()
    else:
        assert calibrate.plot(observed, path)
        assert "<svg" in path.read_text()


def test_values_that_are_not_finite_are_not_written(folder: Path) -> None:
    phi = np.zeros((2, 2), np.float32)
    phi[1, 1] = np.inf
    with pytest.raises(ConfigError, match="not finite"):
        checkpoint.save_phi(folder, phi, {})
    assert not (folder / phi_file.FILE).exists()
