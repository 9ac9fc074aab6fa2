"""Which implementation of an op runs, and how one sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpd import ops
from jpd.config import KernelConfig
from jpd.errors import ConfigError
from jpd.ops import registry

X = jnp.arange(6.0).reshape(2, 3)
WEIGHT = jnp.arange(12.0).reshape(4, 3)
PLAIN = np.asarray(X) @ np.asarray(WEIGHT).T


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Takes back what a test registers."""
    before = {name: dict(op.implementations) for name, op in registry._OPS.items()}
    yield
    for name, op in registry._OPS.items():
        op.implementations = before[name]


def plus(amount: float) -> Callable[..., jax.Array]:
    return lambda x, weight: x @ weight.T + amount


def unwilling(x: jax.Array, weight: jax.Array) -> jax.Array:
    raise NotImplementedError(f"no kernel for K={x.shape[1]}")


def counted(call: Callable[[], object]) -> dict[tuple[str, str], int]:
    """The choices that a call adds."""
    before = ops.choices()
    call()
    after = ops.choices()
    return {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)}


def test_every_op_has_an_xla_implementation_and_a_field_in_the_config() -> None:
    names = ops.implementations()
    fields = {f.name for f in dataclasses.fields(KernelConfig)} - {"pallas_only", "self_check"}
    assert set(names) == fields - {"matmul_all_reduce"}  # nobody registers others of that one
    for name, known in names.items():
        assert known == ["pallas", "xla"]
        assert getattr(KernelConfig(), name) == "auto"


def test_an_implementation_is_selected_by_config_by_argument_and_by_place() -> None:
    ops.register("linear", "plus_one", plus(1))
    np.testing.assert_allclose(ops.linear(X, WEIGHT), PLAIN)
    with ops.using(KernelConfig(linear="plus_one")):
        np.testing.assert_allclose(ops.linear(X, WEIGHT), PLAIN + 1)
        np.testing.assert_allclose(ops.linear(X, WEIGHT, implementation="xla"), PLAIN)
    np.testing.assert_allclose(ops.linear(X, WEIGHT, implementation="plus_one"), PLAIN + 1)
    ops.register("linear", "plus_two", plus(2), first=True)
    assert ops.implementations()["linear"] == ["plus_two", "pallas", "xla", "plus_one"]
    np.testing.assert_allclose(ops.linear(X, WEIGHT), PLAIN + 2)


def test_registering_a_name_again_replaces_it() -> None:
    ops.register("linear", "mine", plus(1))
    ops.register("linear", "mine", plus(5))
    assert ops.implementations()["linear"].count("mine") == 1
    np.testing.assert_allclose(ops.linear(X, WEIGHT, implementation="mine"), PLAIN + 5)


def test_an_unwilling_implementation_is_passed_over_and_the_choice_is_seen() -> None:
    ops.register("linear", "unwilling", unwilling, first=True)
    assert counted(lambda: ops.linear(X, WEIGHT)) == {("linear", "xla"): 1}
    np.testing.assert_allclose(ops.linear(X, WEIGHT), PLAIN)


def test_a_named_implementation_has_no_substitute() -> None:
    ops.register("linear", "unwilling", unwilling)
    with (
        ops.using(KernelConfig(linear="unwilling")),
        pytest.raises(ExceptionGroup, match="no implementation of 'linear'") as caught,
    ):
        ops.linear(X, WEIGHT)
    assert "no kernel for K=3" in str(caught.value.exceptions[0])


def test_any_other_error_surfaces() -> None:
    def broken(x: jax.Array, weight: jax.Array) -> jax.Array:
        raise ZeroDivisionError("a bug")

    ops.register("linear", "broken", broken, first=True)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        ops.linear(X, WEIGHT)


def test_the_choice_is_made_when_a_program_is_traced() -> None:
    ops.register("linear", "plus_one", plus(1))
    fn = jax.jit(lambda x: ops.linear(x, WEIGHT))
    with ops.using(KernelConfig(linear="plus_one")):
        assert counted(lambda: fn(X)) == {("linear", "plus_one"): 1}
    assert counted(lambda: fn(X)) == {}
    np.testing.assert_allclose(fn(X), PLAIN + 1)


def test_a_selection_ends_with_its_block_even_by_an_error() -> None:
    ops.register("linear", "plus_one", plus(1))
    with pytest.raises(KeyError), ops.using(KernelConfig(linear="plus_one")):
        raise KeyError
    np.testing.assert_allclose(ops.linear(X, WEIGHT), PLAIN)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"kernels.linear='fast' .*known: auto, pallas, xla"):
        ops.linear(X, WEIGHT, implementation="fast")
    with pytest.raises(ConfigError, match=r"kernels.rms_norm='fast'"):
        ops.check(KernelConfig(rms_norm="fast"))
    ops.check(KernelConfig(rms_norm="xla"))
    with pytest.raises(ConfigError, match=r"op 'linaer' does not exist; known: .*linear"):
        ops.register("linaer", "x", plus(0))
    with pytest.raises(ConfigError, match="name='auto' is taken"):
        ops.register("linear", "auto", plus(0))


def test_pallas_only_has_no_substitute_and_names_op_and_shapes() -> None:
    only = KernelConfig(pallas_only=True)
    ops.register("linear", "unwilling", unwilling, first=True)
    with (
        ops.using(only),
        pytest.raises(
            ConfigError, match=r"no kernel takes linear\(float32\[2, 3\], .*K=3"
        ) as caught,
    ):
        ops.linear(X, WEIGHT)
    assert "float32[4, 3]" in str(caught.value)
    ops.register("linear", "mine", plus(1))
    with ops.using(only):
        np.testing.assert_allclose(ops.linear(X, WEIGHT), PLAIN + 1)
    with pytest.raises(ConfigError, match=r"kernels.linear='xla' contradicts"):
        ops.check(KernelConfig(pallas_only=True, linear="xla"))
    with pytest.raises(ConfigError, match=r"kernels.pallas_only='yes'"):
        KernelConfig(pallas_only="yes")


def test_a_kernel_that_is_passed_over_on_a_gpu_is_said_once(caplog) -> None:
    linear = registry._OPS["linear"]
    linear.implementations = {"kernel": unwilling, "xla": linear.implementations["xla"]}
    ops.linear(X, WEIGHT)
    assert not caplog.records
    with ops.using(KernelConfig(), platform="gpu"):
        ops.linear(X, WEIGHT)
        ops.linear(X, WEIGHT)
    assert [r.getMessage() for r in caplog.records] == ["linear runs on 'xla': no kernel for K=3"]
