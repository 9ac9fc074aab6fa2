"""Decode attention in interpret mode against the float32 reference, its plan, and its lowering."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import workspace
from pallas_kernels.decode_attention import DecodeConfig, decode_attention, reference
from pallas_kernels.decode_attention.config import TILE
from pallas_kernels.decode_attention.plan import Segment, make_plan, walk
from pallas_kernels.decode_attention.shapes import sass_cases
from tests.pallas_kernels import modes

TOLERANCE = 4e-3
BF16, FP16 = jnp.bfloat16, jnp.float16


def make(lengths, heads, kv_heads, size, page, dtype, seed=0):
    """Random inputs; page ids are shuffled, and pages that no row owns hold NaN."""
    random = np.random.default_rng(seed)
    batch = len(lengths)
    width = max(1, -(-max(lengths) // page)) + 1  # the last entry is never a row's
    number = batch * width + 2
    pages = random.permutation(number)
    table = pages[: batch * width].reshape(batch, width).astype(np.int32)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    q = normal(batch, heads, size)
    k, v = normal(number, page, kv_heads, size), normal(number, page, kv_heads, size)
    used = np.zeros(number, bool)
    for row, length in enumerate(lengths):
        used[table[row, : -(-length // page)]] = True
    finite = [jnp.asarray(array, dtype) for array in (q, k, v)]
    k[~used] = v[~used] = np.nan
    poisoned = [jnp.asarray(array, dtype) for array in (q, k, v)]
    rest = [jnp.asarray(table), jnp.asarray(lengths, jnp.int32)]
    return [*poisoned, *rest], [*finite, *rest]


def run(args, config, **options):
    """(result, counters after) in interpret mode with race detection."""

    early = options.pop("early", False)

    def call(*args, interpret):
        with workspace.workspace():
            attend = functools.partial(
                decode_attention, config=config, interpret=interpret, **options
            )
            if early and interpret is None:  # a program's first attention must not be early
                first = attend(*args).out
                args = [jax.lax.optimization_barrier((args[0], first))[0], *args[1:]]
            result = attend(*args, early=early)
            return result, workspace._CURRENT.get()[...]

    return modes.run(call, *args)


def relative(value, expected):
    value, expected = np.asarray(value, np.float32), np.asarray(expected, np.float32)
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def check_races(text):
    """No race but where blocks meet: interpret mode has plain code in the place of the atomics.

    These are the counters, and the partial results that the counters order.
    """
    meeting = {"take_ticket", "store", "Body.merge.<locals>.load", "Body.share.<locals>.last"}
    for report in text.split("RACE DETECTED")[1:]:
        spaces = re.findall(r"memory_space_id=(\d+)", report)
        functions = re.findall(r"\(([\w.<>]+)\)\s*$", report, flags=re.M)
        assert functions, report
        assert set(spaces) == {"0"}, report  # GMEM
        assert set(functions) <= meeting, report


def check(capfd, lengths, heads, kv_heads, size, page, blocks, dtype=BF16, **options):
    """One case; returns which rows and kv heads were recomputed."""
    change = options.pop("change", lambda q: q)
    buffers, min_tiles = options.pop("buffers", 4), options.pop("min_tiles", 2)
    args, finite = make(lengths, heads, kv_heads, size, page, dtype)
    args[0] = finite[0] = change(args[0])
    config = DecodeConfig(blocks=blocks, buffers=buffers, merge=2, min_tiles=min_tiles)
    result, counters = run(args, config, **options)
    options = {name: options[name] for name in ("window", "soft_cap", "scale") if name in options}
    out, lse = reference(*finite, **options)
    check_races(capfd.readouterr().out)
    assert result.out.dtype == dtype
    for row, length in enumerate(lengths):
        if length:
            assert relative(result.out[row], out[row]) <= TOLERANCE, row
        else:
            assert not np.asarray(result.out[row]).any(), row
    if result.lse is not None:
        np.testing.assert_allclose(result.lse, lse, rtol=1e-5, atol=1e-3)
    assert not np.asarray(counters).any()
    return np.asarray(result.recomputed)


CASES = {
    "group of 1, D=64": {
        "lengths": [5, 70],
        "heads": 2,
        "kv_heads": 2,
        "size": 64,
        "page": 16,
        "blocks": 1,
        "return_lse": True,
    },
    "group of 4, three blocks, padded row": {
        "lengths": [1, 0, 200],
        "heads": 4,
        "kv_heads": 1,
        "size": 128,
        "page": 16,
        "blocks": 3,
        "return_lse": True,
    },
    "group of 5, window": {
        "lengths": [130, 64, 300],
        "heads": 10,
        "kv_heads": 2,
        "size": 128,
        "page": 32,
        "blocks": 2,
        "window": 70,
    },
    "group of 7, soft cap": {
        "lengths": [65, 129],
        "heads": 7,
        "kv_heads": 1,
        "size": 64,
        "page": 64,
        "blocks": 1,
        "soft_cap": 2.0,
    },
    "group of 8, D=96": {
        "lengths": [100, 33],
        "heads": 8,
        "kv_heads": 1,
        "size": 96,
        "page": 16,
        "blocks": 1,
        "return_lse": True,
    },
    "group of 3, D=96": {
        "lengths": [70],
        "heads": 6,
        "kv_heads": 2,
        "size": 96,
        "page": 64,
        "blocks": 1,
    },
    "group of 16, D=256": {
        "lengths": [140],
        "heads": 16,
        "kv_heads": 1,
        "size": 256,
        "page": 32,
        "blocks": 2,
        "buffers": 3,
    },
    "a row in seven parts, early": {
        "lengths": [30, 445],
        "heads": 4,
        "kv_heads": 1,
        "size": 64,
        "page": 16,
        "blocks": 8,
        "min_tiles": 1,
        "early": True,
        "return_lse": True,
    },
    "several rows a block, some in parts, early": {
        "lengths": [64, 0, 320, 1, 65, 128],
        "heads": 4,
        "kv_heads": 2,
        "size": 64,
        "page": 32,
        "blocks": 2,
        "buffers": 3,
        "early": True,
    },
    "window, early": {
        "lengths": [130, 64, 300],
        "heads": 4,
        "kv_heads": 1,
        "size": 64,
        "page": 64,
        "blocks": 2,
        "window": 70,
        "early": True,
    },
    "fp16": {
        "lengths": [90, 300],
        "heads": 4,
        "kv_heads": 1,
        "size": 64,
        "page": 16,
        "blocks": 2,
        "dtype": FP16,
    },
    "sync": {
        "lengths": [200, 0, 30],
        "heads": 4,
        "kv_heads": 1,
        "size": 64,
        "page": 16,
        "blocks": 2,
        "softmax": "sync",
        "early": True,
        "return_lse": True,
    },
    "lazy, fp16": {
        "lengths": [200, 30],
        "heads": 4,
        "kv_heads": 1,
        "size": 64,
        "page": 16,
        "blocks": 1,
        "softmax": "lazy",
        "dtype": FP16,
        "change": lambda q: q * 10,
    },
    "phi by head": {
        "lengths": [80],
        "heads": 6,
        "kv_heads": 2,
        "size": 64,
        "page": 16,
        "blocks": 1,
        "phi": np.linspace(-3, 9, 6, dtype=np.float32),
        "return_lse": True,
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case, capfd):
    assert not check(capfd, **case).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets what the guard is for
def test_overflowing_rows_are_recomputed(capfd):
    def change(q):
        return q.at[1].multiply(500).at[3, 2].multiply(500)

    lengths = [70, 200, 30, 64]
    bad = check(capfd, lengths, 4, 1, 64, 16, blocks=2, change=change, return_lse=True)
    assert bad[:, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets what the guard is for
def test_rows_whose_denominator_is_lost_are_recomputed(capfd):
    phi = np.array([0, 0, 0, 90], np.float32)  # the last head of the second kv head
    bad = check(capfd, [70, 30], 4, 2, 64, 16, blocks=1, phi=phi, return_lse=True)
    assert bad.tolist() == [[0, 1], [0, 1]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets what the guard is for
@pytest.mark.parametrize("phi", [-9.0, 12.0], ids=["overflow", "coarse"])
def test_fp16_guard(phi, capfd):
    bad = check(capfd, [70], 4, 1, 64, 16, blocks=1, phi=phi, dtype=FP16)
    assert bad.tolist() == [[1]]


@pytest.mark.parametrize(
    ("blocks", "window", "min_tiles"), [(1, None, 1), (5, None, 1), (9, 100, 1), (7, None, 3)]
)
def test_blocks_share_the_tiles(blocks, window, min_tiles):
    random = np.random.default_rng(blocks)
    for _ in range(12):
        lengths = random.integers(0, random.choice([2, 70, 700]), 6).astype(np.int32)
        segments = all_segments(jnp.asarray(lengths), blocks, window, min_tiles)
        by_row = {row: [item for item in segments if item[1].row == row] for row in range(6)}
        for row, items in by_row.items():
            length = int(lengths[row])
            first = 0 if window is None else max(length - window, 0) // TILE
            tiles = [tile for _, part in items for tile in range(part.begin, part.end)]
            assert tiles == (list(range(first, -(-length // TILE))) if length else [])
            owners = [block for block, _ in items]
            for block, part in items:
                assert owners == list(range(part.first_block, part.last_block + 1))
                assert bool(part.whole) == (len(owners) == 1)
                assert bool(part.continues) == (block > part.first_block)
        if lengths.all():
            work = [0] * blocks
            for block, part in segments:
                work[block] += part.end - part.begin
            assert max(work) - min([tiles for tiles in work if tiles]) <= 1


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _segments(lengths, blocks, window, min_tiles):
    plan = make_plan(lengths, window, blocks, min_tiles)

    def one(block):
        def visit(segment, state):
            number, log = state
            return number + 1, log.at[number].set(jnp.stack([jnp.int32(x) for x in segment]))

        return walk(
            visit,
            (jnp.int32(0), jnp.zeros((6, len(Segment._fields)), jnp.int32)),
            block=block,
            blocks=blocks,
            lengths=lengths,
            ends=plan.ends,
            starts=plan.starts,
            window=window,
            min_tiles=min_tiles,
        )

    return jax.lax.map(one, jnp.arange(blocks, dtype=jnp.int32))


def all_segments(lengths, *static):
    """(block, segment) of every block, in the order of blocks."""
    numbers, logs = _segments(lengths, *static)
    return [
        (block, Segment(*map(int, entry)))
        for block, (number, log) in enumerate(zip(numbers, np.asarray(logs), strict=True))
        for entry in log[: int(number)]
    ]


LOWERED = sass_cases()


@pytest.mark.parametrize(
    ("function", "shapes"), [case[1:] for case in LOWERED], ids=[case[0] for case in LOWERED]
)
def test_lowers_for_hopper(function, shapes):
    modes.lower(function, *shapes)


def test_layers_share_one_launch_function():
    name, function, shapes = LOWERED[0]

    def two(*args):
        return function(*args), function(*args)

    text = modes.lower(two, *shapes)
    assert text.count("custom_call @mosaic_gpu") == 1, name


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"heads": 17}, NotImplementedError, "17"),
        ({"size": 80}, NotImplementedError, "80"),
        ({"page": 8}, NotImplementedError, "page size 8"),
        ({"dtype": jnp.float32}, NotImplementedError, "float32"),
    ],
)
def test_refuses(change, error, match):
    shape = {
        "lengths": [3],
        "heads": 1,
        "kv_heads": 1,
        "size": 64,
        "page": 16,
        "dtype": BF16,
    } | change
    args, _ = make(**shape)
    with pytest.raises(error, match=match):
        decode_attention(*args)


def test_refuses_what_does_not_fit_together():
    args, _ = make([3, 4], 3, 1, 64, 16, BF16)
    with pytest.raises(ValueError, match="2 rows"):
        decode_attention(*args[:4], args[4][:1])
    with pytest.raises(ValueError, match="maximal"):
        decode_attention(*args, softmax="maximal")
    with pytest.raises(ValueError, match="phi"):
        decode_attention(*args, phi=jnp.zeros(2))
    for option, value in (
        ("scale", 0),
        ("scale", float("nan")),
        ("soft_cap", float("inf")),
        ("soft_cap", -1),
        ("window", 0),
        ("window", 2.5),
    ):
        with pytest.raises(ValueError, match=f"{option} is {value}, expected"):
            decode_attention(*args, **{option: value})
    with pytest.raises(ValueError, match="buffers is 1"):
        DecodeConfig(buffers=1)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "words"),
    [(0, 4, 2, "0 rows; supported are 1 to"), (1, 0, 2, "Hq is 0"), (1, 4, 0, "Hkv is 0")],
)
def test_refuses_empty_axes(batch, heads, kv_heads, words):
    pages = jnp.zeros((3, 16, kv_heads, 64), BF16)
    table, lengths = jnp.zeros((batch, 2), jnp.int32), jnp.zeros(batch, jnp.int32)
    with pytest.raises(NotImplementedError, match=words):
        decode_attention(jnp.zeros((batch, heads, 64), BF16), pages, pages, table, lengths)
