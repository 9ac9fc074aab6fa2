"""The shapes that steps are padded to, and the packed array that carries a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpd.engine import batch as batches
from jpd.engine.plan import Chunk, StepPlan
from jpd.engine.sequence import Sequence
from jpd.engine.shapes import ShapeTable, StepShape, powers
from jpd.types import SamplingParams


def table(**changes) -> ShapeTable:
    sizes = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_model_len": 4_096,
        "page_size": 16,
    }
    return ShapeTable(**(sizes | changes))


def test_powers_end_with_the_highest_itself() -> None:
    assert powers(1, 16, 2) == (1, 2, 4, 8, 16)
    assert powers(1, 6, 2) == (1, 2, 4, 6)
    assert powers(512, 4_096, 4) == (512, 2_048, 4_096)
    assert powers(7, 7, 4) == (7,)


@given(
    seqs=st.integers(1, 300),
    extra=st.integers(0, 600),
    longest=st.integers(1, 5_000),
    page_size=st.sampled_from([1, 8, 16, 64]),
    rows=st.floats(0, 1),
    tokens=st.floats(0, 1),
    context=st.floats(0, 1),
    greedy=st.booleans(),
    sampled=st.booleans(),
    smaller=st.none() | st.floats(0, 1),
)
def test_every_step_within_the_limits_has_a_shape_that_was_compiled_and_holds_it(
    seqs: int,
    extra: int,
    longest: int,
    page_size: int,
    rows: float,
    tokens: float,
    context: float,
    greedy: bool,
    sampled: bool,
    smaller: float | None,
) -> None:
    mixed = seqs + extra if smaller is None else seqs + round(smaller * extra)
    shapes = table(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + extra,
        max_num_mixed_tokens=None if smaller is None else mixed,
        max_model_len=longest,
        page_size=page_size,
        sampled=sampled,
    )
    step_rows = round(rows * seqs)
    step_tokens = round(tokens * shapes.most_tokens(step_rows)) or int(step_rows == 0)
    assert step_rows + step_tokens <= (mixed if step_rows else seqs + extra)
    step_context = max(1, round(context * longest))
    shape = shapes.pick(step_rows, step_tokens, step_context, greedy)
    assert (shape in shapes.all()) == (sampled or greedy or step_rows == 0)
    assert shape.batch >= step_rows
    assert shape.tokens >= step_tokens
    assert (shape.tokens == 0) == (step_tokens == 0)
    assert shape.context >= step_context
    assert shape.context % page_size == 0
    assert shape.greedy == (greedy and shape.batch > 0)


def test_the_smallest_shape_is_picked() -> None:
    shapes = table()
    assert shapes.pick(3, 0, 100, True) == StepShape(4, 0, 512, True)
    assert shapes.pick(4, 0, 513, False) == StepShape(4, 0, 2_048, False)
    assert shapes.pick(0, 65, 2_049, True) == StepShape(0, 256, 4_096, False)
    assert shapes.pick(1, 65, 2_049, True) == StepShape(8, 248, 4_096, True)
    assert shapes.pick(9, 1, 1, False) == StepShape(16, 48, 512, False)


@pytest.mark.parametrize("rows", [1, 8, 9, 16])
def test_a_full_step_has_no_more_rows_than_its_longest_prompt(rows: int) -> None:
    shapes = table()
    shape = shapes.pick(rows, shapes.most_tokens(rows), 1, True)
    assert shape.batch + shape.tokens == 512
    assert shapes.pick(0, shapes.most_tokens(0), 1, True) == StepShape(0, 512, 512, False)
    assert shapes.most_rows == 512


@pytest.mark.parametrize("buckets", [None, (64, 256, 300, 512)])
@pytest.mark.parametrize("rows", [1, 8, 9, 16])
def test_steps_with_both_may_be_smaller(rows: int, buckets: tuple[int, ...] | None) -> None:
    shapes = table(max_num_mixed_tokens=200, token_buckets=buckets)
    shape = shapes.pick(rows, shapes.most_tokens(rows), 1, True)
    assert shape.batch + shape.tokens == 200
    assert shapes.most_tokens(0) == shapes.most_rows == 512
    every = shapes.all()
    assert {s.batch + s.tokens for s in every if s.batch and s.tokens} == {64, 200}
    assert {s.tokens for s in every if s.tokens and not s.batch} == set(buckets or (64, 256, 512))
    # Fewer are compiled.
    assert len(every) < len(table(token_buckets=buckets).all())


def test_a_batch_of_more_than_half_a_step_leaves_prompts_what_its_rows_do() -> None:
    shapes = table(max_num_seqs=16, max_num_batched_tokens=24, batch_buckets=(16,))
    assert shapes.most_tokens(10) == 14
    assert shapes.pick(10, 14, 1, True) == StepShape(16, 24, 512, True)
    assert shapes.most_rows == 40


def test_all_shapes_come_once_and_the_largest_first() -> None:
    shapes = table().all()
    assert len(set(shapes)) == len(shapes) == 5 * 3 * 2 + 2 * 3 * 3 * 2 + 3 * 3
    assert shapes == sorted(shapes, reverse=True)
    greedy = table(sampled=False).all()
    assert greedy == [shape for shape in shapes if shape.greedy or not shape.batch]


def test_buckets_of_the_user_replace_the_defaults() -> None:
    shapes = table(batch_buckets=(4, 16), token_buckets=(100,), context_buckets=(1_000, 3_000))
    assert shapes.contexts == (1_008, 3_008)  # whole pages of 16
    assert shapes.pick(1, 0, 1_001, True) == StepShape(4, 0, 1_008, True)
    assert shapes.pick(5, 7, 1_009, True) == StepShape(16, 84, 3_008, True)


def test_beyond_the_buckets_the_next_power_of_two_is_taken() -> None:
    shapes = table(batch_buckets=(4,), token_buckets=(8,), context_buckets=(32,))
    shape = shapes.pick(5, 9, 33, True)
    assert shape == StepShape(8, 16, 64, True)
    assert shape not in shapes.all()


# ---- packing

PAGE = 4
CHUNKS = 3
ROWS = 6


def plan_of(rows: list[int], chunk_lengths: list[int]) -> StepPlan:
    """A plan with different numbers everywhere; the last chunk does not end its prompt."""
    params = SamplingParams(temperature=0)

    def sequence(i: int) -> Sequence:
        return Sequence(str(i), 0, np.arange(3, dtype=np.int32), params, (0, i), 8)

    width = 3
    chunks = [
        Chunk(
            sequence(i),
            row=5 - i,
            serial=9,
            start=2 * i,
            tokens=np.arange(100 * i, 100 * i + length, dtype=np.int32),
            last=i + 1 < len(chunk_lengths),
        )
        for i, length in enumerate(chunk_lengths)
    ]
    count = len(rows)
    return StepPlan(
        rows=np.array(rows, np.int32),
        serials=np.arange(count),
        sequences=[sequence(i) for i in range(count)],
        tokens=np.arange(count, dtype=np.int32) - 1,
        positions=np.arange(count, dtype=np.int32) + 3,
        page_table=np.arange(count * width, dtype=np.int32).reshape(count, width) + 1,
        chunks=chunks,
        chunk_page_table=np.arange(len(chunks) * width, dtype=np.int32).reshape(-1, width) + 50,
        admitted=[],
        context_tokens=11,
        plain_greedy=False,
    )


@pytest.mark.parametrize("rows", [[], [2], [1, 3, 0]])
@pytest.mark.parametrize("lengths", [[], [5], [3, 1, 4]])
def test_a_packed_plan_unpacks_to_itself_and_padding(rows: list[int], lengths: list[int]) -> None:
    plan = plan_of(rows, lengths)
    shape = StepShape(4, 16 if lengths else 0, 20, False)
    flat = batches.pack(plan, shape, chunks=CHUNKS, page_size=PAGE, unowned_row=ROWS)
    assert flat.shape == (batches.packed_size(shape, CHUNKS, PAGE),)
    assert flat.dtype == np.int32
    out = batches.unpack(flat, shape, CHUNKS, PAGE)
    count, n = len(rows), len(lengths)

    np.testing.assert_array_equal(out.tokens[:count], plan.tokens)
    np.testing.assert_array_equal(out.positions, [*plan.positions, *[-1] * (4 - count)])
    np.testing.assert_array_equal(out.rows, [*rows, *[ROWS] * (4 - count)])
    np.testing.assert_array_equal(out.page_table[:count, :3], plan.page_table)
    assert not out.page_table[:, 3:].any()
    assert not out.page_table[count:].any()
    if not lengths:
        assert sum(part.size for part in out[4:]) == 0
        return

    used = sum(lengths)
    np.testing.assert_array_equal(
        out.chunk_tokens[:used], np.concatenate([c.tokens for c in plan.chunks])
    )
    np.testing.assert_array_equal(
        out.chunk_positions[:used],
        np.concatenate([np.arange(c.start, c.end) for c in plan.chunks]),
    )
    assert (out.chunk_positions[used:] == -1).all()
    np.testing.assert_array_equal(out.chunk_of_token[:used], np.repeat(np.arange(n), lengths))
    starts = np.cumsum([0, *lengths])
    np.testing.assert_array_equal(out.chunk_starts[: n + 1], starts[:CHUNKS])
    assert (np.diff(out.chunk_starts) >= 0).all()
    np.testing.assert_array_equal(out.chunk_counts, [*lengths, *[0] * (CHUNKS - n)])
    np.testing.assert_array_equal(out.chunk_contexts[:n], [c.end for c in plan.chunks])
    # Only a chunk that ends its prompt has a token to store in the history.
    rows_of_chunks = [c.row if c.last else ROWS for c in plan.chunks]
    np.testing.assert_array_equal(out.chunk_rows, [*rows_of_chunks, *[ROWS] * (CHUNKS - n)])
    np.testing.assert_array_equal(out.chunk_page_table[:n, :3], plan.chunk_page_table)
    assert not out.chunk_page_table[n:].any()
