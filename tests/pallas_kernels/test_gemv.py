"""GEMV: numbers and races, parts of rows that are cut unevenly, lowering of real shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gemv import MAX_NORMED_ROWS, MAX_ROWS, GemvConfig, candidates, default, gemv
from pallas_kernels.gemv.config import parts_of, suits
from pallas_kernels.products import reference
from tests.pallas_kernels import modes, test_flat_gemm
from tests.pallas_kernels.test_flat_gemm import draw

BF16, FP16 = jnp.bfloat16, jnp.float16
SHAPES = (  # outputs, inputs, gated: projections of 7B and 8B models, and logits
    (12288, 4096, False),
    (4096, 4096, False),
    (11008, 4096, True),
    (4096, 11008, False),
    (6144, 4096, False),
    (14336, 4096, True),
    (4096, 14336, False),
    (4608, 3584, False),
    (3584, 3584, False),
    (18944, 3584, True),
    (3584, 18944, False),
    (7168, 8192, True),
    (8192, 28672, False),
    (128256, 4096, False),
)


EPS = 1e-2


def operands(m, outputs, k, *, norm=False, **others):
    """Shapes of the arguments of one call, by name."""
    made = test_flat_gemm.operands(m, outputs, k, **others)
    return made | ({"norm": jax.ShapeDtypeStruct((k,), made["x"].dtype)} if norm else {})


def _call(given, **static):
    norm = (given["norm"], EPS) if "norm" in given else None
    return gemv(**(given | {"norm": norm}), **static)


def expected_of(given, gated):
    """In float32, nothing rounded between the norm and the product."""
    given = dict(given)
    if "norm" in given:
        x, weight = given["x"].astype(jnp.float32), given.pop("norm").astype(jnp.float32)
        root = jnp.sqrt((x * x).mean(-1, keepdims=True) + EPS)
        given["x"] = x / root * weight
    return reference(**given, gated=gated)


def sass_cases():
    """Name, function and arguments of what is compiled to sm_90a: no register may spill."""
    found = []
    for outputs, k, gated in SHAPES:
        for m in (1, 2, 4):
            for config in candidates(m, outputs, k, gated)[:: 2 if m == 4 else 3]:
                extra = {"gated": gated, "residual": not gated, "bias": k == 3584}
                call = functools.partial(_call, gated=gated, config=config)
                name = f"{m}x{outputs}x{k}-{config}"
                found.append((f"gemv-{name}", call, (operands(m, outputs, k, **extra),)))
                if m <= MAX_NORMED_ROWS:
                    given = operands(m, outputs, k, **extra, norm=True)
                    found.append((f"gemv-norm-{name}", call, (given,)))
    return found


ALL = {"bias": True, "residual": True}
CASES = {  # M, outputs, K, configuration, what else
    "one row": (1, 16, 2048, GemvConfig(2, 4, 4), {}),
    "two rows": (2, 16, 2048, GemvConfig(2, 4, 2), {"residual": True}),
    "three rows": (3, 8, 1024, GemvConfig(4, 4, 1), ALL),
    "four rows": (4, 16, 3072, GemvConfig(2, 2, 2, True), ALL),
    "a warp a row": (1, 16, 2048, GemvConfig(2, 1, 4), {"bias": True}),
    "two warps a row": (1, 16, 2048, GemvConfig(4, 2, 2), {"bias": True}),
    "in a loop": (1, 8, 256 * 20, GemvConfig(2, 1, 2), {"residual": True}),
    "in a loop, in order": (1, 8, 256 * 18, GemvConfig(1, 1, 4, True), {"residual": True}),
    "in a loop, parts left over": (2, 4, 256 * 19, GemvConfig(1, 1, 4, True), {}),
    "in a loop, ragged": (1, 8, 256 * 17 + 64, GemvConfig(2, 1, 2), {}),
    "in a loop, ragged, parts fit": (4, 4, 256 * 15 + 192, GemvConfig(1, 1, 4, True), ALL),
    "ragged": (1, 4, 1024 + 512, GemvConfig(2, 4, 4), {"residual": True}),
    "ragged, all but one part": (1, 4, 3 * 1024 + 64, GemvConfig(1, 4, 16), {}),
    "gated": (1, 16, 2048, GemvConfig(2, 4, 2), {"gated": True, **ALL}),
    "gated, two rows, ragged": (2, 8, 1152, GemvConfig(1, 2, 4), {"gated": True, "bias": True}),
    "gated, in a loop": (1, 4, 256 * 12, GemvConfig(1, 1, 2, True), {"gated": True}),
    "fp16": (1, 8, 1024, GemvConfig(2, 4, 4), {"dtype": FP16, **ALL}),
    "short rows": (1, 8, 192, GemvConfig(2, 1, 4), {"bias": True}),
    "shortest rows": (4, 8, 64, GemvConfig(1, 1, 2), ALL),
    "norm": (1, 16, 2048, GemvConfig(2, 4, 2), {"norm": True}),
    "norm, two rows, a warp a row": (2, 16, 2048, GemvConfig(2, 1, 4), {"norm": True, **ALL}),
    "norm, two warps a row": (2, 8, 3072, GemvConfig(1, 2, 2, True), {"norm": True, **ALL}),
    "norm, gated, ragged": (2, 8, 1152, GemvConfig(1, 2, 4), {"norm": True, "gated": True}),
    "norm, in a loop, ragged": (1, 8, 256 * 17 + 64, GemvConfig(2, 1, 2), {"norm": True}),
    "norm, fp16, short rows": (1, 8, 192, GemvConfig(2, 1, 4), {"norm": True, "dtype": FP16}),
    "odd outputs": (1, 7, 1024, GemvConfig(1, 4, 4), ALL),
    "the rule": (1, 12, 1536, None, ALL),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, capfd):
    m, outputs, k, config, extra = CASES[name]
    shapes = operands(m, outputs, k, **extra)
    given = draw(shapes, m + outputs + k)
    gated = extra.get("gated", False)
    call = functools.partial(_call, gated=gated, config=config)
    out = modes.run(call, given)
    expected = expected_of(given, gated)
    assert out.shape == expected.shape
    assert out.dtype == shapes["x"].dtype
    error = np.linalg.norm(out.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert error <= 4e-3
    assert not modes.unexplained_races(capfd.readouterr().out)


@pytest.mark.parametrize("k", [1024 + 64, 256 * 17 + 64])
def test_every_product_is_added_once(k):
    """Ones: the last part of a row begins before the end of the one before it."""
    given = {"x": jnp.ones((1, k), BF16), "w": jnp.ones((4, k), BF16)}
    out = gemv(**given, config=GemvConfig(1, 1, 4), interpret=modes.mode(races=False))
    assert out.astype(jnp.float32).tolist() == [[float(jnp.asarray(k, BF16))] * 4]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_lowers_for_hopper(shape):
    """By the rule; what the table has for one and two rows is lowered in `test_dataflow.py`."""
    outputs, k, gated = shape
    given = operands(MAX_ROWS, outputs, k, gated=gated, residual=not gated)
    text = modes.lower(functools.partial(_call, gated=gated), given)
    assert text.count("mosaic_gpu_v2") == 1


def test_weights_are_asked_for_before_the_kernel_ahead_is_complete():
    """So are all that a block holds at once; x waits."""
    config = GemvConfig(2, 4, 4)
    given = operands(1, 16, 4096)
    jaxpr = str(jax.make_jaxpr(functools.partial(_call, config=config))(given))
    before, after = jaxpr.split("griddepcontrol_wait")
    assert before.count("= load[") == config.depth
    assert "= load[" in after
    assert before.index("griddepcontrol_launch_dependents") < before.index("= load[")


def test_candidates_suit_the_shape():
    for outputs, k, gated in SHAPES:
        for m in range(1, MAX_ROWS + 1):
            found = candidates(m, outputs, k, gated)
            assert found[0] == default(m, outputs, k, gated)
            assert 4 <= len(found) <= 8
            assert len(set(found)) == len(found)
            assert all(suits(config, outputs, k) for config in found)
            # What no load follows needs no order.
            assert all(c.in_order for c in found if parts_of(c, k) > c.depth)
            assert not any(c.in_order for c in found if parts_of(c, k) == 1)


@pytest.mark.parametrize(("outputs", "k"), [(1, 1024), (7, 4096), (4, 64), (50257, 1024)])
def test_any_size_has_a_configuration(outputs, k):
    assert default(1, outputs, k) is not None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": jnp.zeros((5, 256), BF16)}, NotImplementedError, "M is from 1 to 4"),
        ({"x": jnp.zeros((0, 256), BF16)}, NotImplementedError, "M is 0: at least 1"),
        (
            {"x": jnp.zeros((1, 100), BF16), "w": jnp.zeros((64, 100), BF16)},
            NotImplementedError,
            "K a multiple of 64",
        ),
        ({"w": jnp.zeros((64, 64), BF16)}, ValueError, "K = 64"),
        ({"w": jnp.zeros((64, 256), FP16)}, ValueError, "w is float16"),
        ({"x": jnp.zeros((1, 256)), "w": jnp.zeros((64, 256))}, NotImplementedError, "float32"),
        ({"bias": jnp.zeros((65,), BF16)}, ValueError, "bias has shape"),
        ({"residual": jnp.zeros((1, 65), BF16)}, ValueError, "residual has shape"),
        ({"norm": (jnp.zeros((255,), BF16), 0.1)}, ValueError, r"norm: bfloat16\[255\], expected"),
        (
            {"x": jnp.zeros((3, 256), BF16), "norm": (jnp.zeros((256,), BF16), 0.1)},
            NotImplementedError,
            "M is 3, at most 2",
        ),
        ({"norm": (jnp.zeros((256,), FP16), 0.1)}, ValueError, "norm: float16"),
        ({"norm": (jnp.zeros((256,), BF16), -0.1)}, ValueError, "eps is -0.1"),
        ({"config": GemvConfig(48, 4)}, NotImplementedError, "must divide the 64 outputs"),
        (
            {"x": jnp.zeros((1, 64), BF16), "w": jnp.zeros((6, 64), BF16)},
            NotImplementedError,
            "must divide the 6 outputs",
        ),
    ],
)
def test_refuses(change, error, words):
    given = {"x": jnp.zeros((1, 256), BF16), "w": jnp.zeros((64, 256), BF16)}
    with pytest.raises(error, match=words):
        gemv(**(given | change))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"rows": 1.5}, "rows is 1.5"),
        ({"warps": 3}, "warps must be 1, 2 or 4"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": 3}, "power of two"),
    ],
)
def test_config_refuses_what_cannot_run(fields, words):
    with pytest.raises(ValueError, match=words):
        GemvConfig(**fields)
