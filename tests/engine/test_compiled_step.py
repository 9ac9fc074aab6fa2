"""What XLA made of a step: the KV pages are updated where they are, and never copied."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jpd import ops
from jpd.config import KernelConfig
from jpd.engine.build import Engine
from jpd.engine.executor import Executor
from jpd.engine.lowering import key
from jpd.engine.plan import StepPlan
from jpd.engine.shapes import StepShape
from jpd.ops import registry
from jpd.ops.rope import write_kv
from jpd.semi_pd.page_push import PushProgress
from native.kv_push import link
from tests import tiny_models
from tests.engine.tiny_engine import MODEL, drain, fresh, greedy, tiny_engine

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?\S+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", re.MULTILINE)
_ALIAS = re.compile(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)")

IN_PLACE = {"parameter", "bitcast", "scatter", "fusion"}
"""Pool-sized instructions of a step that copies nothing: views, and the scatters (each in a fusion
of its own), whose output XLA puts where their operand is."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Far more pages than the steps need work space, so that one copy of them would show."""
    folder = tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model"))
    return tiny_engine(folder, num_pages=4_099)


SHAPES = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(StepShape(8, 0, 128, True), id="decode"),
        pytest.param(StepShape(8, 0, 128, False), id="decode-sampling"),
        pytest.param(StepShape(8, 24, 128, True), id="mixed"),
        pytest.param(StepShape(8, 24, 128, False), id="mixed-sampling"),
        pytest.param(StepShape(0, 32, 128, False), id="prompts-sampling"),
    ],
)


def opcodes_of_size(hlo: str, size: int) -> Counter[str]:
    """How often each operation gives an array of `size` elements, in whatever shape."""
    found = _INSTRUCTION.findall(hlo)
    assert len(found) > 5, "this is no HLO that the test can read"
    return Counter(
        op for dims, op in found if math.prod(map(int, filter(None, dims.split(",")))) == size
    )


def test_the_shapes_under_test_are_all_there_are(engine: Engine) -> None:
    (mark,) = [SHAPES.mark]
    shapes = {param.values[0] for param in mark.args[1]}
    assert shapes == set(engine.executor.shapes.all()) == set(engine.executor.compiled._steps)


@SHAPES
def test_no_step_copies_the_pages(engine: Engine, shape: StepShape) -> None:
    leaves = jax.tree.leaves(engine.executor.kv)
    found = opcodes_of_size(
        engine.executor.compiled.get(shape, engine.executor._lower).as_text(), leaves[0].size
    )
    assert set(found) <= IN_PLACE, f"{shape}: {found}"
    assert found["scatter"] == found["fusion"] == len(leaves)


@SHAPES
def test_every_page_array_leaves_the_step_where_it_came_in(
    engine: Engine, shape: StepShape
) -> None:
    executor, compiled = (
        engine.executor,
        engine.executor.compiled.get(shape, engine.executor._lower),
    )
    head = compiled.as_text().split("entry_computation_layout", 1)[0]
    alias = {int(out): int(into) for out, into in _ALIAS.findall(head)}
    donated = len(jax.tree.leaves(executor.kv)) + 1  # and the token history
    first = len(jax.tree.leaves(executor.params))
    assert alias == {i: first + i for i in range(donated)}
    memory = compiled.memory_analysis()
    kv_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(executor.kv))
    assert memory.alias_size_in_bytes == kv_bytes + executor.history.nbytes
    cublas = (32 << 20) if jax.default_backend() == "gpu" else 0  # its own work space
    assert memory.temp_size_in_bytes - cublas < jax.tree.leaves(executor.kv)[0].nbytes


class Silent:
    """Is told of progress and does nothing about it."""

    targets = ()

    def filled(
        self, layer: int, following: jax.Array, keys: jax.Array, values: jax.Array
    ) -> jax.Array:
        return following

    def ended(self, last: jax.Array, kv: object) -> jax.Array:
        return last


def lowered_with(engine: Engine, shape: StepShape, progress: object) -> jax.stages.Lowered:
    source = dataclasses.replace(engine.executor._lowering()._source, progress=progress)
    executor = engine.executor
    inputs = executor.params, executor.kv, executor.history, *executor._host_inputs(shape, None)
    with source.tracing():
        return jax.jit(source.function(shape), donate_argnums=(1, 2)).lower(*inputs)


@SHAPES
def test_who_is_told_of_progress_leaves_no_trace(engine: Engine, shape: StepShape) -> None:
    without = lowered_with(engine, shape, None).as_text()
    assert without == lowered_with(engine, shape, Silent()).as_text()
    assert "jpd_kv" not in without


@SHAPES
def test_a_step_that_sends_its_pages_still_copies_none(engine: Engine, shape: StepShape) -> None:
    link._library()
    lowered = lowered_with(engine, shape, PushProgress())
    if not shape.tokens:
        assert lowered.as_text() == lowered_with(engine, shape, None).as_text()
        return
    compiled = lowered.compile()
    hlo = compiled.as_text()
    leaves = jax.tree.leaves(engine.executor.kv)
    assert set(opcodes_of_size(hlo, leaves[0].size)) <= IN_PLACE
    called = re.findall(r'custom_call_target="(jpd_kv_\w+)"', hlo)
    assert called == ["jpd_kv_filled"] * (len(leaves) // 2) + ["jpd_kv_ended"]
    kv_bytes = sum(leaf.nbytes for leaf in leaves) + engine.executor.history.nbytes
    assert compiled.memory_analysis().alias_size_in_bytes == kv_bytes


def test_a_step_that_sends_its_pages_can_be_kept(engine: Engine) -> None:
    shape = StepShape(8, 32, 128, False)
    plain = engine.executor._lowering()._source
    source = dataclasses.replace(plain, progress=PushProgress())
    inputs = engine.executor._lowering()._inputs_of(shape)
    stored = pickle.loads(pickle.dumps(source)).export(shape, inputs)
    module = export.deserialize(bytearray(stored.module)).mlir_module()
    assert module.count("@jpd_kv_filled") == engine.model_config.num_layers
    assert key(source, shape, inputs) != key(plain, shape, inputs)
    assert key(source, shape, inputs) == key(
        dataclasses.replace(plain, progress=PushProgress()), shape, inputs
    )


def test_serving_never_moves_the_pages(engine: Engine) -> None:
    def addresses() -> list[int]:
        arrays = [*jax.tree.leaves(engine.executor.kv), engine.executor.history]
        return [a.unsafe_buffer_pointer() for a in arrays]

    before, coordinator = addresses(), fresh(engine)
    for i, prompt in enumerate(([7] * 50, [9, 8, 7], list(range(40)))):
        coordinator.add(str(i), None, prompt, greedy(max_tokens=10))
    drain(coordinator)
    assert coordinator.stats().steps > 10
    assert addresses() == before


def test_the_reader_sees_a_copy_where_there_is_one() -> None:
    """Without donation XLA must copy the pages before it writes; so must a transposed use."""
    pages, rows = jnp.zeros((64, 8, 2, 32)), jnp.ones((3, 2, 32))
    slots = jnp.array([8, 9, 200])

    def write(k, v, rows, slots):
        return write_kv(k, v, rows, rows, slots)

    kept = jax.jit(write).lower(pages, pages, rows, slots).compile()
    found = opcodes_of_size(kept.as_text(), pages.size)
    assert found["copy"] == 2
    assert not _ALIAS.findall(kept.as_text())
    donated = jax.jit(write, donate_argnums=(0, 1)).lower(pages, pages, rows, slots).compile()
    assert set(opcodes_of_size(donated.as_text(), pages.size)) <= IN_PLACE
    assert len(_ALIAS.findall(donated.as_text())) == 2


@pytest.mark.parametrize("last", ["", "del engine, coordinator"])
def test_a_process_may_end_while_a_step_runs(tmp_path: Path, last: str) -> None:
    folder = tiny_models.make_checkpoint(MODEL, tmp_path)
    script = (
        "import pathlib, sys\n"
        "from tests.engine.tiny_engine import *\n"
        "engine = tiny_engine(pathlib.Path(sys.argv[1]))\n"
        "coordinator = fresh(engine)\n"
        "params = SamplingParams(n=8, max_tokens=50)\n"
        "coordinator.add('a', None, [5] * 70, params)\n"
        f"coordinator.step()\n{last}"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_padding_writes_to_page_zero_only(engine: Engine) -> None:
    coordinator = fresh(engine)
    coordinator.add("a", None, [5, 6, 7], greedy(max_tokens=3, ignore_eos=True))
    (sequence,) = coordinator._requests["a"].sequences
    marked = [jnp.full_like(leaf, 123.0) for leaf in jax.tree.leaves(engine.executor.kv)]
    engine.executor.kv = jax.tree.unflatten(jax.tree.structure(engine.executor.kv), marked)
    pages = []
    while coordinator.has_work:
        coordinator.step()
        pages = sequence.pages or pages
    assert len(pages) == 1
    for leaf in jax.tree.leaves(engine.executor.kv):
        touched = np.flatnonzero((np.asarray(leaf) != 123.0).any((1, 2, 3)))
        assert set(touched.tolist()) == {0, *pages}
        # Three prompt tokens and the two generated ones that were fed back.
        used = (np.asarray(leaf)[pages[0]] != 123.0).any((1, 2))
        assert used.tolist() == [True] * 5 + [False] * 3


def test_steps_that_run_for_nobody_touch_nothing_of_anybody(engine: Engine) -> None:
    executor = engine.executor
    marked = [jnp.full_like(leaf, 123.0) for leaf in jax.tree.leaves(executor.kv)]
    executor.kv = jax.tree.unflatten(jax.tree.structure(executor.kv), marked)
    executor.history = jnp.full_like(executor.history, 99)
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(executor.kv)]
    compiled = executor.recompiles
    executor.run_for_nobody()
    assert executor.recompiles == compiled
    leaves = jax.tree.leaves(executor.kv)
    assert [leaf.unsafe_buffer_pointer() for leaf in leaves] == addresses
    for leaf in leaves:
        assert set(np.flatnonzero((np.asarray(leaf) != 123.0).any((1, 2, 3))).tolist()) == {0}
    history = np.asarray(executor.history)
    assert (history[:-1] == 99).all()
    assert not (history[-1] == 99).all()
    executor.kv = jax.tree.map(jnp.zeros_like, executor.kv)


def test_a_step_runs_the_kernels_that_its_config_names(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = registry._OPS["linear"]
    monkeypatch.setattr(table, "implementations", dict(table.implementations))
    plain = table.implementations["xla"]
    ops.register("linear", "mine", lambda x, weight, **kw: plain(-x, -weight, **kw))
    config = engine.config.replace(kernels=KernelConfig(linear="mine"))
    (device,) = engine.executor.history.devices()
    params = engine.executor.params
    executor = Executor(config, engine.model_config, params, device, ())
    before = ops.choices()
    executor.launch(one_row_plan())
    after = ops.choices()
    assert executor.compiled.recompiles == 1
    # q, k and v; what attention and MLP put out; and the logits. Gate and up are another op.
    traced = after["linear", "mine"] - before.get(("linear", "mine"), 0)
    assert traced == 3 * engine.model_config.num_layers + 1
    assert after["linear", "xla"] == before["linear", "xla"]
    assert after["decode_attention", "xla"] > before["decode_attention", "xla"]


def one_row_plan() -> StepPlan:
    """One row at position 0, on page 1."""
    one, zero = np.ones((1, 1), np.int32), np.zeros(1, np.int32)
    return StepPlan(
        rows=zero,
        serials=zero,
        sequences=[],
        tokens=zero,
        positions=zero,
        page_table=one,
        chunks=[],
        chunk_page_table=np.zeros((0, 1), np.int32),
        admitted=[],
        context_tokens=1,
        plain_greedy=True,
    )
