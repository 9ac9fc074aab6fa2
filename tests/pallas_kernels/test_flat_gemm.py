"""Flat GEMM: numbers and races, the even cut of the work, lowering of real shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.flat_gemm import FlatConfig, candidates, default, flat_gemm, kernel
from pallas_kernels.flat_gemm.config import smem_bytes
from pallas_kernels.flat_gemm.schedule import Schedule
from pallas_kernels.products import reference
from pallas_kernels.workspace import counters, workspace
from tests.pallas_kernels import modes

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
    (18944, 3584, True),
    (3584, 18944, False),
    (128256, 4096, False),
)


def operands(m, outputs, k, *, dtype=BF16, gated=False, bias=False, residual=False, layout="nk"):
    """Shapes of the arguments of one call, by name."""
    n = outputs * (1 + gated)
    made = {"x": (m, k), "w": (n, k) if layout == "nk" else (k, n)}
    if bias:
        made["bias"] = (n,)
    if residual:
        made["residual"] = (m, outputs)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in made.items()}


def _call(given, **static):
    return flat_gemm(**given, **static)


def sass_cases():
    """Name, function and arguments of what is compiled to sm_90a: no register may spill."""
    found = []
    for outputs, k, gated in SHAPES:
        for m in (1, 16, 32, 64, 128):
            for config in candidates(m, outputs, gated)[:: 1 if m == 128 else 3]:
                given = operands(m, outputs, k, gated=gated, residual=not gated, bias=k == 3584)
                call = functools.partial(_call, gated=gated, config=config)
                found.append((f"flat_gemm-{m}x{outputs}x{k}-{config}", call, (given,)))
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


CASES = {  # M, outputs, K, SMs, configuration, what else
    "one row": (1, 128, 512, 5, FlatConfig(64, 128, 2), {}),
    "rows that TMA fills up": (5, 128, 512, 5, FlatConfig(64, 128, 3), {"residual": True}),
    "rows that are padded": (13, 64, 256, 3, FlatConfig(64, 64, 3), {"residual": True}),
    "tiles in two parts": (16, 192, 512, 9, FlatConfig(64, 128, 3, 2), {"residual": True}),
    "whole tiles": (8, 192, 256, 9, FlatConfig(64, 64, 4, 1), {"bias": True}),
    "many parts": (8, 64, 1024, 7, FlatConfig(64, 64, 3), {"bias": True}),
    "gated": (24, 128, 512, 5, FlatConfig(64, 128, 2), {"gated": True, "bias": True}),
    "wide tiles": (64, 256, 640, 7, FlatConfig(128, 64, 4), {}),
    "sums too large to load at once": (128, 64, 512, 4, FlatConfig(64, 64, 2), {}),
    "N-major": (8, 128, 512, 3, FlatConfig(64, 128, 2), {"layout": "kn"}),
    "fp16": (8, 128, 256, 5, FlatConfig(64, 64, 3), {"dtype": FP16, "residual": True}),
    "more SMs than steps": (8, 64, 128, 32, FlatConfig(64, 64, 2), {}),
    "tile_k that K is no multiple of": (8, 64, 320, 2, FlatConfig(64, 128, 3), {}),
    "two consumers": (16, 256, 512, 5, FlatConfig(128, 128, 3, None, 2), {"residual": True}),
    "two consumers, gated": (
        24,
        128,
        512,
        5,
        FlatConfig(128, 64, 3, None, 2),
        {"gated": True, "bias": True, "residual": True},
    ),
    "short ring of x": (13, 128, 1024, 3, FlatConfig(64, 64, 5, x_stages=2), {"residual": True}),
    "short ring of x, gated, two consumers": (
        24,
        128,
        1024,
        3,
        FlatConfig(128, 64, 4, None, 2, x_stages=3),
        {"gated": True},
    ),
    "two wide consumers": (64, 512, 640, 7, FlatConfig(256, 64, 4, None, 2), {}),
    "three consumers, ragged": (40, 320, 512, 4, FlatConfig(192, 64, 4, None, 3), {"bias": True}),
    "two waves": (8, 192, 512, 3, FlatConfig(64, 128, 3, None, 1, 2), {"residual": True}),
    "two consumers N-major": (8, 256, 512, 3, FlatConfig(128, 64, 3, None, 2), {"layout": "kn"}),
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
    expected = reference(**given, **static)
    assert out.shape == expected.shape
    assert out.dtype == shapes["x"].dtype
    error = np.linalg.norm(out.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert error <= 4e-3
    assert not left.any(), "counters must be left at zero"
    assert not modes.unexplained_races(capfd.readouterr().out, "share.<locals>", "(part_of)")


def _interpreted(given, config, **static):
    out = _call(given, config=config, interpret=modes.mode(races=False), **static)
    return np.asarray(out.astype(jnp.float32))


def _bits(given, monkeypatch, config, gated, *, order=None, blind=False):
    """The result of blocks that run in another order, or that never look for another's part."""
    with monkeypatch.context() as patch:
        patch.setattr(mosaic, "sm_count", lambda: 3)
        if order is not None:
            this = kernel._this_block
            patch.setattr(
                kernel,
                "_this_block",
                lambda: sum(jnp.where(this() == i, now, 0) for i, now in enumerate(order)),
            )
        looks = []

        def read(counter, place, *, interpret, really=mosaic.read_ticket):
            found = jnp.int32(0) if blind else really(counter, place, interpret=interpret)
            jax.debug.callback(lambda n: looks.append(int(n)), found)
            return found

        patch.setattr(mosaic, "read_ticket", read)
        jax.clear_caches()
        out = _call(given, gated=gated, config=config, interpret=modes.mode(races=False))
        jax.block_until_ready(out)
    jax.clear_caches()
    return np.asarray(out.astype(jnp.float32)), looks


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="blocks run in the order of the GPU")
@pytest.mark.parametrize(("m", "gated"), [(8, False), (24, True), (128, False)])
def test_a_part_that_is_there_gives_the_same_bits(m, gated, monkeypatch):
    """Looking for the other part of a tile saves time; who adds the parts up is all the same."""
    config = FlatConfig(64, 128, 3)
    given = draw(operands(m, 256, 2048, gated=gated, residual=True), 7)
    out, looks = _bits(given, monkeypatch, config, gated)
    assert looks == [1, 1], "every block that looks was to find the other part"
    blind, _ = _bits(given, monkeypatch, config, gated, blind=True)
    np.testing.assert_array_equal(out, blind)
    mixed, looks = _bits(given, monkeypatch, config, gated, order=[1, 0, 2])
    assert sorted(looks) == [0, 1], "both ways were to be taken"
    np.testing.assert_array_equal(out, mixed)
    expected = np.asarray(reference(**given, gated=gated))
    assert np.linalg.norm(out - expected) <= 4e-3 * np.linalg.norm(expected)


def test_a_block_looks_where_the_other_part_is_there():
    """If all blocks are equally fast: never in vain, and always where it can."""
    for tiles, steps, blocks in ((192, 32, 132), (96, 32, 132), (64, 86, 132), (5, 4, 7)):
        schedule, look, write = Schedule(tiles, steps, blocks), 3, 3
        done = {}  # when a block put down a part: (tile, block) -> steps of that block
        for block in range(schedule.blocks):
            mine = range(schedule.first(block), schedule.first(block + 1))
            for i, step in enumerate(reversed(mine)):
                done[step // steps, block] = i + 1
        seen = []
        for block in range(1, schedule.blocks):
            begin, end = schedule.first(block), schedule.first(block + 1)
            tile = begin // steps
            at = max(0, end - (tile + 1) * steps, end - begin - look)
            others = [b for t, b in done if t == tile and b != block]
            there = bool(others) and all(done[tile, b] + write <= at for b in others)
            assert schedule.sees(block, tile, at - write) == there
            seen.append(there)
        assert schedule.ever_sees(look, write) == any(seen)
        assert any(seen) == (tiles > blocks // 2 and steps == 32)


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
    for m in (1, 16, 32, 64, 128):
        given = operands(m, outputs, k, gated=gated, residual=not gated)
        call = functools.partial(_call, gated=gated)
        text = modes.lower(call, given)
        assert text.count("mosaic_gpu_v2") == 1


def test_candidates_fit_shared_memory():
    for outputs, _, gated in SHAPES:
        for m in (1, 16, 32, 64, 128):
            found = candidates(m, outputs, gated)
            assert found[0] == default(m, outputs, gated)
            assert len(set(found)) == len(found)
            assert all(smem_bytes(c, m, gated) <= mosaic.SMEM_BYTES for c in found)
            assert len(found) <= 8


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": jnp.zeros((129, 128), BF16)}, NotImplementedError, "M is at most 128"),
        ({"x": jnp.zeros((0, 128), BF16)}, NotImplementedError, "M is 0: at least 1"),
        ({"w": jnp.zeros((0, 128), BF16)}, NotImplementedError, "N is 0: at least 1"),
        (
            {"x": jnp.zeros((8, 0), BF16), "w": jnp.zeros((64, 0), BF16)},
            NotImplementedError,
            "K is 0: at least 1",
        ),
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
        (
            {
                "w": jnp.zeros((192, 128), BF16),
                "bias": jnp.zeros((192,), BF16),
                "config": FlatConfig(tile_n=128),
            },
            NotImplementedError,
            "must divide the 192 outputs",
        ),
    ],
)
def test_refuses(change, error, words):
    given = {"x": jnp.zeros((8, 128), BF16), "w": jnp.zeros((64, 128), BF16)}
    with pytest.raises(error, match=words):
        flat_gemm(**(given | change))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"waves": 0}, "waves is 0"),
        ({"split": 0}, "split is 0"),
        ({"split": -1}, "split is -1"),
        ({"split": 1.5}, "split is 1.5"),
        ({"consumers": 0}, "consumers is 0"),
        ({"tile_n": 0}, "tile_n is 0.* at least 64"),
        ({"tile_n": 64, "consumers": 2}, "tile_n is 64.* a multiple of 128"),
        ({"tile_k": 0}, "tile_k is 0.* at least 64"),
        ({"tile_k": 100}, "tile_k is 100.* a multiple of 64"),
        ({"stages": 1}, "stages is 1.* at least 2"),
        ({"x_stages": 1}, "x_stages is 1.* at least 2"),
    ],
)
def test_config_refuses_what_cannot_run(fields, words):
    with pytest.raises(ValueError, match=words):
        FlatConfig(**fields)
