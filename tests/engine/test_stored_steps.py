"""Steps that were lowered earlier or elsewhere are the steps that would have been lowered here."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import export

from jpd import ops
from jpd.config import KernelConfig
from jpd.engine import lowering, lowering_pool
from jpd.engine.build import Engine
from jpd.engine.compile import step_options, step_store
from jpd.engine.lowering import StepSource, source_of
from jpd.engine.shapes import StepShape
from jpd.engine.stored_steps import FOLDER, StepStore, StoredStep, from_bytes, to_bytes
from jpd.ops import registry
from jpd.ops.pallas import Gpu
from jpd.types import SamplingParams
from tests import tiny_models
from tests.aot import compile_for_h200, needs_wheels
from tests.engine.test_pallas_step import ONLY, gpu_step, make_executor
from tests.engine.tiny_engine import MODEL, fresh, greedy, run, shapes_traced, tiny_engine, tokens

pytest.importorskip("flatbuffers", reason="jax.export writes no modules without it")

H200 = Gpu("NVIDIA H200", 132, "9.0")
SHAPE = StepShape(2, 0, 64, True)
_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def jax_settings() -> Iterator[None]:
    """An engine with a cache folder changes jax's settings for the process."""
    before = {name: jax.config.values[name] for name in _SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[list[int]]]:
    """What an engine says that stores nothing."""
    return serve(tiny_engine(folder, compilation_cache_dir=""))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    return shapes_traced(monkeypatch)


def serve(engine: Engine) -> list[list[list[int]]]:
    """Tokens of a greedy request and of one that samples."""
    params = [greedy(max_tokens=6), SamplingParams(temperature=0.8, seed=3, max_tokens=6)]
    return tokens(run(fresh(engine), [[1, 2, 3], [5] * 40], params))


def steps_in(cache: Path) -> list[Path]:
    return sorted((cache / FOLDER).glob("*"))


def a_source(**changes: Any) -> tuple[StepSource, Any]:
    """A step on this CPU, and its inputs."""
    _, executor = make_executor(kernels=KernelConfig())
    config = executor._config
    source = source_of(
        executor._model,
        chunks=config.max_prefills_per_step,
        page_size=config.page_size,
        phi=None,
        kernels=config.kernels,
        platform="cpu",
    )
    return dataclasses.replace(source, **changes), gpu_step(executor, SHAPE)[1]


def test_the_second_start_traces_nothing(
    folder: Path, plain: Any, traced: list[StepShape], tmp_path: Path
) -> None:
    first = tiny_engine(folder, compilation_cache_dir=str(tmp_path))
    assert sorted(traced) == sorted(first.executor.shapes.all())
    before, files = ops.choices(), {f: f.read_bytes() for f in steps_in(tmp_path)}
    assert len(files) == len(traced)
    traced.clear()
    second = tiny_engine(folder, compilation_cache_dir=str(tmp_path))
    assert traced == []
    assert {f: f.read_bytes() for f in steps_in(tmp_path)} == files
    # As if they had been traced again.
    added = {key: n - before.get(key, 0) for key, n in ops.choices().items()}
    layers = second.model_config.num_layers
    of_mlp = sum(n for (op, _), n in added.items() if op == "gated_linear")
    assert of_mlp == len(files) * layers
    assert serve(first) == serve(second) == plain
    assert second.executor.recompiles == 0
    # And a step that is compiled late is found too.
    assert second.executor._lower(second.executor.shapes.all()[0]) is not None
    assert traced == []


def test_other_processes_lower_the_same_steps(
    folder: Path,
    plain: Any,
    traced: list[StepShape],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowering, "_processes", lambda source, shapes: 2)
    with jax.default_matmul_precision("highest"):  # which they must take over
        engine = tiny_engine(folder, compilation_cache_dir=str(tmp_path))
        assert traced == []
        assert len(steps_in(tmp_path)) == len(engine.executor.shapes.all())
        key = lowering.key(*args_of_key(engine))
    assert key in {f.stem for f in steps_in(tmp_path)}
    assert lowering.key(*args_of_key(engine)) != key
    assert serve(engine) == plain


def args_of_key(engine: Engine) -> tuple[StepSource, StepShape, Any]:
    made = engine.executor._lowering()
    shape = engine.executor.shapes.all()[0]
    return made._source, shape, made._inputs_of(shape)


def test_a_process_that_fails_costs_no_step(
    folder: Path,
    traced: list[StepShape],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lowering, "_processes", lambda source, shapes: 2)
    monkeypatch.setattr(lowering_pool, "MODULE", "jpd.engine.no_such_module")
    engine = tiny_engine(folder, compilation_cache_dir=str(tmp_path))
    shapes = engine.executor.shapes.all()
    assert sorted(traced) == sorted(shapes) == sorted(engine.executor.compiled._steps)
    said = caplog.text.count("is lowered by this process: the process that was to do it")
    assert said == len(shapes)


def test_processes_that_see_something_else_lower_nothing() -> None:
    source, inputs = a_source()
    jobs = [(SHAPE, lowering._abstract(inputs))]
    ((shape, answer),) = lowering_pool.lower(source, jobs, 2, lowering.settings(), "other")
    assert shape == SHAPE
    assert answer == "another process sees other code or other settings of jax"


def test_no_process_outlives_its_parent() -> None:
    code = (
        "import os, signal; from jpd.child import spawn; "
        "worker = spawn('jpd.engine.lowering_worker'); print(worker.process.pid, flush=True); "
        "worker.connection.poll(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # Nobody may be there to wait for it: then its entry stays, without a command.
    command = Path(f"/proc/{int(done.stdout)}/cmdline")
    deadline = time.monotonic() + 120
    while command.exists() and command.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


CHANGES: dict[str, Callable[[StepSource], dict[str, Any]]] = {
    "model": lambda s: {"model": s.model.replace(rms_eps=2e-5)},
    "chunks": lambda s: {"chunks": s.chunks + 1},
    "phi": lambda s: {"phi": np.zeros((1, 4), np.float32)},
    "other phi": lambda s: {"phi": np.full((1, 4), 1e-3, np.float32)},
    "kernels": lambda s: {"kernels": KernelConfig(linear="xla")},
    "pallas only": lambda s: {"kernels": KernelConfig(pallas_only=True)},
    "platform": lambda s: {"platform": "gpu"},
    "gpu": lambda s: {"gpu": H200},
    "fewer SMs": lambda s: {"gpu": dataclasses.replace(H200, sms=66)},
}


def test_everything_that_changes_a_step_changes_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    source, inputs = a_source()
    keys = [lowering.key(source, SHAPE, inputs)]
    keys += [
        lowering.key(dataclasses.replace(source, **change(source)), SHAPE, inputs)
        for change in CHANGES.values()
    ]
    keys.append(lowering.key(source, dataclasses.replace(SHAPE, context=128), inputs))
    params, *rest = inputs
    keys.append(lowering.key(source, SHAPE, (jax.tree.map(lambda p: p[:1], params), *rest)))
    with jax.default_matmul_precision("highest"):
        keys.append(lowering.key(source, SHAPE, inputs))
    monkeypatch.setattr(lowering, "_code", lambda: "other code")
    keys.append(lowering.key(source, SHAPE, inputs))
    assert None not in keys
    assert len(set(keys)) == len(keys) == len(CHANGES) + 5
    unchecked = dataclasses.replace(source, kernels=KernelConfig(self_check=False))
    assert lowering.key(unchecked, SHAPE, inputs) == keys[-1]


def test_a_changed_source_or_table_is_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def code() -> str | None:
        return lowering._code.__wrapped__()

    real = code()
    assert real is not None
    for package in ("jpd", "native", "pallas_kernels"):
        (tmp_path / package / "tuned").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
    table = tmp_path / "pallas_kernels" / "tuned" / "gpu.json"
    table.write_text("{}")
    spec = type("Spec", (), {})

    def find(name: str) -> Any:
        found = spec()
        found.submodule_search_locations = [str(tmp_path / name)]
        return found

    monkeypatch.setattr(lowering.importlib.util, "find_spec", find)
    seen = [real, code()]
    table.write_text('{"sms": 66}')
    seen.append(code())
    (tmp_path / "jpd" / "__init__.py").write_text("# changed")
    seen.append(code())
    (tmp_path / "native" / "__init__.py").write_text("# changed")
    seen.append(code())
    assert len(set(seen)) == 5
    for file in (tmp_path / "jpd").glob("*.py"):
        file.unlink()
    assert code() is None


@pytest.mark.parametrize("replaced", ["mine", "xla"])
def test_what_somebody_registered_is_lowered_here_and_not_kept(
    replaced: str,
    folder: Path,
    traced: list[StepShape],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = registry._OPS["linear"]
    monkeypatch.setattr(table, "implementations", dict(table.implementations))
    plain = table.implementations["xla"]
    ops.register("linear", replaced, lambda x, weight, **kw: plain(-x, -weight, **kw))
    monkeypatch.setattr(lowering, "_processes", lambda source, shapes: 2)
    kernels = KernelConfig(linear=replaced, self_check=False)
    engine = tiny_engine(folder, compilation_cache_dir=str(tmp_path), kernels=kernels)
    assert len(traced) == len(engine.executor.shapes.all())
    assert steps_in(tmp_path) == []


def test_interpreted_kernels_are_not_kept() -> None:
    source, inputs = a_source()
    assert lowering.key(source, SHAPE, inputs) is not None
    with ops.kernels_without_gpu():
        assert lowering.key(source, SHAPE, inputs) is None


@pytest.mark.parametrize("damage", ["half", "other bytes", "nothing", "no module"])
def test_a_damaged_file_is_made_anew(
    damage: str,
    folder: Path,
    traced: list[StepShape],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny_engine(folder, compilation_cache_dir=str(tmp_path))
    victim, *_ = steps_in(tmp_path)
    good = victim.read_bytes()
    bad = {
        "half": good[: len(good) // 2],
        "other bytes": good[:-9] + b"x" * 9,
        "nothing": b"",
        "no module": to_bytes(StoredStep(b"no module", ())),
    }[damage]
    victim.write_bytes(bad)
    traced.clear()
    engine = tiny_engine(folder, compilation_cache_dir=str(tmp_path))
    assert len(traced) == 1
    assert set(engine.executor.compiled._steps) == set(engine.executor.shapes.all())
    if damage == "no module":
        assert "its module cannot be used" in caplog.text
    else:
        assert f"{victim} is passed over and made anew" in caplog.text
        assert from_bytes(victim.read_bytes()).module


def test_a_folder_that_cannot_be_written_costs_the_store_only(
    folder: Path, traced: list[StepShape], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    engine = tiny_engine(folder, compilation_cache_dir=str(tmp_path))
    assert len(traced) == len(engine.executor.shapes.all())
    assert caplog.text.count(f"lowered steps are not kept in {tmp_path / FOLDER}") == 1


def test_where_steps_are_kept(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert step_store("") is None
    assert step_store(None)._folder == tmp_path / FOLDER
    for elsewhere in (None, "gs://bucket/cache"):
        jax.config.update("jax_compilation_cache_dir", elsewhere)
        assert step_store(None) is None


def test_old_modules_go(tmp_path: Path) -> None:
    store, step = (
        StepStore(tmp_path / "new"),
        StoredStep(b"module", (registry.Choice("a", "b", "c"),)),
    )
    assert store.get("one") is None
    store.prune()
    for key in ("one", "two", "three"):
        store.put(key, step)
    for key in ("one", "two"):
        os.utime(tmp_path / "new" / f"{key}.step", (1, 1))
    assert store.get("one") == step  # which makes it young
    store.prune()
    assert {f.stem for f in (tmp_path / "new").iterdir()} == {"one", "three"}


def test_a_fallback_is_seen_although_nothing_is_traced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, inputs = a_source(platform="gpu", gpu=H200)
    inputs = jax.tree.map(lambda a: a.astype("float32") if a.dtype == "bfloat16" else a, inputs)
    caplog.set_level(logging.WARNING)
    for _ in range(2):  # although this process has said it before
        stored = source.export(SHAPE, inputs)
        assert {c.op for c in stored.choices if c.taken == "xla" and c.reasons} >= {"linear"}
    stored = from_bytes(to_bytes(stored))
    monkeypatch.setattr(registry, "_WARNED", set())
    caplog.clear()
    before = ops.choices()
    for _ in range(2):
        registry.replay(stored.choices)
    assert caplog.text.count("linear runs on 'xla': ") >= 1
    lines = [record.getMessage() for record in caplog.records]
    reasons = {(c.op, c.reasons) for c in stored.choices if c.reasons}
    assert len(lines) == len(set(lines)) == len(reasons)
    after, times = ops.choices(), Counter((c.op, c.taken) for c in stored.choices)
    assert all(after[key] - before[key] == 2 * n for key, n in times.items())


def test_another_gpu_has_no_kernels() -> None:
    source, inputs = a_source(platform="gpu", gpu=dataclasses.replace(H200, capability="8.0"))
    stored = source.export(SHAPE, inputs)
    assert {c.taken for c in stored.choices} == {"xla"}
    assert "compute capability 9.0, this GPU has 8.0" in stored.choices[0].reasons


def test_a_step_in_xla_of_heads_that_share_no_keys_is_kept() -> None:
    """Its attention asks XLA for layouts, by a call that `jax.export` refuses unless it is told."""
    _, executor = make_executor("mha", kernels=KernelConfig())
    source, _ = a_source(platform="gpu", gpu=dataclasses.replace(H200, capability="8.0"))
    source = dataclasses.replace(source, model=executor._model)
    stored = source.export(SHAPE, gpu_step(executor, SHAPE)[1])
    assert "LayoutConstraint" in export.deserialize(bytearray(stored.module)).mlir_module()


def test_the_sms_of_the_target_decide() -> None:
    source, inputs = a_source(platform="gpu", gpu=H200)
    sizes = {
        hashlib.sha256(part.export(SHAPE, inputs).module).hexdigest()
        for part in (source, dataclasses.replace(source, gpu=Gpu("NVIDIA H200", 66, "9.0")))
    }
    assert len(sizes) == 2


_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_NAMES = re.compile(r"%([\w.\-]+)")


def what_it_computes(hlo: str) -> tuple[Any, list[str]]:
    """Hashes of a program's outputs, whatever its instructions are called, and what it runs.

    Fusions are seen through: the order of their parameters and outputs is a name too.
    """
    bodies: dict[str, dict[str, str]] = {}
    entry = body = None
    for line in re.sub(r",? metadata=\{[^}]*\}", "", hlo).splitlines():
        if body is None:
            if head := _HEAD.match(line):
                body = bodies.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            body = None
        elif found := _LINE.match(line):
            body[found[2]] = found[3]
            if found[1]:
                body[""] = found[2]

    def outputs(computation: str, arguments: list[Any] | None) -> Any:
        body, known = bodies[computation], {}

        def value(name: str) -> Any:
            if name not in known:
                known[name] = compute(name, body[name])
            return known[name]

        def compute(name: str, text: str) -> Any:
            if found := re.search(r" parameter\((\d+)\)", text):
                at = int(found[1])
                return (at, text.split(" ")[0]) if arguments is None else arguments[at]
            if found := re.search(r" fusion\((.*?)\), .*calls=%?([\w.\-]+)", text):
                return outputs(found[2], [value(n) for n in _NAMES.findall(found[1])])
            if found := re.search(r"[)}\]] tuple\((.*?)\)", text):
                return [value(n) for n in _NAMES.findall(found[1])]
            if found := re.search(r" get-tuple-element\(%([\w.\-]+)\), index=(\d+)", text):
                whole = value(found[1])
                return whole[int(found[2])] if isinstance(whole, list) else f"{whole}{found[2]}"

            def meaning(found: re.Match[str]) -> str:
                other = found[1]
                if other in body and other != name:
                    return f"<{value(other)}>"
                return f"<{outputs(other, None)}>" if other in bodies else found[0]

            return hashlib.sha256(_NAMES.sub(meaning, text).encode()).hexdigest()

        return value(body[""])

    runs = re.compile(r"(?:\(.*?\)|\S+) (custom-call|fusion|copy|while|conditional)\(")
    found = [runs.match(text) for text in bodies[entry].values()]
    return outputs(entry, None), [one[1] for one in found if one]


@needs_wheels
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(SHAPE, id="decode"),
        pytest.param(StepShape(2, 0, 64, False), id="decode-sampling"),
        pytest.param(StepShape(2, 32, 64, False), id="mixed-sampling"),
    ],
)
def test_a_stored_step_compiles_to_the_same_program(
    shape: StepShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kernels to the byte, the same work between them, and the pages stay in place."""
    from jax.experimental.mosaic.gpu import core
    from jaxlib.mlir import ir

    serialise = core._run_serde_pass

    def without_names(module: Any, **options: Any) -> Any:
        """Kernels are numbered by process and hold the lines of Python that they come from."""
        with module.context:
            name = ir.StringAttr.get("kernel")
        module.operation.attributes["mosaic_gpu.dump_basename"] = name
        text = module.operation.get_asm(enable_debug_info=False)
        return serialise(ir.Module.parse(text, context=module.context), **options)

    monkeypatch.setattr(core, "_run_serde_pass", without_names)
    _, executor = make_executor("qwen3", layers=3)
    fn, inputs = gpu_step(executor, shape)
    options = {"donate": lowering.DONATED, "options": step_options(ONLY)}
    with ops.kernels_without_gpu(), ops.using(ONLY, "gpu"):
        direct = compile_for_h200(fn, inputs, **options).as_text()
    config = executor._config
    source = StepSource(
        executor._model, config.max_prefills_per_step, config.page_size, None, ONLY, "gpu", H200
    )
    module = export.deserialize(bytearray(source.export(shape, inputs).module))
    stored = compile_for_h200(
        lambda *inputs: module.call(*jax.tree.leaves(inputs)), inputs, **options
    ).as_text()
    assert stored.count("mosaic_gpu_v2") > 15
    assert what_it_computes(stored) == what_it_computes(direct)
    aliases = [re.search(r"input_output_alias=\{.*?\}, entry", hlo)[0] for hlo in (direct, stored)]
    assert aliases[0] == aliases[1]
    assert aliases[1].count("alias)") == 2 * 3 + 1  # pages of three layers, and the history
    pages = ",".join(map(str, executor.kv[0][0].shape))
    assert not re.search(rf"bf16\[{pages}\]\S* copy", stored)
