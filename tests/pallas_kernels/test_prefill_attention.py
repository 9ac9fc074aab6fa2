"""Prefill attention over pages: numerics and races interpreted on a CPU, lowering for Hopper."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.prefill_attention import Config, candidates, default, prefill_attention
from pallas_kernels.prefill_attention.reference import reference
from pallas_kernels.prefill_attention.shapes import MODELS, arguments
from pallas_kernels.prefill_attention.tiles import tile_map, tile_slots
from tests.pallas_kernels import modes

SMALL = Config(keys=64)
REUSE = Config(keys=64, separate_output=False)


def inputs(counts, contexts, heads, kv_heads, size, page_size, *, padding=0, dtype=jnp.bfloat16):
    """Random chunks of `counts` tokens at the end of `contexts`, on shuffled pages.

    What is in the pages past a sequence's end is large, so that it shows where it is seen.
    """
    rng = np.random.default_rng(sum(contexts) + size)
    needed = [-(-c // page_size) for c in contexts]
    ids = rng.permutation(sum(needed)) + 1
    table = np.zeros((len(counts), max(needed) + 1), np.int32)
    pages = rng.standard_normal((2, sum(needed) + 1, page_size, kv_heads, size), np.float32)
    pages[:, 0] = 100
    taken = 0
    for n, (number, context) in enumerate(zip(needed, contexts, strict=True)):
        table[n, :number] = ids[taken : taken + number]
        taken += number
        if context % page_size:
            pages[:, table[n, number - 1], context % page_size :] = 100
    q = 2 * rng.standard_normal((sum(counts) + padding, heads, size), np.float32)
    starts = np.cumsum([0, *counts[:-1]])
    integers = (jnp.asarray(x, jnp.int32) for x in (table, starts, counts, contexts))
    return (jnp.asarray(q, dtype), *jnp.asarray(pages, dtype), *integers)


CASES = {
    "ragged, unused slots, padding": (
        ([70, 0, 3, 130], [70, 0, 205, 200], 2, 1, 64, 16),
        {"padding": 29},
        {"config": SMALL},
    ),
    "long prefix, keys of 128": (([40], [560], 1, 1, 128, 32), {}, {}),
    "group of 4, float16, outputs through the queries' memory": (
        ([9, 80], [300, 90], 4, 1, 64, 64),
        {"dtype": jnp.float16},
        {"config": REUSE},
    ),
    "group of 7, a block a tile": (
        ([21, 13], [21, 150], 7, 1, 64, 16),
        {},
        {"config": Config(keys=64, persistent=False)},
    ),
    "window": (([150], [470], 2, 2, 64, 32), {"padding": 3}, {"config": SMALL, "window": 100}),
    "window in one tile": (([20, 30], [20, 150], 1, 1, 96, 16), {}, {"window": 7}),
    "soft cap and scale": (
        ([66], [140], 1, 1, 128, 16),
        {},
        {"config": SMALL, "soft_cap": 3.0, "scale": 0.3},
    ),
    "head size 256": (([30], [100], 2, 1, 256, 32), {"padding": 2}, {}),
    "heads in two parts, three stages": (
        ([200], [230], 2, 1, 64, 16),
        {},
        {"config": Config(keys=64, stages=3, heads_together=1)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, monkeypatch, capfd):
    """Interpreted, with few blocks, so that each works on several tiles; no races."""
    monkeypatch.setattr(mosaic, "sm_count", lambda: 3)
    shape, making, options = CASES[name]
    args = inputs(*shape, **making)
    out = modes.run(partial(prefill_attention, **options), *args)
    options = {k: v for k, v in options.items() if k != "config"}
    expected = reference(*args, **options)
    assert out.dtype == args[0].dtype
    out = out.astype(jnp.float32)
    error = jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)
    assert error <= 4e-3
    assert not out[sum(shape[0]) :].any()
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("seed", range(6))
def test_tiles_cover_every_token_once(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 300, rng.integers(1, 9)) * (rng.random() < 0.9)
    prefixes = rng.integers(0, 500, len(counts))
    tokens = int(counts.sum()) + int(rng.integers(0, 200))
    tokens += -tokens % 8 + 8
    starts = np.cumsum([0, *counts[:-1]])
    rows = int(rng.choice([64, 128, 192]))
    window = int(rng.integers(1, 400)) if seed % 2 else None
    tiles = tile_map(
        jnp.asarray(starts),
        jnp.asarray(counts),
        jnp.asarray(prefixes + counts),
        tokens=tokens,
        rows=rows,
        window=window,
    )
    tiles, number = np.asarray(tiles)[:-1], tiles[-1, 0]
    assert len(tiles) == tile_slots(tokens, len(counts), rows)
    assert (tiles[:, 2] < tiles[:, 3]).tolist() == [i < number for i in range(len(tiles))]
    owners = np.full(tokens, -1)
    positions = np.full(tokens, -1)
    for n, (start, count) in enumerate(zip(starts, counts, strict=True)):
        owners[start : start + count] = n
        positions[start : start + count] = prefixes[n] + np.arange(count)
    times = np.zeros(tokens, int)
    costs = []
    for sequence, row, first, last, position in tiles.tolist():
        assert row % 8 == 0
        assert 0 <= first <= last <= rows
        for i in range(first, last):
            times[row + i] += 1
            if owners[row + i] < 0:
                assert position + last == 0  # sees no keys
            else:
                assert (owners[row + i], positions[row + i]) == (sequence, position + i)
        costs.append(min(position + last, window + rows if window else 1 << 30))
    assert (times == 1).all()
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("model", MODELS)
def test_lowers_for_hopper(model):
    heads, kv_heads, size, options = MODELS[model]
    for tokens, page_size in ((8192, 16), (40, 64)):
        args = arguments(tokens, heads, kv_heads, size, page_size=page_size)
        modes.lower(partial(prefill_attention, **options), *args)


@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_candidates_lower_for_hopper(size):
    configs = candidates(size, 16, 8)
    assert configs[0] == default(size)
    for config in configs[1::6]:
        args = arguments(1024, 8, 2, size, dtype=jnp.float16, context=1024)
        modes.lower(partial(prefill_attention, config=config), *args)


def test_layers_share_the_tile_map():
    """Compiled, two layers' maps are one: the ranking's comparison occurs as often as for one."""
    args = [jnp.zeros(x.shape, x.dtype) for x in arguments(256, 1, 1, 64, context=64)[4:]]

    def maps(layers):
        def f(starts, counts, contexts):
            found = [
                tile_map(starts + 0, counts, contexts, tokens=256, rows=128) for _ in range(layers)
            ]
            return [x * (i + 3) for i, x in enumerate(found)]

        return jax.jit(f).lower(*args).compile().as_text().count("compare")

    assert maps(2) == maps(1) > 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dtype": jnp.float32}, NotImplementedError, "float32"),
        ({"size": 80}, NotImplementedError, "80"),
        ({"page_size": 8}, NotImplementedError, "page size 8"),
        ({"kv_heads": 3}, ValueError, "multiple of 3"),
        ({"kv_heads": 0}, NotImplementedError, "Hkv is 0: at least 1"),
        ({"heads": 0}, NotImplementedError, "Hq is 0: at least 1"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"window": 2.5}, ValueError, "window is 2.5, expected a whole number"),
        ({"scale": -1.0}, ValueError, "scale is -1.0"),
        ({"soft_cap": float("inf")}, ValueError, "soft_cap is inf"),
        ({"config": Config(stages=9)}, NotImplementedError, "stages=9"),
    ],
)
def test_refuses(change, error, words):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": jnp.bfloat16, "page_size": 16}
    shape |= {"head_dim" if k == "size" else k: v for k, v in change.items()}
    options = {k: shape.pop(k) for k in ("window", "scale", "soft_cap", "config") if k in shape}
    args = arguments(64, shape.pop("heads"), shape.pop("kv_heads"), shape.pop("head_dim"), **shape)
    with pytest.raises(error, match=words):
        jax.eval_shape(lambda *args: prefill_attention(*args, **options), *args)


def test_refuses_numbers_of_another_length():
    args = list(arguments(64, 4, 2, 128))
    args[5] = jax.ShapeDtypeStruct((3,), jnp.int32)
    with pytest.raises(ValueError, match="counts"):
        jax.eval_shape(prefill_attention, *args)


@pytest.mark.parametrize("index", [3, 4, 5, 6])
def test_refuses_numbers_that_are_not_int32(index):
    args = list(arguments(64, 4, 2, 128))
    args[index] = jax.ShapeDtypeStruct(args[index].shape, jnp.float32)
    with pytest.raises(ValueError, match="float32, expected int32"):
        jax.eval_shape(prefill_attention, *args)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"warpgroups": 4}, "warpgroups is 4, expected one of 1, 2, 3"),
        ({"stages": 1}, "stages is 1.* at least 2"),
        ({"keys": 0}, "keys is 0.* at least 64"),
        ({"keys": 96}, "keys is 96.* a multiple of 64"),
        ({"heads_together": 0}, "heads_together is 0"),
    ],
)
def test_config_refuses_what_cannot_run(fields, words):
    with pytest.raises(ValueError, match=words):
        Config(**fields)
