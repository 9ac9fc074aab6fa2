"""Flat GEMM: numbers and races, the even cut of the work, lowering of real shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.flat_gemm import FlatConfig, candidates, default, flat_gemm
from pallas_kernels.flat_gemm.config import smem_bytes
from pallas_kernels.flat_gemm.kernel import Schedule
from pallas_kernels.products import reference
from pallas_kernels.rms_norm.reference import rms_norm
from pallas_kernels.workspace import counters, workspace
from tests.pallas_kernels import modes

BF16, FP16 = jnp.bfloat16, jnp.float16
EPS = 1e-2  # so large that leaving it out shows
SHAPES = (  # outputs, inputs, gated: projections of 7B and 8B models, and logits
    (12288, 4096, False),
    (4096, 4096, False),
    (11008, 4096, True),
    (4096, 11008, False),
    (6144, 4096, False),
    (14336, 4096, True),
    (4096, 14336, False),
    (4608, 3584, False),
    (18944, 3584, True),
    (3584, 18944, False),
    (128256, 4096, False),
)
NORMED = (  # what comes after a norm, and the widest of a 70B model
    (12288, 4096, False),
    (11008, 4096, True),
    (6144, 4096, False),
    (14336, 4096, True),
    (4608, 3584, False),
    (18944, 3584, True),
    (10240, 8192, False),
    (28672, 8192, True),
)


def operands(
    m, outputs, k, *, dtype=BF16, gated=False, bias=False, residual=False, layout="nk", norm=False
):
    """Shapes of the arguments of one call, by name."""
    n = outputs * (1 + gated)
    made = {"x": (m, k), "w": (n, k) if layout == "nk" else (k, n)}
    if bias:
        made["bias"] = (n,)
    if residual:
        made["residual"] = (m, outputs)
    if norm:
        made["norm"] = (k,)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in made.items()}


def arguments(given):
    """Keyword arguments of `flat_gemm`: the norm's weight with its eps."""
    return given | ({"norm": (given["norm"], EPS)} if "norm" in given else {})


def expected_of(given, **static):
    """In float32; a norm first."""
    given = dict(given)
    weight = given.pop("norm", None)
    if weight is not None:
        given["x"] = rms_norm(given["x"], weight, eps=EPS)
    return reference(**given, **static)


def _call(given, **static):
    return flat_gemm(**arguments(given), **static)


def sass_cases():
    """Name, function and arguments of what is compiled to sm_90a: no register may spill."""
    found = []
    for outputs, k, gated in SHAPES:
        for m in (1, 16, 32, 64, 128):
            for config in candidates(m, outputs, gated)[:: 1 if m == 128 else 3]:
                given = operands(m, outputs, k, gated=gated, residual=not gated, bias=k == 3584)
                call = functools.partial(_call, gated=gated, config=config)
                found.append((f"flat_gemm-{m}x{outputs}x{k}-{config}", call, (given,)))
    for outputs, k, gated in NORMED:
        for m in (1, 5, 8):
            every = candidates(m, outputs, gated)
            for config in {c.tile_k: c for c in every}.values():
                options = {"gated": gated, "bias": k == 3584}
                given = operands(m, outputs, k, norm=True, **options)
                call = functools.partial(_call, gated=gated, config=config)
                found.append((f"flat_gemm-norm-{m}x{outputs}x{k}-{config}", call, (given,)))
    return found


def draw(shapes, seed):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    given = {
        name: jax.random.normal(key, s.shape, s.dtype)
        for key, (name, s) in zip(keys, shapes.items(), strict=True)
    }
    given["w"] = (given["w"].astype(jnp.float32) / shapes["x"].shape[1] ** 0.5).astype(BF16)
    given["w"] = given["w"].astype(shapes["w"].dtype)
    return given


NORM = {"norm": True}
CASES = {  # M, outputs, K, SMs, configuration, what else
    "one row": (1, 128, 512, 5, FlatConfig(64, 128, 2, 2), {}),
    "rows that TMA fills up": (5, 128, 512, 5, FlatConfig(64, 128, 3, 2), {"residual": True}),
    "rows that are padded": (13, 64, 256, 3, FlatConfig(64, 64, 3, 2), {"residual": True}),
    "tiles in two parts": (16, 192, 512, 9, FlatConfig(64, 128, 3, 3, 2), {"residual": True}),
    "whole tiles": (8, 192, 256, 9, FlatConfig(64, 64, 4, 4, 1), {"bias": True}),
    "many parts": (8, 64, 1024, 7, FlatConfig(64, 64, 3, 2), {"bias": True}),
    "gated": (24, 128, 512, 5, FlatConfig(64, 128, 2, 2), {"gated": True, "bias": True}),
    "wide tiles": (64, 256, 640, 7, FlatConfig(128, 64, 4, 2), {}),
    "sums too large to load at once": (128, 64, 512, 4, FlatConfig(64, 64, 2, 2), {}),
    "N-major": (8, 128, 512, 3, FlatConfig(64, 128, 2, 2), {"layout": "kn"}),
    "fp16": (8, 128, 256, 5, FlatConfig(64, 64, 3, 2), {"dtype": FP16, "residual": True}),
    "more SMs than steps": (8, 64, 128, 32, FlatConfig(64, 64, 2, 2), {}),
    "tile_k that K is no multiple of": (8, 64, 320, 2, FlatConfig(64, 128, 3, 2), {}),
    "norm, one row, gated": (1, 128, 512, 3, FlatConfig(64, 256, 2, 2), {**NORM, "gated": True}),
    "norm, cut tiles": (5, 128, 512, 5, FlatConfig(64, 128, 3, 2), {**NORM, "residual": True}),
    "norm, whole tiles": (8, 192, 512, 9, FlatConfig(64, 128, 3, 3, 1), {**NORM, "bias": True}),
    "norm, gated, cut": (8, 64, 768, 2, FlatConfig(64, 256, 2, 2), {**NORM, "gated": True}),
    "norm, fp16": (8, 128, 256, 5, FlatConfig(64, 128, 3, 2), {**NORM, "dtype": FP16}),
    "norm, N-major": (5, 128, 256, 3, FlatConfig(64, 128, 2, 2), {**NORM, "layout": "kn"}),
    "norm, one row at a time": (3, 64, 16384, 1, FlatConfig(64, 256, 2, 2), NORM),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, monkeypatch, capfd):
    m, outputs, k, sms, config, extra = CASES[name]
    monkeypatch.setattr(mosaic, "sm_count", lambda: sms)
    shapes = operands(m, outputs, k, **extra)
    given = draw(shapes, m + outputs + k)
    static = {"gated": extra.get("gated", False), "w_layout": extra.get("layout", "nk")}

    def call(given, interpret):
        with workspace():
            out = _call(given, **static, config=config, interpret=interpret)
            return out, counters(1)[...]

    out, left = modes.run(call, given)
    expected = expected_of(given, **static)
    assert out.shape == expected.shape
    assert out.dtype == shapes["x"].dtype
    error = np.linalg.norm(out.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert error <= 4e-3
    assert not left.any(), "counters must be left at zero"
    assert not modes.unexplained_races(capfd.readouterr().out, "share.<locals>")


@pytest.mark.parametrize(
    ("tiles", "steps", "blocks"), [(64, 32, 132), (1, 7, 5), (192, 32, 192), (13, 3, 39), (5, 4, 7)]
)
def test_every_step_has_one_owner(tiles, steps, blocks):
    schedule = Schedule(tiles, steps, blocks)
    taken = [
        block
        for block in range(schedule.blocks)
        for _ in range(schedule.first(block), schedule.first(block + 1))
    ]
    assert taken == [schedule.owner(step) for step in range(tiles * steps)]
    sizes = np.bincount(taken, minlength=schedule.blocks)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_lowers_for_hopper(shape):
    outputs, k, gated = shape
    for m in (1, 8, 16, 32, 64, 128):
        given = operands(m, outputs, k, gated=gated, residual=not gated)
        call = functools.partial(_call, gated=gated)
        text = modes.lower(call, given)
        assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("shape", NORMED, ids=lambda s: "x".join(map(str, s)))
def test_lowers_for_hopper_with_a_norm(shape):
    outputs, k, gated = shape
    for m in (1, 5, 8):
        for config in {c.tile_k: c for c in candidates(m, outputs, gated)}.values():
            given = operands(m, outputs, k, gated=gated, norm=True)
            text = modes.lower(functools.partial(_call, gated=gated, config=config), given)
            assert text.count("mosaic_gpu_v2") == 1


def test_rows_of_any_size_are_normed(capfd):
    """Each row by its own factor, whatever the others are; 0 stays 0."""
    sizes = jnp.asarray([1e-3, 1, 300, 0, 7], BF16)
    given = draw(operands(5, 64, 256, norm=True), 3)
    given["x"] = given["x"] * sizes[:, None]
    out = np.asarray(modes.run(_call, given).astype(jnp.float32))
    expected = np.asarray(expected_of(given))
    errors = np.linalg.norm(out - expected, axis=1)
    assert (errors <= 4e-3 * np.linalg.norm(expected, axis=1)).all()
    assert not modes.unexplained_races(capfd.readouterr().out, "share.<locals>")


def test_candidates_fit_shared_memory():
    for outputs, _, gated in SHAPES:
        for m in (1, 16, 32, 64, 128):
            found = candidates(m, outputs, gated)
            assert found[0] == default(m, outputs, gated)
            assert len(set(found)) == len(found)
            assert all(smem_bytes(c, m, gated) <= mosaic.SMEM_BYTES for c in found)
            assert smem_bytes(found[0], m, gated) <= mosaic.SMEM_BYTES // 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": jnp.zeros((129, 128), BF16)}, NotImplementedError, "M is at most 128"),
        (
            {"x": jnp.zeros((8, 100), BF16), "w": jnp.zeros((64, 100), BF16)},
            NotImplementedError,
            "K a multiple of 64",
        ),
        ({"w": jnp.zeros((64, 64), BF16)}, ValueError, "K = 64"),
        ({"w": jnp.zeros((64, 128), FP16)}, ValueError, "w is float16"),
        ({"x": jnp.zeros((8, 128)), "w": jnp.zeros((64, 128))}, NotImplementedError, "float32"),
        ({"bias": jnp.zeros((65,), BF16)}, ValueError, "bias has shape"),
        ({"residual": jnp.zeros((8, 65), BF16)}, ValueError, "residual has shape"),
        ({"w_layout": "mn"}, ValueError, "'mn'"),
        ({"config": FlatConfig(x_stages=1)}, NotImplementedError, "x_stages"),
        (
            {
                "w": jnp.zeros((192, 128), BF16),
                "bias": jnp.zeros((192,), BF16),
                "config": FlatConfig(tile_n=128),
            },
            NotImplementedError,
            "must divide the 192 outputs",
        ),
        ({"norm": (jnp.zeros(64, BF16), EPS)}, ValueError, "norm's weight is bfloat16"),
        ({"norm": (jnp.zeros(128), EPS)}, ValueError, "norm's weight is float32"),
        (
            {"norm": (jnp.zeros(128, BF16), EPS), "x": jnp.zeros((9, 128), BF16)},
            NotImplementedError,
            "M = 9",
        ),
        (
            {"norm": (jnp.zeros(128, BF16), EPS), "config": FlatConfig(64, 256)},
            NotImplementedError,
            "tile_k = 256",
        ),
        (
            {
                "norm": (jnp.zeros(192, BF16), EPS),
                "x": jnp.zeros((8, 192), BF16),
                "w": jnp.zeros((64, 192), BF16),
            },
            NotImplementedError,
            "K = 192",
        ),
    ],
)
def test_refuses(change, error, words):
    given = {"x": jnp.zeros((8, 128), BF16), "w": jnp.zeros((64, 128), BF16)}
    with pytest.raises(error, match=words):
        flat_gemm(**(given | change))
