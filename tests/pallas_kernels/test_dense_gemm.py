"""Dense GEMM: numbers and races in interpret mode, lowering of real shapes, the choice of tiles."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dense_gemm import (
    DenseConfig,
    candidates,
    default,
    dense_gemm,
)
from pallas_kernels.products import reference
from tests.pallas_kernels import modes

BF16, FP16 = jnp.bfloat16, jnp.float16
SHAPES = (  # N, K: projections of 7B and 8B models
    (12288, 4096),
    (4096, 4096),
    (22016, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
)
SMALL = DenseConfig(tile_m=128, tile_n=128, stages=3)


def operands(m, n, k, *, dtype=BF16, bias=False, residual=False, gated=False, w_layout="nk"):
    """Shapes of the arguments of one call, by name."""
    made = {"x": (m, k), "w": (n, k) if w_layout == "nk" else (k, n)}
    if bias:
        made["bias"] = (n,)
    if residual:
        made["residual"] = (m, n // 2 if gated else n)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in made.items()}


def sass_cases():
    """Name, function and arguments of what is compiled to sm_90a: no register may spill."""
    cases = []
    for n, k in SHAPES:
        gated = n in (22016, 28672)
        for m in (65, 256, 512, 1024, 4096):
            extra = {"gated": gated, "residual": n == 4096, "bias": n in (6144, 12288)}
            config = default(m, n, k, 132, gated=gated)
            cases.append((f"dense_gemm-{m}x{n}x{k}", m, n, k, config, extra))
    for config in candidates(4096, 4096, 4096) + candidates(256, 4096, 14336):
        name = f"dense_gemm-{config}"
        cases.append((name, 4096, 4096, 4096, config, {"bias": True, "residual": True}))
    found = []
    for name, m, n, k, config, extra in cases:
        static = {"gated": extra.get("gated", False), "config": config}
        found.append((name, functools.partial(_call, **static), (operands(m, n, k, **extra),)))
    return found


def _call(given, **static):
    return dense_gemm(**given, **static)


def error(m, n, k, config, *, gated=False, w_layout="nk", dtype=BF16, **extra):
    """Relative error of the kernel, run by the interpreter with race detection."""
    shapes = operands(m, n, k, dtype=dtype, gated=gated, w_layout=w_layout, **extra)
    keys = jax.random.split(jax.random.key(m + n + k), len(shapes))
    given = {
        name: jax.random.normal(key, shape.shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    given["w"] = (given["w"].astype(jnp.float32) / k**0.5).astype(dtype)
    rest = {"gated": gated, "w_layout": w_layout}
    call = functools.partial(_call, **rest, config=config)
    out = modes.run(call, given)
    assert out.dtype == dtype
    expected = reference(**given, **rest)
    assert out.shape == expected.shape
    return jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


LAST_TO_COME = "compute_item.<locals>._)"
"""Where the last block of a split tile clears the counter that all of them drew from."""
CASES = {
    "ragged": (200, 256, 320, SMALL, {}),
    "fewer-rows-than-a-tile": (65, 192, 256, SMALL, {"bias": True, "w_layout": "kn"}),
    "columns-over-the-edge": (
        200,
        192,
        256,
        DenseConfig(tile_m=128, tile_n=256, stages=2),
        {"bias": True, "residual": True},
    ),
    "warpgroups-along-n": (
        300,
        512,
        128,
        DenseConfig(tile_m=64, tile_n=128, wg_dimension="n", grid_tile_width=2),
        {"w_layout": "kn"},
    ),
    "tall-tile": (
        300,
        192,
        192,
        DenseConfig(tile_m=256, tile_n=192, stages=3),
        {"bias": True, "residual": True, "dtype": FP16},
    ),
    "one-step": (130, 64, 64, DenseConfig(tile_m=128, tile_n=64), {"residual": True}),
    "gated": (200, 384, 256, DenseConfig(stages=3), {"gated": True}),
    "gated-with-all": (
        65,
        384,
        192,
        SMALL,
        {"gated": True, "bias": True, "residual": True, "dtype": FP16},
    ),
    "split": (
        200,
        192,
        448,
        DenseConfig(tile_m=128, tile_n=128, stages=4, split_k=3),
        {"bias": True, "residual": True},
    ),
    "split-gated": (
        65,
        256,
        256,
        DenseConfig(tile_m=128, tile_n=128, split_k=2),
        {"gated": True},
    ),
    "pairs-along-m": (
        300,
        192,
        256,
        DenseConfig(tile_m=128, tile_n=128, stages=2, cluster="m"),
        {"dtype": FP16},
    ),
    "pairs-along-n": (
        200,
        320,
        256,
        DenseConfig(tile_m=64, tile_n=128, stages=2, wg_dimension="n", cluster="n", split_k=2),
        {"w_layout": "kn", "residual": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_without_races(name, capfd):
    m, n, k, config, extra = CASES[name]
    assert error(m, n, k, config, **extra) <= 4e-3
    assert not modes.unexplained_races(capfd.readouterr().out, LAST_TO_COME)


ONE_CHUNK = DenseConfig(tile_m=64, tile_n=128, wg_dimension="n", stages=3)
TWO_CHUNKS = DenseConfig(tile_m=64, tile_n=256, wg_dimension="n", stages=3, grid_tile_width=2)


@pytest.mark.parametrize(
    ("config", "residual"),
    [(TWO_CHUNKS, False), (TWO_CHUNKS, True), (ONE_CHUNK, False)],
    ids=["two-chunks", "two-chunks-residual", "one-chunk"],
)
def test_one_block_walks_many_tiles_without_races(config, residual, monkeypatch, capfd):
    monkeypatch.setattr("pallas_kernels.mosaic.sm_count", lambda: 2)
    assert error(200, 320, 256, config, residual=residual) <= 4e-3
    assert not modes.unexplained_races(capfd.readouterr().out, LAST_TO_COME)


def test_one_block_adds_up_all_parts(monkeypatch):
    monkeypatch.setattr("pallas_kernels.mosaic.sm_count", lambda: 1)
    assert error(140, 192, 320, DenseConfig(tile_m=128, tile_n=128, split_k=2), bias=True) <= 4e-3


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [65, 256, 8192])
def test_defaults_lower_for_real_shapes(m, n, k):
    gated = n in (22016, 28672)
    given = operands(m, n, k, bias=not gated, residual=True, gated=gated)
    modes.lower(functools.partial(_call, gated=gated), given)


@pytest.mark.parametrize("w_layout", ["nk", "kn"])
@pytest.mark.parametrize("m", [256, 4096])
def test_candidates_lower(m, w_layout):
    configs = candidates(m, 4096, 4096)
    assert 8 <= len(set(configs)) <= 16
    for config in configs[::4]:
        given = operands(m, 4096, 4096, w_layout=w_layout)
        modes.lower(functools.partial(_call, config=config, w_layout=w_layout), given)


@pytest.mark.parametrize("sms", [12, 66, 132])
def test_rule_fills_the_gpu_without_cutting_more_than_needed(sms):
    for n, k in SHAPES:
        for m in (65, 256, 1024, 16384):
            config = default(m, n, k, sms)
            tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
            assert config.cluster == ""
            assert config.split_k == 1 or tiles * config.split_k <= sms
            assert config == candidates(m, n, k, sms)[0]
            assert all(c.cluster == "" for c in candidates(m, n, k, sms, clusters=False))


@pytest.mark.parametrize(
    "fields",
    [
        {"tile_m": 96},
        {"tile_m": 64},
        {"tile_n": 192, "wg_dimension": "n"},
        {"tile_m": 256, "tile_n": 256},
        {"stages": 5},
        {"stages": 1},
        {"split_k": 0},
    ],
)
def test_config_refuses_what_cannot_run(fields):
    with pytest.raises(ValueError, match="DenseConfig"):
        DenseConfig(**fields)


@pytest.mark.parametrize(
    ("shapes", "static", "raised", "match"),
    [
        ({"x": (128, 64), "w": (64, 128)}, {}, ValueError, "K = 64"),
        ({"x": (128, 64), "w": (64, 64), "bias": (128,)}, {}, ValueError, "bias"),
        ({"x": (128, 64), "w": (64, 64), "residual": (64, 64)}, {}, ValueError, "residual"),
        ({"x": (128, 64), "w": (64, 64)}, {"w_layout": "mn"}, ValueError, "w_layout"),
        ({"x": (128, 96), "w": (64, 96)}, {}, NotImplementedError, "K must be"),
        ({"x": (0, 64), "w": (64, 64)}, {}, NotImplementedError, "M is 0: at least 1"),
        ({"x": (128, 64), "w": (96, 64)}, {}, NotImplementedError, "N of 64"),
        ({"x": (128, 64), "w": (64, 64)}, {"gated": True}, NotImplementedError, "gated: 128"),
        (
            {"x": (128, 64), "w": (64, 128)},
            {"gated": True, "w_layout": "kn"},
            NotImplementedError,
            "gated with w_layout 'kn'",
        ),
        (
            {"x": (128, 128), "w": (64, 128)},
            {"config": DenseConfig(split_k=2)},
            NotImplementedError,
            "split_k",
        ),
        (
            {"x": (128, 64), "w": (384, 64)},
            {"gated": True, "config": DenseConfig(tile_m=256, tile_n=192, stages=3)},
            NotImplementedError,
            "tile_n",
        ),
    ],
)
def test_bad_input_is_named(shapes, static, raised, match):
    given = {name: jnp.zeros(shape, BF16) for name, shape in shapes.items()}
    with pytest.raises(raised, match=match):
        dense_gemm(**given, **static)


def test_dtypes_are_checked():
    with pytest.raises(NotImplementedError, match="float32"):
        dense_gemm(jnp.zeros((128, 64)), jnp.zeros((64, 64)))
    with pytest.raises(ValueError, match="w is float16"):
        dense_gemm(jnp.zeros((128, 64), BF16), jnp.zeros((64, 64), FP16))
