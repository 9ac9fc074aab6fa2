"""The choice of the kernel: tables, the rule, inflection points."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dataflow, mosaic, products
from pallas_kernels.dense_gemm import DenseConfig
from pallas_kernels.flat_gemm import FlatConfig
from pallas_kernels.flat_gemm.config import smem_bytes
from pallas_kernels.tune import inflection_points
from tests.pallas_kernels import modes

FLAT, DENSE = FlatConfig(64, 64, 4, 2), DenseConfig(128, 128)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table for "NVIDIA Toy" with one product."""

    def entry(kernel, config, us, xla_us):
        return {"kernel": kernel, "config": vars(config), "us": us, "xla_us": xla_us}

    rows = {
        "8": entry("flat_gemm", FLAT, 5.0, 6.0),
        "64": entry("flat_gemm", FLAT, 9.0, 8.5),
        "256": entry("dense_gemm", DENSE, 20.0, 10.0),
        "2048": entry("dense_gemm", DENSE, 300.0, None),
        "4096": entry("dense_gemm", DENSE, 1200.0, 1185.0),
    }
    few = {"8": rows["8"]}
    products = [
        {"n": 256, "k": 128, "gated": False, "m1": 1, "m2": 256, "rows": rows},
        {"n": 384, "k": 128, "gated": False, "m1": 1, "m2": None, "rows": few},
    ]
    share = [
        {"n": 256, "k": 128, "gated": False, "rows": {"8": entry("dense_gemm", DENSE, 7.0, 9.0)}}
    ]
    tables = {"products": {"132": products, "38": share}}
    (tmp_path / "nvidia_toy.json").write_text(json.dumps(tables))
    monkeypatch.setattr(dataflow, "TUNED", tmp_path)
    dataflow.load_table.cache_clear()
    yield "NVIDIA Toy"
    dataflow.load_table.cache_clear()


@pytest.mark.parametrize(
    ("m", "only", "kernel", "config"),
    [
        (1, False, "flat_gemm", FLAT),
        (8, False, "flat_gemm", FLAT),
        (33, False, "flat_gemm", FLAT),  # XLA is faster, but not by enough to break the chain
        (129, False, "xla", None),
        (129, True, "dense_gemm", DENSE),
        (2000, False, "dense_gemm", DENSE),
        (4000, False, "xla", None),  # not by a tenth, but by more than the gaps around it
        (4000, True, "dense_gemm", DENSE),
        (20000, True, "dense_gemm", DENSE),
    ],
)
def test_table_decides(table, m, only, kernel, config):
    choice = dataflow.choose(m, 256, 128, pallas_only=only, kind=table)
    assert choice == dataflow.Choice(kernel, config, "table")


def test_a_share_of_the_sms_that_was_not_tuned_gets_the_rule(table, monkeypatch):
    assert dataflow.choose(129, 256, 128, kind=table).kernel == "xla"
    monkeypatch.setattr(mosaic, "sm_count", lambda: 66)
    choice = dataflow.choose(129, 256, 128, kind=table)
    assert (choice.kernel, choice.source) == ("dense_gemm", "rule")


def test_a_share_of_the_sms_has_entries_of_its_own(table, monkeypatch):
    assert dataflow.choose(8, 256, 128, kind=table).kernel == "flat_gemm"
    monkeypatch.setattr(mosaic, "sm_count", lambda: 38)
    choice = dataflow.choose(8, 256, 128, kind=table)
    assert choice == dataflow.Choice("dense_gemm", DENSE, "table")
    choice = dataflow.choose(129, 256, 128, kind=table)  # an entry of 132 SMs says nothing here
    assert (choice.kernel, choice.source) == ("dense_gemm", "rule")


@pytest.mark.parametrize(("m", "kernel"), [(1, "flat_gemm"), (64, "flat_gemm"), (65, "dense_gemm")])
def test_rule_decides_without_an_entry(table, m, kernel):
    for n, kind in ((512, table), (256, "NVIDIA Unknown")):
        choice = dataflow.choose(m, n, 128, kind=kind)
        assert (choice.kernel, choice.source) == (kernel, "rule")


@pytest.mark.parametrize(("m", "kernel"), [(9, "flat_gemm"), (300, "dense_gemm")])
def test_rows_without_an_entry_get_the_rule(table, m, kernel):
    """What is fastest for 8 rows says little about 9, which the table could have too."""
    assert dataflow.choose(8, 384, 128, kind=table).source == "table"
    choice = dataflow.choose(m, 384, 128, kind=table)
    assert (choice.kernel, choice.source) == (kernel, "rule")


def test_linear_runs_the_choice(table, monkeypatch):
    monkeypatch.setattr(dataflow, "device_kind", lambda: table)
    x = jax.random.normal(jax.random.key(0), (8, 128), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (256, 128), jnp.bfloat16)
    call = partial(dataflow.linear, residual=jnp.ones((8, 256), jnp.bfloat16))
    y = modes.run(call, x, w)
    expected = np.asarray(products.reference(x, w) + 1)
    error = np.linalg.norm(y.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert error <= 4e-3
    with pytest.raises(NotImplementedError, match="XLA is faster"):
        dataflow.linear(jnp.zeros((256, 128), jnp.bfloat16), w)


def test_inflection_points():
    def entry(kernel, us, xla_us):
        return {"kernel": kernel, "us": us, "xla_us": xla_us}

    rows = {
        8: entry("flat_gemm", 5, 6),
        64: entry("flat_gemm", 6, 7),
        128: entry("dense_gemm", 9, 9),
    }
    assert inflection_points(rows) == {"m1": 1, "m2": 128}
    rows[8]["xla_us"] = 4
    assert inflection_points(rows) == {"m1": 64, "m2": 128}
    rows[64]["xla_us"] = 5
    assert inflection_points(rows) == {"m1": None, "m2": 8}


@pytest.mark.parametrize("file", sorted(dataflow.TUNED.glob("*.json")), ids=lambda f: f.stem)
def test_shipped_tables_can_be_used(file, monkeypatch):
    table = json.loads(file.read_text())
    assert dataflow.slug(table["gpu"]) == file.stem
    for sms, shipped in table["products"].items():
        monkeypatch.setattr(mosaic, "sm_count", lambda sms=sms: int(sms))
        for product in shipped:
            check_shipped(product, table["gpu"])


def check_shipped(product, gpu):
    """Its choices are those of its entries, and fit."""
    n, k, gated = product["n"], product["k"], product["gated"]
    entries = {int(rows): entry for rows, entry in product["rows"].items()}
    assert {*entries} <= {*dataflow.ROWS}
    assert inflection_points(entries) == {"m1": product["m1"], "m2": product["m2"]}
    for m in dataflow.ROWS:
        choice = dataflow.choose(m, n, k, gated=gated, pallas_only=True, kind=gpu)
        assert choice.kernel in ("flat_gemm", "dense_gemm")
        assert choice.source == ("table" if m in entries else "rule")
        if choice.kernel == "flat_gemm":  # DenseConfig refuses what does not fit
            assert smem_bytes(choice.config, m, gated) <= mosaic.SMEM_BYTES
