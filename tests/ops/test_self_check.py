"""The check at start: right kernels pass, and each op that computes something else is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from jpd import ops
from jpd.config import KernelConfig
from jpd.engine.shapes import shape_table
from jpd.errors import KernelError
from jpd.ops import pallas, registry, self_check
from jpd.ops.overlap import packed
from jpd.ops.self_check import Product, Widths
from pallas_kernels import dataflow
from tests import tiny_models
from tests.engine.tiny_engine import MODEL, tiny_engine


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Takes back what a test registers."""
    before = {name: dict(op.implementations) for name, op in registry.ops().items()}
    yield
    for name, op in registry.ops().items():
        op.implementations = before[name]


def widths_of(dtype: str = "bfloat16") -> Widths:
    return Widths(
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        page_size=16,
        windows=(None, 20, None),
        dtype=dtype,
        eps=1e-5,
        qk_norm=True,
        sums=True,
    )


def check(dtype: str = "bfloat16", **kernels: str) -> list[str]:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    products = [
        Product("qkv", weight(256, 64), (1, 40), bias=weight(256), eps=1e-5),
        Product("down", weight(64, 96), (1, 40), residual=True),
        Product("gate and up", weight(192, 64), (1, 40), gated=True, bias=weight(192)),
    ]
    device = jax.devices("cpu")[0]
    return self_check.run(widths_of(dtype), KernelConfig(**kernels), products, (1, 4), device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_implementations_pass(dtype: str) -> None:
    checked = check(dtype)
    for op in ops.implementations():
        assert any(line.startswith(f"{op} ") and line.endswith(" by xla") for line in checked), op
    assert sum(line.startswith("decode_attention") for line in checked) == 4
    assert sum(line.startswith("rms_norm_residual") for line in checked) == 3


def off_by(amount: float) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        return x * (1 + amount) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return lambda tree: jax.tree.map(change, tree)


WRONG: dict[str, Callable[[Any], Any]] = {
    "scaled by 1.03": off_by(0.03),
    "not finite": lambda tree: jax.tree.map(
        lambda x: x.at[(0,) * x.ndim].set(jnp.nan) if x.ndim > 1 else x, tree
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("op", sorted(ops.implementations()))
def test_a_wrong_implementation_of_any_op_is_refused(op: str, wrong: Callable) -> None:
    right = registry.ops()[op].implementations["xla"]
    ops.register(op, "wrong", lambda *args, **kwargs: wrong(right(*args, **kwargs)))
    with pytest.raises(KernelError, match=f"^{op} .* by wrong(, xla)?: relative error"):
        check(**{op: "wrong"})


def test_a_residual_that_is_left_out_is_found() -> None:
    right = registry.ops()["linear"].implementations["xla"]
    ops.register(
        "linear",
        "wrong",
        lambda x, w, *, bias=None, residual=None: right(x, w, bias=bias),
    )
    with pytest.raises(KernelError, match="down"):
        check(linear="wrong")


def test_an_early_start_that_is_wrong_is_found() -> None:
    right = registry.ops()["decode_attention"].implementations["xla"]
    noise = off_by(0.03)
    ops.register(
        "decode_attention",
        "wrong",
        lambda *args, early=False, **kwargs: (noise if early else lambda out: out)(
            right(*args, early=early, **kwargs)
        ),
    )
    with pytest.raises(KernelError, match="decode_attention"):
        check(decode_attention="wrong")


H200 = pallas.Gpu("NVIDIA H200", 132, "9.0")
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)


@pytest.mark.parametrize("kernels", [KernelConfig(), KernelConfig(pallas_only=True)])
@pytest.mark.parametrize(
    ("n", "k", "gated"), [(4608, 3584, False), (3584, 18944, False), (28672, 4096, True)]
)
def test_each_choice_of_kernel_for_a_product_is_tried(
    n: int, k: int, gated: bool, kernels: KernelConfig
) -> None:
    product = Product("", jax.ShapeDtypeStruct((n, k), "bfloat16"), ROWS, gated=gated)
    with registry.using(kernels, "gpu"), pallas.tracing_for(H200):
        cases = self_check._product_cases(
            product, None, lambda *shape: np.zeros(shape, np.int8), False
        )
        tried = [len(case.arrays[0]) for case in cases]

        def choices(rows: Any) -> set[Any]:
            return {pallas.product_choice(m, n, k, gated=gated) for m in rows}

        assert choices(tried) == choices(ROWS)
        assert len(choices(ROWS)) >= 7
        # The table prefers XLA for 96 and 128 rows of one of them.
        assert (("xla", None, None) in choices(ROWS)) == (k == 18944 and not kernels.pallas_only)
        assert len(tried) <= len(choices(ROWS)) + 2


EPS = 0.5
"""So large that a result without it is wrong."""
KINDS = ("linear qkv", "gated_linear gate and up")


def check_products(*, sums: bool = False) -> list[str]:
    """Of one and two rows that are read through a norm, for which the table has a GEMV."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(64, 256)), "bfloat16")
    products = [
        Product("qkv", weight, (1, 2), bias=weight[:, 0], eps=EPS),
        Product("gate and up", weight, (1, 2), gated=True, eps=EPS),
    ]
    draw = self_check.drawing(rng, "bfloat16")

    def cases(pool: Any) -> Iterator[self_check.Case]:
        for product in products:
            columns = self_check.Columns(product, pool)
            yield from self_check._product_cases(product, columns, draw, sums)

    with (
        registry.using(KernelConfig(), "gpu"),
        pallas.kernels_without_gpu(plgpu.InterpretGPUParams()),
    ):
        return self_check.run_cases(cases)


@pytest.mark.usefixtures("gemv_table")
@pytest.mark.parametrize("sums", [False, True])
def test_products_that_take_a_norm_along_are_tried_with_each_number_of_rows(sums: bool) -> None:
    through = [f"{name} through a norm bfloat16[{rows}," for name in KINDS for rows in (1, 2)]
    alone = [f"{name} bfloat16[{rows}," for name in KINDS for rows in (1, 2)]
    checked = check_products(sums=sums)
    assert len(checked) == (8 if sums else 4)
    for start in through + alone * sums:
        assert sum(one.startswith(start) for one in checked) == 1


def no_eps(norm: Any) -> Any:
    return norm[0], 0.0


def no_weight(norm: Any) -> Any:
    return jnp.ones_like(norm[0]), norm[1]


@pytest.mark.usefixtures("gemv_table")
@pytest.mark.parametrize("wrong", [no_eps, no_weight])
def test_a_norm_that_a_product_takes_along_wrongly_is_found(
    wrong: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gemv(*args: Any, norm: Any, **options: Any) -> jax.Array:
        return right(*args, norm=norm and wrong(norm), **options)

    right = dataflow.gemv
    monkeypatch.setattr(dataflow, "gemv", gemv)
    with pytest.raises(KernelError, match="linear qkv through a norm"):
        check_products()


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (28, 4), (16, 1)])
def test_each_configuration_of_decode_attention_is_tried(heads: int, kv_heads: int) -> None:
    widths = dataclasses.replace(
        widths_of(), num_heads=heads, num_kv_heads=kv_heads, head_dim=128, windows=(None,)
    )
    batches = [rows for rows in ROWS if rows <= 256]
    products = [Product("", jnp.zeros((64, 64), "bfloat16"), (1,))]
    with (
        registry.using(KernelConfig(), "gpu"),
        pallas.tracing_for(H200),
        ThreadPoolExecutor(1) as pool,
    ):
        cases = self_check._cases(widths, products, batches, pool)
        tried = [len(case.arrays[0]) for case in cases if case.name.startswith("decode")]

        def choices(rows: Any) -> set[Any]:
            return {pallas.decode_choice(batch, heads, kv_heads, 128) for batch in rows}

        assert choices(tried) == choices(batches)
        assert len(choices(batches)) == 2


def test_no_choice_is_looked_for_where_no_kernel_is_tried() -> None:
    assert pallas.product_choice(1, 4608, 3584, gated=False) is None  # on a CPU
    with registry.using(KernelConfig(linear="xla"), "gpu"), pallas.tracing_for(H200):
        assert pallas.product_choice(1, 4608, 3584, gated=False) is None
        assert pallas.product_choice(1, 4608, 3584, gated=True) is not None


@pytest.mark.parametrize("tiles", [False, True])
def test_a_sum_that_is_added_wrongly_is_found(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed.unpack

    def wrong(y: Any) -> Any:
        return right(y) * (1.05 if tiles == isinstance(y, packed.Packed) else 1)

    monkeypatch.setattr(packed, "unpack", wrong)
    with pytest.raises(KernelError, match="residual of tiles" if tiles else "residual bfloat16"):
        check()


def test_an_engine_with_a_wrong_kernel_is_not_built(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(MODEL, tmp_path)
    right = registry.ops()["rms_norm"].implementations["xla"]
    ops.register("rms_norm", "wrong", lambda x, weight, eps: right(x, weight + 1, eps))
    with pytest.raises(KernelError, match="rms_norm"):
        tiny_engine(folder, kernels=KernelConfig(rms_norm="wrong"))
    engine = tiny_engine(folder, kernels=KernelConfig(rms_norm="wrong", self_check=False))
    engine.executor.release()


def test_an_engine_hands_over_the_rows_of_all_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.make_checkpoint(MODEL, tmp_path)
    ops.register("rms_norm", "another", registry.ops()["rms_norm"].implementations["xla"])
    seen: list[Any] = []
    monkeypatch.setattr(self_check, "run", lambda *args: seen.append(args) or ["nothing"])
    engine = tiny_engine(folder, kernels=KernelConfig(rms_norm="another"))
    engine.executor.release()
    ((_, _, products, batches, _),) = seen
    shapes = shape_table(engine.config)
    chunks = engine.config.max_prefills_per_step
    rows = {product.name: set(product.rows) for product in products}
    assert set(batches) == set(shapes.batches)
    for shape in shapes.all():
        assert shape.batch + (chunks if shape.tokens else 0) in rows["logits"]
        for name in ("qkv", "out", "gate and up", "down"):
            assert shape.batch + shape.tokens in rows[name]


def test_nothing_is_compiled_but_the_ops_and_the_picked_columns() -> None:
    """Each program costs some tenths of a second on a GPU."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        check()  # with the weights, which the test makes
        seen.clear()
        checked = check()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    compiled = sum(event.endswith("backend_compile_duration") for event in seen)
    assert 0 < compiled <= len(checked) + 5
