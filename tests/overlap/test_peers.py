"""What XLA makes of the benchmark's peers for GPUs: the programs that their names say."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import overlap_impls, overlap_time
from benchmarks.overlap_host import product_in_place
from tests.aot import mesh_of_h200s, needs_wheels

pytestmark = needs_wheels
M, N, K, RANKS = 2048, 4096, 1024, 2
OPS = ("all_reduce", "reduce_scatter")
PRODUCT = r"custom_call_target=\"__cublas\$lt\$matmul\""


@pytest.fixture(scope="module")
def mesh():
    return mesh_of_h200s(RANKS, overlap_time.AXIS)


def program_of(implementation, mesh):
    """The optimised program of one call."""
    split = NamedSharding(mesh, P(None, overlap_time.AXIS))
    x, w = (
        jax.ShapeDtypeStruct((rows, RANKS * K), jnp.bfloat16, sharding=split) for rows in (M, N)
    )
    lowered = overlap_time.lower(implementation.operation, mesh, [x], [w])
    options = {**overlap_time.GPU_OPTIONS, **implementation.options}
    return lowered.compile(compiler_options=options).as_text()


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("op", OPS)
def test_parts_are_computed_and_sent_apart(op, parts, mesh):
    text = program_of(overlap_impls.chunked(op, parts), mesh)
    assert len(re.findall(PRODUCT, text)) == parts
    name = op.replace("_", "-")
    assert len(re.findall(rf" {name}(?:-start)?\(%", text)) == parts
    assert f" {name}-start(%" in text  # all but the last behind a product


@pytest.mark.parametrize("op", OPS)
def test_a_windowed_einsum_is_a_loop_whose_sends_are_behind_its_products(op):
    mesh = mesh_of_h200s(4, overlap_time.AXIS)
    text = program_of(overlap_impls.windowed(op, mesh), mesh)
    assert "unrolled_windowed" not in text  # what XLA unrolls it counts wrong
    body = re.search(r"^%windowed_dot_general_body\w* .*?^}", text, re.DOTALL | re.MULTILINE)[0]
    events = re.findall(rf"collective-permute-(?:start|done)(?=\(%)|{PRODUCT}", body)
    names = [event.removeprefix("collective-permute-") for event in events]
    product = 'custom_call_target="__cublas$lt$matmul"'
    assert names == 2 * ["start", product, "done"]


@pytest.mark.parametrize("op", [*OPS, "all_to_all"])
def test_one_after_the_other_is_one_product_and_one_collective(op, mesh):
    text = program_of(overlap_impls.sequential(op), mesh)
    assert len(re.findall(PRODUCT, text)) == 1
    name = op.replace("_", "-")
    assert len(re.findall(rf" {name}(?:-start)?\(%", text)) == 1


def test_the_host_driven_peer_writes_its_product_where_it_is_sent_from():
    """In place of a buffer that is donated; its counter is raised after that."""
    here = NamedSharding(mesh_of_h200s(1, "x"), P())
    shapes = ((M, K), jnp.bfloat16), ((N, K), jnp.bfloat16), ((1, M, N), jnp.bfloat16)
    arguments = [
        jax.ShapeDtypeStruct(*shape, sharding=here) for shape in (*shapes, ((1,), jnp.int32))
    ]
    jitted = jax.jit(product_in_place, donate_argnums=(2, 3), keep_unused=True)
    options = dict(overlap_time.GPU_OPTIONS)
    text = jitted.lower(*arguments).compile(compiler_options=options).as_text()
    assert re.search(r"input_output_alias=\{ \{0\}: \(2, .*\{1\}: \(3, ", text.splitlines()[0])
    assert " copy(" not in text
    entry = text[text.index("ENTRY") :]
    assert entry.index("__cublas") < entry.index(" fusion(")
