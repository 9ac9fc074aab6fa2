"""Rotation and KV store in one kernel: numbers, lowering, and no copy of the pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope_write import reference, rope_write
from pallas_kernels.rope_write.config import default_config
from tests.pallas_kernels import modes

HEADS = [
    # Hq, Hkv, D, normed: Llama-2-7B, Llama-3-8B, 70B, Qwen2.5-7B and 0.5B, Qwen3-8B and 14B, ...
    (32, 32, 128, False),
    (32, 8, 128, False),
    (64, 8, 128, False),
    (28, 4, 128, False),
    (14, 2, 64, False),
    (32, 8, 128, True),
    (40, 8, 128, True),
    (32, 32, 96, False),
    (8, 1, 256, True),
    (9, 3, 64, True),
    (2, 1, 16, False),
]


def shapes_of(
    tokens: int, heads: int, kv_heads: int, size: int, page_size: int, dtype: str
) -> list[jax.ShapeDtypeStruct]:
    """Arguments of the kernel: qkv, cos, sin, pages of k and v, slots."""
    pages = jax.ShapeDtypeStruct((4, page_size, kv_heads, size), dtype)
    angle = jax.ShapeDtypeStruct((tokens, size // 2), jnp.float32)
    qkv = jax.ShapeDtypeStruct((tokens, heads + 2 * kv_heads, size), dtype)
    return [qkv, angle, angle, pages, pages, jax.ShapeDtypeStruct((tokens,), jnp.int32)]


def _with_norms(qkv, cos, sin, k_pages, v_pages, slots, q_norm, k_norm, *, num_heads):
    return rope_write(
        qkv,
        cos,
        sin,
        k_pages,
        v_pages,
        slots,
        num_heads=num_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=1e-6,
    )


def sass_cases() -> list[tuple[str, Callable, tuple[jax.ShapeDtypeStruct, ...]]]:
    """What is compiled for the GPU: a name, the function and its argument shapes."""
    cases = []
    for heads, kv_heads, size, normed in HEADS:
        for dtype in ("bfloat16", "float16"):
            shapes = shapes_of(3, heads, kv_heads, size, 16, dtype)
            fn: Callable = partial(rope_write, num_heads=heads)
            if normed:
                fn = partial(_with_norms, num_heads=heads)
                shapes += [jax.ShapeDtypeStruct((size,), dtype)] * 2
            name = f"rope_write-{heads}-{kv_heads}-{size}{'-norm' * normed}-{dtype}"
            cases.append((name, fn, tuple(shapes)))
    return cases


def case(
    tokens: int, heads: int, kv_heads: int, size: int, normed: bool, dtype: str = "bfloat16"
) -> tuple[list[jax.Array], dict[str, Any]]:
    """Random arguments; the slots are all different."""
    shapes = shapes_of(tokens, heads, kv_heads, size, 8, dtype)
    keys = iter(jax.random.split(jax.random.key(tokens * heads + size), 7))
    qkv, k_pages, v_pages = (
        jax.random.normal(next(keys), shapes[i].shape, dtype) for i in (0, 3, 4)
    )
    angle = 6 * jax.random.uniform(next(keys), shapes[1].shape)
    slots = jax.random.permutation(next(keys), 32)[:tokens].astype(jnp.int32)
    options: dict[str, Any] = {"num_heads": heads}
    if normed:
        weights = (1 + jax.random.normal(next(keys), (size,), dtype) for _ in range(2))
        options |= dict(zip(("q_norm", "k_norm"), weights, strict=True)) | {"eps": 0.1}
    return [qkv, jnp.cos(angle), jnp.sin(angle), k_pages, v_pages, slots], options


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "normed", "dtype"),
    [
        (3, 4, 2, 64, False, "bfloat16"),
        (1, 16, 16, 128, False, "bfloat16"),
        (2, 7, 1, 128, True, "bfloat16"),
        (2, 3, 3, 96, True, "float16"),
        (5, 2, 1, 16, False, "float16"),
    ],
)
def test_numbers(
    tokens: int,
    heads: int,
    kv_heads: int,
    size: int,
    normed: bool,
    dtype: str,
    capfd: pytest.CaptureFixture,
) -> None:
    arguments, options = case(tokens, heads, kv_heads, size, normed, dtype)
    got = modes.run(partial(rope_write, **options), *arguments)
    want = reference.rope_write(*arguments, **options)
    for name, a, b in zip(("q", "k_pages", "v_pages"), got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b), name
    # Only the tokens' slots change, and they do.
    for pages, before in zip(got[1:], arguments[3:5], strict=True):
        changed = np.asarray(pages != before).reshape(32, -1).any(1)
        assert set(np.flatnonzero(changed)) == set(np.asarray(arguments[5]).tolist())
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_the_reference_turns_as_complex_numbers_do() -> None:
    (qkv, cos, sin, *rest), options = case(2, 4, 2, 32, False, "float32")
    q, _, _ = reference.rope_write(qkv, cos, sin, *rest, **options)
    x = np.asarray(qkv[:, :4], np.float64)
    turned = (x[..., :16] + 1j * x[..., 16:]) * (np.asarray(cos) + 1j * np.asarray(sin))[:, None]
    assert np.allclose(q, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_padded_rows_may_share_a_slot() -> None:
    arguments, options = case(4, 4, 2, 64, False)
    arguments[5] = jnp.array([0, 17, 0, 0], jnp.int32)
    got = modes.run(partial(rope_write, **options), *arguments, races=False)
    want = reference.rope_write(*arguments, **options)
    for a, b in zip(got[1:], want[1:], strict=True):
        rows_a, rows_b = (np.asarray(p, np.float32).reshape(32, -1) for p in (a, b))
        assert np.isfinite(rows_a).all()
        assert np.allclose(rows_a[1:], rows_b[1:], rtol=1e-2)


@pytest.mark.parametrize(
    ("fn", "shapes"), [pytest.param(fn, shapes, id=name) for name, fn, shapes in sass_cases()]
)
def test_lowers_for_the_gpu_in_place(
    fn: Callable, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> None:
    text = modes.lower(fn, *shapes, donate_argnums=(3, 4))
    assert text.count("mosaic_gpu_v2") == 1
    assert text.count("#stablehlo.output_operand_alias<") == 2  # both pools, where they are


def test_blocks_take_as_many_heads_as_divide() -> None:
    config = default_config(28, 8)
    assert (config.query_heads, config.kv_heads) == (4, 8)
    assert default_config(64, 1).query_heads == 16


@pytest.mark.parametrize(
    ("index", "shape", "name"),
    [
        (0, (3, 512), r"qkv \(3, 512\)"),
        (1, (3, 31), "cos"),
        (3, (4, 8, 128), r"k_pages \(4, 8, 128\)"),
        (4, (4, 8, 1, 64), "v_pages"),
        (5, (2,), "slots"),
    ],
)
def test_shapes_that_do_not_fit(index: int, shape: tuple[int, ...], name: str) -> None:
    arguments, options = case(3, 4, 2, 64, False)
    arguments[index] = jnp.zeros(shape, arguments[index].dtype)
    with pytest.raises(ValueError, match=name):
        rope_write(*arguments, **options)


def test_norms_come_together() -> None:
    arguments, options = case(3, 4, 2, 64, True)
    with pytest.raises(ValueError, match="all or none"):
        rope_write(*arguments, **options | {"k_norm": None})


@pytest.mark.parametrize(("size", "dtype"), [(40, "bfloat16"), (64, "float32")])
def test_what_is_refused(size: int, dtype: str) -> None:
    arguments, options = case(3, 4, 2, size, False, dtype)
    with pytest.raises(NotImplementedError, match=dtype if dtype == "float32" else str(size)):
        rope_write(*arguments, **options)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "name"), [(0, 4, 2, "T"), (3, 0, 2, "Hq"), (3, 4, 0, "Hkv")]
)
def test_an_empty_axis_is_refused(tokens: int, heads: int, kv_heads: int, name: str) -> None:
    shapes = shapes_of(tokens, heads, kv_heads, 64, 16, "bfloat16")
    with pytest.raises(NotImplementedError, match=f"{name} is 0: at least 1"):
        jax.eval_shape(partial(rope_write, num_heads=heads), *shapes)


def test_a_negative_eps_is_refused() -> None:
    arguments, options = case(3, 4, 2, 64, True)
    with pytest.raises(ValueError, match=r"eps is -0\.1, expected .* at least 0"):
        rope_write(*arguments, **options | {"eps": -0.1})
