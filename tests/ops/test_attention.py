"""The XLA implementations of paged attention and of the KV store, against float64 NumPy.

Pages that a row does not own hold large values: one read too many is seen at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpd import ops
from jpd.ops import attention
from jpd.ops.rope import write_kv

POISON = 1e4
TOLERANCE = 2e-6
"""Relative error of a float32 result, by norm: sums of at most 300 terms."""


@dataclass
class Case:
    """Paged KV of sequences with random contents, and poison everywhere else."""

    heads: int
    kv_heads: int
    size: int
    page_size: int
    lengths: list[int]
    dtype: str = "float32"
    spare_entries: int = 2
    """Page table entries past the longest sequence."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(len(self.lengths) * 1000 + self.heads * 10 + self.size)
        width = max(-(-n // self.page_size) for n in self.lengths) + self.spare_entries
        owned = [-(-n // self.page_size) for n in self.lengths]
        pages = rng.permutation(np.arange(1, sum(owned) + 4))
        self.table = rng.choice(pages[-3:], (len(self.lengths), width)).astype(np.int32)
        shape = (len(pages) + 1, self.page_size, self.kv_heads, self.size)
        self.k = np.full(shape, POISON)
        self.v = np.full(shape, -POISON)
        self.keys, self.values = [], []
        for row, (length, count) in enumerate(zip(self.lengths, owned, strict=True)):
            first = sum(owned[:row])
            self.table[row, :count] = pages[first : first + count]
            k, v = (self._rounded(rng.normal(size=(length, *shape[2:]))) for _ in range(2))
            for at in range(length):
                page, offset = self.table[row, at // self.page_size], at % self.page_size
                self.k[page, offset], self.v[page, offset] = k[at], v[at]
            self.keys.append(k)
            self.values.append(v)
        self.rng = rng

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(values, self.dtype), np.float64)

    def queries(self, count: int) -> np.ndarray:
        return self._rounded(self.rng.normal(size=(count, self.heads, self.size)))

    def pages(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.k, self.dtype), jnp.asarray(self.v, self.dtype)

    def attend(
        self, q: np.ndarray, row: int, position: int, scale: float, window: int | None
    ) -> np.ndarray:
        """What the token at `position` of a sequence sees, `[Hq, D]` for q `[Hq, D]`."""
        start = 0 if window is None else max(0, position + 1 - window)
        out = np.zeros_like(q)
        for head in range(self.heads):
            kv_head = head // (self.heads // self.kv_heads)
            keys = self.keys[row][start : position + 1, kv_head]
            scores = keys @ q[head] * scale
            weights = np.exp(scores - scores.max())
            out[head] = weights @ self.values[row][start : position + 1, kv_head] / weights.sum()
        return out


def assert_close(got: jax.Array, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    error = np.linalg.norm(got - want, axis=-1) / np.maximum(np.linalg.norm(want, axis=-1), 1e-30)
    assert error.max() <= tolerance, (
        f"{error.max()} at {np.unravel_index(error.argmax(), error.shape)}"
    )


def check_decode(case: Case, window: int | None = None, tolerance: float = TOLERANCE) -> None:
    """One new token a sequence; two padded rows, one of them in the middle."""
    scale = case.size**-0.5
    rows = [*range(len(case.lengths)), None]
    rows.insert(1, None)
    q = case.queries(len(rows))
    table = np.array([case.table[r or 0] for r in rows])
    lengths = np.array([0 if r is None else case.lengths[r] for r in rows], np.int32)
    got = jax.jit(
        lambda q, k, v: (
            ops.decode_attention(
                q,
                k,
                v,
                table,
                jnp.asarray(lengths),
                scale=scale,
                window=window,
                implementation="xla",
            ).out
        )
    )(jnp.asarray(q, case.dtype), *case.pages())
    assert got.dtype == case.dtype
    want = np.stack(
        [
            np.zeros(q.shape[1:])
            if r is None
            else case.attend(q[i], r, case.lengths[r] - 1, scale, window)
            for i, r in enumerate(rows)
        ]
    )
    assert_close(got, want, tolerance)


def check_prefill(
    case: Case,
    counts: list[int],
    *,
    gap: int = 0,
    padding: int = 0,
    window: int | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """The last `counts[n]` tokens of each sequence, then `padding` tokens and an unused chunk.

    `gap`: tokens of nobody before each chunk.
    """
    scale = case.size**-0.5
    starts = np.cumsum([gap, *(c + gap for c in counts)]).astype(np.int32)
    total = int(starts[-1]) - gap + padding
    q = case.queries(total)
    want = np.zeros(q.shape)
    for row, count in enumerate(counts):
        for i in range(count):
            position = case.lengths[row] - count + i
            at = starts[row] + i
            want[at] = case.attend(q[at], row, position, scale, window)
    table = np.concatenate([case.table, np.zeros_like(case.table[:1])])
    got = jax.jit(
        lambda q, k, v: ops.prefill_attention(
            q,
            k,
            v,
            jnp.asarray(table),
            jnp.asarray(np.minimum(starts, total)),
            jnp.asarray(np.array([*counts, 0], np.int32)),
            jnp.asarray(np.array([*case.lengths, 0], np.int32)),
            scale=scale,
            window=window,
            implementation="xla",
        )
    )(jnp.asarray(q, case.dtype), *case.pages())
    assert got.dtype == case.dtype
    assert_close(got, want, tolerance)


HEADS = pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [(group * kv, kv) for group, kv in [(1, 4), (2, 2), (3, 1), (4, 2), (5, 1), (7, 2), (8, 1)]],
)


@HEADS
def test_decode_for_every_group_of_heads(heads: int, kv_heads: int) -> None:
    check_decode(Case(heads, kv_heads, 64, 8, [1, 8, 9, 37]))


@HEADS
def test_prefill_for_every_group_of_heads(heads: int, kv_heads: int) -> None:
    check_prefill(Case(heads, kv_heads, 64, 8, [5, 20, 33]), [5, 9, 1], padding=3)


@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
def test_head_sizes(size: int) -> None:
    case = Case(4, 2, size, 16, [17, 3])
    check_decode(case)
    check_prefill(case, [9, 3])


@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
def test_page_sizes_and_ragged_lengths(page_size: int) -> None:
    case = Case(4, 2, 32, page_size, [1, 2, 15, 16, 17, 63, 64, 65])
    check_decode(case)
    check_prefill(case, [1, 2, 15, 8, 1, 31, 64, 32], padding=5)


@pytest.mark.parametrize("window", [1, 2, 7, 16, 40, 1000])
def test_a_window_limits_how_far_back_is_seen(window: int) -> None:
    case = Case(4, 2, 32, 8, [5, 16, 40, 41])
    check_decode(case, window=window)
    check_prefill(case, [5, 10, 40, 3], window=window)


@pytest.mark.parametrize("counts", [[64], [65], [63, 1], [1, 63], [64, 64], [130, 2, 70], [1] * 5])
def test_chunks_at_the_edges_of_tiles(counts: list[int]) -> None:
    lengths = [count + 11 * i for i, count in enumerate(counts)]
    case = Case(2, 1, 16, 8, lengths)
    check_prefill(case, counts)
    check_prefill(case, counts, gap=3, padding=61)


@pytest.mark.parametrize("block_bytes", [1, 2_000, 20_000])
@pytest.mark.parametrize("window", [None, 9])
def test_blocks_of_pages_give_what_one_gives(
    block_bytes: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[int] = []
    scan = jax.lax.scan
    monkeypatch.setattr(
        attention.jax.lax,
        "scan",
        lambda f, init, xs: blocks.append(len(xs[1])) or scan(f, init, xs),
    )
    monkeypatch.setattr(attention, "BLOCK_BYTES", block_bytes)
    case = Case(4, 2, 16, 4, [1, 4, 30, 61], spare_entries=3)
    check_decode(case, window=window)
    check_prefill(case, [1, 2, 30, 17], window=window)
    assert len(blocks) == 2
    assert min(blocks) > 1
    assert block_bytes > 1 or blocks == [19, 19], "one page a block, and three of padding"


def test_scores_far_apart_do_not_overflow() -> None:
    case = Case(2, 1, 16, 4, [30])
    case.keys = [k * 300 for k in case.keys]
    for at in range(30):
        case.k[case.table[0, at // 4], at % 4] = case.keys[0][at]
    check_decode(case)
    check_prefill(case, [30])


def test_bfloat16_accumulates_in_float32() -> None:
    case = Case(8, 2, 64, 16, [300, 17], dtype="bfloat16")
    # Weights and output are rounded to 8 bits; a bfloat16 sum of 300 terms would be far worse.
    check_decode(case, tolerance=6e-3)
    check_prefill(case, [20, 17], tolerance=6e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write_kv_stores_rows_at_their_slots_and_touches_nothing_else(dtype: str) -> None:
    rng = np.random.default_rng(0)
    k_pages, v_pages = (jnp.asarray(rng.normal(size=(6, 4, 2, 8)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(5, 2, 8)), "float32") for _ in range(2))
    slots = np.array([4, 23, 9, 17, 10], np.int32)
    for before, rows, after in zip(
        (k_pages, v_pages),
        (k, v),
        write_kv(k_pages, v_pages, k, v, slots),
        strict=True,
    ):
        want = np.array(before).reshape(24, 2, 8)
        want[slots] = np.asarray(rows.astype(dtype))
        assert after.dtype == dtype
        np.testing.assert_array_equal(np.asarray(after).reshape(24, 2, 8), want)
