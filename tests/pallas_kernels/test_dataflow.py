"""The choice of the kernel: tables, the rule, inflection points."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dataflow, mosaic, products
from pallas_kernels.dense_gemm import DenseConfig
from pallas_kernels.flat_gemm import FlatConfig
from pallas_kernels.flat_gemm.config import smem_bytes
from pallas_kernels.flat_gemm.schedule import schedule_of
from pallas_kernels.gemv import GemvConfig
from pallas_kernels.gemv.config import suits
from pallas_kernels.tune import inflection_points
from tests.pallas_kernels import modes, sass

FLAT, DENSE = FlatConfig(64, 64, 4, 2), DenseConfig(128, 128)
BF16 = jnp.bfloat16


class Entry(NamedTuple):
    """An entry of a shipped table."""

    gpu: str
    sms: int
    m: int
    """The most rows that it speaks for, which take most registers and shared memory."""
    n: int
    k: int
    gated: bool
    normed: bool = False
    """Of activations through a norm."""

    def choice(self) -> dataflow.Choice:
        with mosaic.tracing_for(self.gpu, self.sms):
            return dataflow.choose(self.m, self.n, self.k, gated=self.gated, pallas_only=True)

    def program(self) -> tuple[Any, ...]:
        """What decides which code the kernel has: N and K are only numbers in it, but where blocks
        of a flat GEMM share tiles it adds parts up."""
        choice, outputs = self.choice(), self.n // (1 + self.gated)
        shared = None
        if choice.kernel == "flat_gemm":
            with mosaic.tracing_for(self.gpu, self.sms):
                shared = schedule_of(choice.config, outputs, self.k).most_shares > 1
        elif choice.kernel == "gemv":  # how many parts a row has decides what is unrolled
            shared = self.k
        return choice, self.m, self.gated, self.normed, shared

    def call(self, given: dict[str, Any]) -> jax.Array:
        if self.normed:
            given = given | {"norm": (given["norm"], 1e-5)}
        with mosaic.tracing_for(self.gpu, self.sms):
            return dataflow.linear(**given, gated=self.gated, pallas_only=True)

    def case(self) -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
        """Name, function and arguments, with all that a model's layers add."""
        m, n, k = self.m, self.n, self.k
        shapes: dict[str, tuple[int, ...]] = {"x": (m, k), "w": (n, k)}
        if self.normed:  # no layer of a model adds a residual then
            shapes |= {"bias": (n,), "norm": (k,)}
        elif not self.gated:
            shapes |= {"bias": (n,), "residual": (m, n)}
        given = {name: jax.ShapeDtypeStruct(shape, BF16) for name, shape in shapes.items()}
        kind = "-gated" * self.gated + "-norm" * self.normed
        name = f"tuned-{self.sms}-{m}x{n}x{k}{kind}-{self.choice().config}"
        return name, self.call, (given,)


def shipped() -> Iterator[Entry]:
    """Every entry of every table, with a norm too where the kernel takes it."""
    for file in sorted(dataflow.TUNED.glob("*.json")):
        table = json.loads(file.read_text())
        for sms, found in table["products"].items():
            for p in found:
                for rows in p["rows"]:
                    entry = Entry(table["gpu"], int(sms), int(rows), p["n"], p["k"], p["gated"])
                    yield entry
                    if entry.choice().takes_norm(entry.m):
                        yield entry._replace(normed=True)


def sass_cases() -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """What is compiled to sm_90a: every entry of the shipped tables."""
    return [entry.case() for entry in shipped()]


PROGRAMS = {entry.program(): entry for entry in shipped()}
GEMV, OTHER = GemvConfig(2, 1, 2), GemvConfig(1, 1, 2)


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
    gemv = entry("gemv", GEMV, 4.0, 4.1)
    fewer = {"1": gemv, "2": entry("gemv", OTHER, 4.2, 6.0), **few}
    gap = {"1": entry("gemv", GEMV, 5.0, 4.0), "64": rows["64"]}
    products = [
        {"n": 512, "k": 256, "gated": False, "m1": 8, "m2": None, "rows": fewer},
        {"n": 768, "k": 256, "gated": False, "m1": None, "m2": 64, "rows": gap},
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


@pytest.mark.parametrize(
    ("m", "kernel", "config"),
    [
        (1, "gemv", GEMV),
        (2, "gemv", OTHER),
        (3, "flat_gemm", FLAT),
        (4, "flat_gemm", FLAT),
        (8, "flat_gemm", FLAT),
    ],
)
def test_an_entry_of_eight_rows_speaks_for_fewer_that_have_none(table, m, kernel, config):
    assert dataflow.choose(m, 512, 256, kind=table) == dataflow.Choice(kernel, config, "table")
    assert dataflow.choose(m, 384, 128, kind=table) == dataflow.Choice("flat_gemm", FLAT, "table")


def test_entries_beside_a_gap_do_not_speak_for_it(table):
    """Of 1 row for more, and of 64 rows for 8 or fewer."""
    for m in (2, 3, 8, 32):
        choice = dataflow.choose(m, 768, 256, kind=table)
        assert (choice.kernel, choice.source) == ("flat_gemm", "rule")
    assert dataflow.choose(1, 768, 256, kind=table) == dataflow.Choice("xla", None, "table")
    choice = dataflow.choose(1, 768, 256, kind=table, pallas_only=True)
    assert choice == dataflow.Choice("gemv", GEMV, "table")


@pytest.mark.parametrize("m", [1, 2])
def test_linear_runs_the_gemv(table, m, monkeypatch):
    monkeypatch.setattr(dataflow, "device_kind", lambda: table)
    x = jax.random.normal(jax.random.key(0), (m, 256), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (512, 256), jnp.bfloat16)
    extra = {
        "bias": jnp.full((512,), 2, jnp.bfloat16),
        "residual": jnp.ones((m, 512), jnp.bfloat16),
    }
    call = partial(dataflow.linear, **extra)
    assert "gemv" in modes.lower(call, x, w)
    y = modes.run(call, x, w)
    expected = np.asarray(products.reference(x, w, **extra))
    error = np.linalg.norm(y.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert error <= 4e-3


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


def test_linear_takes_a_norm_along_where_the_kernel_does(table, monkeypatch):
    monkeypatch.setattr(dataflow, "device_kind", lambda: table)
    x = 3 * jax.random.normal(jax.random.key(0), (1, 256), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (512, 256), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(2), (256,), jnp.bfloat16)
    assert dataflow.choose(1, 512, 256).takes_norm(1)
    y = modes.run(partial(dataflow.linear, norm=(weight, 1e-5)), x, w)
    x32 = x.astype(jnp.float32)
    normed = x32 / jnp.sqrt((x32 * x32).mean() + 1e-5) * weight.astype(jnp.float32)
    expected = np.asarray(products.reference(normed, w))
    error = np.linalg.norm(y.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert error <= 4e-3
    eight = jnp.zeros((8, 256), jnp.bfloat16)
    assert not dataflow.choose(8, 512, 256).takes_norm(8)
    with pytest.raises(NotImplementedError, match="8, 512, 256: flat_gemm takes no norm"):
        dataflow.linear(eight, w, norm=(weight, 1e-5))


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


def test_inflection_points_beside_a_gemv():
    def entry(kernel):
        return {"kernel": kernel, "us": 5, "xla_us": 6}

    rows = {1: entry("gemv"), 2: entry("gemv"), 4: entry("flat_gemm"), 8: entry("flat_gemm")}
    assert inflection_points(rows) == {"m1": 4, "m2": None}
    assert inflection_points(rows | {64: entry("dense_gemm")}) == {"m1": 4, "m2": 64}
    assert inflection_points(rows | {1: entry("flat_gemm")}) == {"m1": 1, "m2": None}
    assert inflection_points({1: entry("gemv"), 8: entry("flat_gemm")}) == {"m1": 8, "m2": None}
    assert inflection_points({1: entry("gemv")}) == {"m1": None, "m2": None}
    assert inflection_points({1: entry("gemv"), 64: entry("dense_gemm")}) == {"m1": None, "m2": 64}


@pytest.mark.parametrize("file", sorted(dataflow.TUNED.glob("*.json")), ids=lambda f: f.stem)
def test_shipped_tables_can_be_used(file, monkeypatch):
    table = json.loads(file.read_text())
    assert dataflow.slug(table["gpu"]) == file.stem
    for sms, shipped in table["products"].items():
        monkeypatch.setattr(mosaic, "sm_count", lambda sms=sms: int(sms))
        for product in shipped:
            check_shipped(product, table["gpu"])


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.case()[0]) for e in PROGRAMS.values()])
def test_shipped_configurations_lower(entry):
    _, call, arguments = entry.case()
    text = modes.lower(call, *arguments)
    assert text.count("mosaic_gpu_v2") == 1


def test_every_shipped_entry_is_compiled_by_make_sass():
    names = {name for name, _, _ in sass.cases()}
    assert {name for name, _, _ in sass_cases()} <= names
    assert len(sass_cases()) == sum(1 for _ in shipped())


def check_shipped(product, gpu):
    """Its choices are those of its entries, and fit."""
    n, k, gated = product["n"], product["k"], product["gated"]
    entries = {int(rows): entry for rows, entry in product["rows"].items()}
    assert {*entries} <= {*dataflow.ROWS}
    assert inflection_points(entries) == {"m1": product["m1"], "m2": product["m2"]}
    for m in dataflow.ROWS:
        choice = dataflow.choose(m, n, k, gated=gated, pallas_only=True, kind=gpu)
        assert choice.kernel in dataflow.CONFIGS
        assert choice.source == ("rule" if dataflow.entry_for(m, entries) is None else "table")
        if m >= dataflow.FEW_ROWS:
            assert choice.source == ("table" if m in entries else "rule")
        if choice.kernel == "gemv":
            assert suits(choice.config, n // (1 + gated), k)
        if choice.kernel == "flat_gemm":  # DenseConfig refuses what does not fit
            assert smem_bytes(choice.config, m, gated) <= mosaic.SMEM_BYTES


@pytest.mark.parametrize("sizes", [(0, 64, 64), (8, 0, 64), (8, 64, 0)])
def test_an_empty_axis_is_named(sizes):
    name = "MNK"[sizes.index(0)]
    with pytest.raises(NotImplementedError, match=f"{name} is 0: at least 1"):
        dataflow.choose(*sizes)
    m, n, k = sizes
    with pytest.raises(NotImplementedError, match=f"{name} is 0: at least 1"):
        dataflow.linear(jnp.zeros((m, k), BF16), jnp.zeros((n, k), BF16))


def test_a_weight_that_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"matrices: \(8, 64\), \(1, 64, 64\)"):
        dataflow.linear(jnp.zeros((8, 64), BF16), jnp.zeros((1, 64, 64), BF16))


def test_says_what_the_table_covers(table):
    with mosaic.tracing_for(table, 132):
        assert dataflow.coverage() == (
            "nvidia_toy.json, for 38, 132 SMs: 4 products on 132, each with some of up to "
            "1, 2, 8, 64, 256, 2048, 4096 rows; a rule decides all others"
        )
    with mosaic.tracing_for(table, 66):
        assert dataflow.coverage() == (
            "nvidia_toy.json is for 38, 132 SMs, here are 66: a rule decides"
        )
    with mosaic.tracing_for("NVIDIA Unknown", 132):
        assert dataflow.coverage() == "none for NVIDIA Unknown: a rule decides"
