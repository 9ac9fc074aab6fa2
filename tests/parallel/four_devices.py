"""Tensor parallelism on 4 host devices; `test_devices.py` runs it in a process of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jpd
from jpd import checkpoint, models, ops
from jpd.checkpoint import hf
from jpd.engine import lowering
from jpd.engine.build import Engine
from jpd.engine.executor import Executor
from jpd.engine.shapes import StepShape
from jpd.engine.stored_steps import FOLDER
from jpd.errors import ConfigError, EngineDeadError
from jpd.models.family import flatten
from jpd.ops import overlap, self_check
from jpd.ops.overlap import communicators
from jpd.ops.pallas import Gpu
from jpd.overlap import Plan, PlanTable, Tiling, Topology
from jpd.parallel import AXES, MESH_AXIS, RULES, ManyDevices, Split, placement
from jpd.types import RequestOutput, SamplingParams
from native.memory import allocate
from native.overlap import OverlapError
from pallas_kernels import mosaic
from tests import tiny_models
from tests.engine.kernel_model import kernel_config, kernel_model
from tests.engine.tiny_engine import (
    SIZES,
    drain,
    fresh,
    greedy,
    run,
    shapes_traced,
    tiny_engine,
    tokens,
)

CASES = {"llama_bias": (2, 4), "mistral_window": (2,), "qwen2": (4,), "qwen3_bias": (4,)}
"""One of each family, and on how many ranks: untied with every bias, a window, tied with biases of
qkv, head norms. Llama and Qwen2 have 2 KV heads: on 4 ranks each is on two of them."""
LLAMA = "llama_bias"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: tiny_models.make_checkpoint(name, place / name) for name in CASES}


def engine_of(folder: Path, ranks: int, **changes: Any) -> Engine:
    options = {"compilation_cache_dir": ""} | changes
    return tiny_engine(folder, tensor_parallel_size=ranks, **options)


@pytest.fixture(scope="module")
def llms(folders: dict[str, Path]) -> dict[int, jpd.LLM]:
    """Of the same model, by ranks."""
    options = {"skip_tokenizer_init": True, "show_progress": False, "compilation_cache_dir": ""}
    return {
        ranks: jpd.LLM(str(folders[LLAMA]), tensor_parallel_size=ranks, **options, **SIZES)
        for ranks in (1, 2)
    }


@pytest.fixture(scope="module")
def llama(llms: dict[int, jpd.LLM]) -> dict[int, Engine]:
    return {ranks: llm._engine for ranks, llm in llms.items()}


def requests(name: str) -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy and sampled; prompts longer than a step, half of them with a common beginning."""
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 12, "n": 2},
        {"temperature": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"temperature": 0},
    ]
    common = tiny_models.random_prompt(name, 40, stream=99)
    prompts, params = [], []
    for i in range(18):
        prompt = tiny_models.random_prompt(name, 5 + 7 * i % 64, stream=i)
        prompts.append(common[: 8 + i] + prompt[:40] if i % 2 else prompt)
        kind = kinds[i % len(kinds)]
        params.append(SamplingParams(**kind, seed=i, max_tokens=10 + i % 9, logprobs=i % 4))
    return prompts, params


def logprobs(outputs: list[RequestOutput]) -> np.ndarray:
    """Of the chosen tokens."""
    return np.array(
        [
            entry[token].logprob
            for output in outputs
            for completion in output.outputs
            for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    )


def assert_ranks_agree(engine: Engine) -> None:
    """Every rank wrote the same tokens into its history."""
    copies = [np.asarray(shard.data) for shard in engine.executor.history.addressable_shards]
    assert len(copies) == len(engine.executor.placement.devices)
    assert copies[0].any()
    for copy in copies[1:]:
        np.testing.assert_array_equal(copy, copies[0])


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logprobs_are_those_of_one_device(
    folders: dict[str, Path], llama: dict[int, Engine], name: str
) -> None:
    """With chunks, preemptions, shared prefixes, seeds, and a step in flight."""
    prompts, params = requests(name)
    built = llama if name == LLAMA else {}
    results = []
    for ranks in (1, *CASES[name]):
        engine = built.get(ranks) or engine_of(folders[name], ranks)
        coordinator = fresh(engine, num_pages=41)
        results.append(run(coordinator, prompts, params))
        assert_ranks_agree(engine)
        stats = coordinator.stats()
        assert stats.preemptions > 0
        assert stats.cached_tokens > 0
        assert engine.executor.compiled.recompiles == 0
    want, *others = results
    for got in others:
        assert tokens(got) == tokens(want)
        np.testing.assert_allclose(logprobs(got), logprobs(want), atol=1e-4)


def served(engine: Engine) -> list[list[list[int]]]:
    prompts, params = requests(LLAMA)
    return tokens(run(fresh(engine), prompts, params))


# ---- the tables


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("layers.{i}.attention.qkv.weight", (("kv_heads", "kv_heads", "heads"), "width")),
        ("layers.{i}.attention.qkv.bias", (("kv_heads", "heads", "kv_heads"),)),
    ],
)
def test_a_wrong_cut_gives_other_tokens(
    llama: dict[int, Engine], name: str, wrong: tuple[Any, ...]
) -> None:
    """Of the right size, so that only the tokens tell."""
    executor = llama[2].executor
    right, whole = executor.params, llama[1].executor.params
    split = Split(llama[2].model_config, 2, AXES | {name: wrong})
    executor.params = ManyDevices(split, jax.devices()[:2]).accept(whole)
    assert served(llama[2]) != served(llama[1])
    executor.params = right
    assert served(llama[2]) == served(llama[1])


def test_another_split_gives_the_same_tokens(
    folders: dict[str, Path], llama: dict[int, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the MLPs are cut."""
    for axis in ("vocab", "heads", "kv_heads"):
        monkeypatch.setitem(RULES, axis, None)
    engine = engine_of(folders[LLAMA], 2)
    assert served(engine) == served(llama[1])
    layer = engine.executor.params["layers"][0]
    assert layer["attention"]["qkv"]["weight"].is_fully_replicated
    assert not layer["mlp"]["down"]["weight"].is_fully_replicated
    assert engine.executor.kv[0][0].is_fully_replicated


# ---- the step


def test_sums_of_steps_with_prompt_tokens_go_through_the_op_that_overlaps(
    llama: dict[int, Engine],
) -> None:
    def summed(shape: StepShape) -> Counter[tuple[str, str]]:
        before = Counter(ops.choices())
        llama[2].executor._lower(shape)
        return Counter({k: n for k, n in ops.choices().items() if k[0] == "matmul_all_reduce"}) - (
            before
        )

    # Two layers, of attention and MLP each. On a CPU the op falls back, and says so.
    assert summed(StepShape(8, 32, 128, False)) == {("matmul_all_reduce", "xla"): 4}
    assert summed(StepShape(8, 0, 128, True)) == {}


def test_the_sum_over_ranks_is_chosen_like_other_ops(folders: dict[str, Path]) -> None:
    with pytest.raises(ExceptionGroup, match="no implementation of 'matmul_all_reduce'") as caught:
        engine_of(folders[LLAMA], 2, kernels=jpd.KernelConfig(matmul_all_reduce="overlap"))
    assert "GPUs can overlap, not 'cpu'" in str(caught.value.exceptions[0])
    with pytest.raises(ConfigError, match=r"kernels.matmul_all_reduce='psum' is not allowed: one"):
        jpd.KernelConfig(matmul_all_reduce="psum")


@pytest.mark.parametrize(("name", "ranks"), [("mistral_window", 2), ("qwen2", 4)])
def test_groups_of_tiles_give_the_same_tokens(
    folders: dict[str, Path], name: str, ranks: int
) -> None:
    """The overlapped op's own order of tiles, sent by XLA's collectives and read by the norms."""
    prompts, params = requests(name)
    one = engine_of(folders[name], 1)
    model = one.model_config
    tiling = Tiling(64, 128, 2, "n", "m", 2)
    shape = {"op": "all_reduce", "ranks": ranks, "m": 8 + 32, "n": model.hidden_size}
    how = {"overlap": True, "tiling": tiling, "sms": 1, "ctas": 1, "waves": (1,)}
    widths = (model.num_heads * model.head_dim // ranks, model.ffn_size // ranks)
    plans = PlanTable(Topology("none", "none", "none"), [Plan(**shape, k=k, **how) for k in widths])
    before = Counter(ops.choices())
    with overlap.using(implementation="grouped", plans=plans):
        engine = engine_of(folders[name], ranks)
    taken = Counter(ops.choices()) - before
    # Norms read the sums of decode steps too, which are not in tiles.
    assert 0 < taken["matmul_all_reduce", "grouped"] < taken["rms_norm_residual", "xla"]
    got, want = (run(fresh(served), prompts, params) for served in (engine, one))
    assert tokens(got) == tokens(want)


def test_a_block_is_seen_by_every_device_in_place() -> None:
    """Of a CPU, where DLPack names the first only."""
    block = allocate(1 << 12, "cpu")
    for dtype in ("float32", "bfloat16"):
        view = block.array(256, (8, 16), dtype)
        for device in jax.devices():
            array = block.jax_array(256, (8, 16), dtype, device)
            assert array.devices() == {device}
            assert array.unsafe_buffer_pointer() == view.ctypes.data
            assert array.dtype == view.dtype


def assert_in_place(executor: Executor) -> None:
    """Of pages and history no step has a second copy."""
    one = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(executor.kv)]
    for shape in executor.shapes.all():
        compiled = executor.compiled.get(shape, executor._lower)
        memory = compiled.memory_analysis()  # of one device
        assert memory.alias_size_in_bytes == sum(one) + executor.history.nbytes


def test_pages_are_cut_and_updated_in_place(llama: dict[int, Engine]) -> None:
    executor = llama[2].executor
    pages = executor.kv[0][0]
    assert pages.sharding.shard_shape(pages.shape)[2] == pages.shape[2] // 2 == 1
    assert_in_place(executor)

    def addresses() -> list[int]:
        arrays = [*jax.tree.leaves(executor.kv), executor.history]
        return [s.data.unsafe_buffer_pointer() for a in arrays for s in a.addressable_shards]

    before, coordinator = addresses(), fresh(llama[2])
    for i, prompt in enumerate(([7] * 50, [9, 8, 7], list(range(40)))):
        coordinator.add(str(i), None, prompt, greedy(max_tokens=10))
    drain(coordinator)
    assert addresses() == before


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A folder for compiled and lowered steps; an engine that has one changes jax's settings."""
    names = [name for name in jax.config.values if "cache" in name]
    before = {name: jax.config.values[name] for name in names}
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_lowered_steps_are_kept_and_other_processes_lower_them(
    folders: dict[str, Path],
    llama: dict[int, Engine],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = shapes_traced(monkeypatch)
    monkeypatch.setattr(lowering, "_processes", lambda source, shapes: min(2, shapes))
    for _ in range(2):
        engine = engine_of(folders[LLAMA], 2, compilation_cache_dir=str(cache))
        assert traced == []
        assert len(list((cache / FOLDER).iterdir())) == len(engine.executor.shapes.all())
    assert_in_place(engine.executor)
    assert served(engine) == served(llama[1])
    assert engine.executor.compiled.recompiles == 0


def test_what_holds_a_communicator_is_not_kept(
    llama: dict[int, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_steps = llama[2].executor._lowering()
    shapes = mixed, decode = StepShape(8, 32, 128, False), StepShape(8, 0, 128, True)
    rank_steps._look_at(shapes)
    kept = {shape: rank_steps._key(shape) for shape in shapes}
    assert None not in kept.values()
    with overlap.using(implementation="grouped"):
        assert rank_steps._key(mixed) is None
    monkeypatch.setattr(
        "jpd.engine.rank_lowering.communicators", lambda *arguments: {"tp": [object()]}
    )
    assert [rank_steps._key(shape) for shape in shapes] == [None, kept[decode]]
    source = rank_steps._source
    rank_steps._source = replace(source, kernels=jpd.KernelConfig(matmul_all_reduce="xla"))
    assert None not in map(rank_steps._key, shapes)


class OneFailure:
    """In place of a communicator: it fails when it is asked for the so-manieth time."""

    def __init__(self, at: int | None) -> None:
        self.at, self.asked, self.closed = at, 0, False

    def check(self) -> None:
        self.asked += 1
        if self.asked == self.at:
            raise OverlapError("all_reduce number 7 is not complete after 60 s")

    def close(self) -> None:
        self.closed = True


def test_tokens_of_a_step_whose_collective_failed_are_nobodys(folders: dict[str, Path]) -> None:
    """The failure fills sums with NaN and lets the step end: it fails when its result is read."""
    good, bad = OneFailure(None), OneFailure(2)
    with overlap.using(communicators={MESH_AXIS: [good, bad]}):
        engine = engine_of(folders[LLAMA], 2)
    coordinator = fresh(engine, async_scheduling=False)
    prompt = tiny_models.random_prompt(LLAMA, 80)  # three chunks
    output = coordinator.add("0", None, prompt, greedy(max_tokens=4))
    with pytest.raises(OverlapError, match="all_reduce number 7"):
        drain(coordinator)
    assert (good.asked, bad.asked) == (2, 2)
    assert coordinator.stats().steps == 2
    assert output.outputs[0].token_ids == []
    with pytest.raises(EngineDeadError, match="all_reduce number 7"):
        coordinator.step()
    # What happened stays readable, for whoever ends the engine then.
    bad.at = bad.asked + 1
    engine.executor.release()
    assert bad.asked == 2
    assert not good.closed, "it is the caller's"


def test_steps_without_sums_that_overlap_ask_no_communicator(folders: dict[str, Path]) -> None:
    asked = OneFailure(None)
    with overlap.using(communicators={MESH_AXIS: asked}):
        engine = engine_of(folders[LLAMA], 2)
    coordinator = fresh(engine)
    run(coordinator, [tiny_models.random_prompt(LLAMA, 40)], greedy(max_tokens=9))
    assert asked.asked == 2  # chunks of the prompt
    assert coordinator.stats().steps > 9


def test_an_executor_closes_the_communicators_that_were_made_for_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before the last of those on the same devices."""
    made = []

    def make(mesh: Mesh, axis: str, max_ctas: int) -> OneFailure:
        made.append(OneFailure(None))
        return made[-1]

    def planned(ranks: int, products: list[Any]) -> dict[Any, Any]:
        return {product: SimpleNamespace(ctas=16) for product in products}

    monkeypatch.setattr(communicators, "_MADE", {})
    monkeypatch.setattr(communicators, "_make", make)
    monkeypatch.setattr(communicators, "planned", planned)
    first, second = (engine_of(folders[LLAMA], 2) for _ in range(2))
    (only,) = made
    run(fresh(first), [tiny_models.random_prompt(LLAMA, 40)], greedy(max_tokens=2))
    assert only.asked > 2
    first.executor.release()
    assert not only.closed
    assert served(second)
    second.executor.release()
    assert only.closed


def test_a_rank_runs_the_kernels_on_its_part() -> None:
    """Lowered for GPUs: nothing but kernels, over one workspace, and the collectives."""
    model = kernel_model("Qwen3ForCausalLM", ffn_size=512)
    config = kernel_config(model)
    place = placement.place(Split(model, 2), jax.devices()[:2])
    params = place.accept(models.init_params(model, "bfloat16", 0))
    phi = np.ones((1, 4), np.float32)
    executor = Executor(config, model, params, jax.devices()[0], (), phi, placement=place)
    before = ops.choices()
    shape = StepShape(2, 32, 64, True)
    source = replace(
        executor._lowering()._source, platform="gpu", gpu=Gpu("NVIDIA H200", 132, "9.0")
    )
    inputs = executor.params, executor.kv, executor.history, *executor._host_inputs(shape, None)
    stored = source.export(shape, inputs)
    exported = export.deserialize(bytearray(stored.module))
    text = exported.mlir_module()
    assert exported.nr_devices == 2
    taken = {op for op, n in ops.choices().items() if n > before.get(op, 0)}
    kernels = {(op, "pallas") for op in ops.implementations()}
    assert taken == kernels | {("matmul_all_reduce", "xla"), ("rms_norm_residual", "pallas")}
    assert "mosaic_gpu_v2" in text
    assert len(re.findall(r"broadcast_in_dim .*-> tensor<32768xi32>", text)) == 1
    # The embedding, attention, MLP, and the count of recomputed rows; then the logits.
    assert text.count('"stablehlo.all_reduce"') == 4
    assert text.count('"stablehlo.all_gather"') == 1
    assert "stablehlo.dot_general" not in text


def test_kernels_run_inside_of_shard_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, over one workspace; on one rank, as the interpreter has one memory for all."""
    monkeypatch.setattr(mosaic, "sm_count", lambda: 2)
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    draw = np.random.default_rng(0).standard_normal
    x, weight = (jnp.asarray(draw(shape), jnp.bfloat16) for shape in ((8, 256), (256, 256)))
    ones = jnp.ones(256, jnp.bfloat16)

    def rank(x: jax.Array, weight: jax.Array) -> jax.Array:
        with ops.over_ranks(ops.Ranks("tp", {"ffn"}, overlap=False)), ops.workspace():
            return ops.rms_norm(ops.summed_linear(x, weight, over="ffn"), ones, 1e-5)

    specs = (P(None, "tp"), P(None, "tp"))
    ranked = jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    only = jpd.KernelConfig(pallas_only=True)
    with ops.kernels_without_gpu(plgpu.InterpretGPUParams()), ops.using(only, "gpu"):
        got = jax.jit(ranked)(x, weight)
    y = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    want = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.03)


def test_every_rank_is_checked_before_it_serves(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-check runs on every device, with that rank's own weights."""
    seen = []
    monkeypatch.setattr(Executor, "compile_ahead", lambda executor: None)

    def run_check(
        widths: Any, kernels: Any, products: Any, batches: Any, device: jax.Device
    ) -> list[str]:
        seen.append((device, widths.num_heads, {p.name: p.weight for p in products}))
        return []

    monkeypatch.setattr(self_check, "run", run_check)
    ops.register(
        "rms_norm", "mine", lambda x, w, eps: ops.rms_norm(x, w, eps, implementation="xla")
    )
    engine = engine_of(folders[LLAMA], 2, kernels=jpd.KernelConfig(rms_norm="mine"))
    assert [device for device, _, _ in seen] == jax.devices()[:2]
    gate_up = tiny_models.make_tensors("llama_bias")
    for rank, (device, heads, weights) in enumerate(seen):
        assert heads == 2
        assert all(w.devices() == {device} for w in weights.values())
        half = slice(80 * rank, 80 * rank + 80)
        names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
        want = np.concatenate([gate_up[name][half] for name in names])
        np.testing.assert_array_equal(weights["gate and up"], want)
    assert engine.config.tensor_parallel_size == 2


# ---- loading


def pairs(one: Any, other: Any) -> list[tuple[Any, jax.Array, jax.Array]]:
    """Path and leaves of two trees."""
    left, right = dict(flatten(one)), dict(flatten(other))
    assert set(left) == set(right)
    return [(path, left[path], right[path]) for path in left]


class Sent:
    """Counts what `device_put` and others bring to each device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: Counter[jax.Device] = Counter()
        self.largest = 0
        put = jax.device_put

        def counting(value: Any, place: Any = None, **options: Any) -> Any:
            array = put(value, place, **options)
            for shard in array.addressable_shards:
                self.bytes[shard.device] += shard.data.nbytes
                if array.ndim > 1:
                    self.largest = max(self.largest, shard.data.nbytes)
            return array

        monkeypatch.setattr(placement.jax, "device_put", counting)


@pytest.mark.parametrize("ranks", [2, 4])
def test_safetensors_go_to_the_ranks_part_by_part(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    name = "qwen2"
    model = checkpoint.read_config(folders[name])
    split = Split(model, ranks)
    read = Counter()
    real = hf.read_into

    def counting(tensor: Any, out: np.ndarray, on_bytes: Any) -> None:
        read[tensor.name] += tensor.nbytes
        real(tensor, out, on_bytes)

    monkeypatch.setattr(hf, "read_into", counting)
    place = ManyDevices(split, jax.devices()[:ranks])
    sent = Sent(monkeypatch)
    _, params = checkpoint.load(folders[name], placement=place, show_progress=False)
    # No device was ever sent more than its parts, and the host read everything once.
    each = checkpoint.param_bytes(split.rank_model, "float32")
    assert dict(sent.bytes) == dict.fromkeys(place.devices, each)
    leaves = dict(flatten(models.abstract_params(model, "float32")))
    assert sent.largest == max(
        leaf.size * 4 // ranks for path, leaf in leaves.items() if split.cut(path)
    )
    stored = tiny_models.make_tensors(name)
    assert read == {tensor: array.nbytes for tensor, array in stored.items()}
    assert_parts(split, params, stored)


def assert_parts(split: Split, params: Any, stored: dict[str, np.ndarray]) -> None:
    """Of a layer, by Hugging Face's names: what each rank must have, written out."""
    model, ranks, prefix = split.model, split.ranks, "model.layers.1."
    size, group = model.head_dim, model.num_heads // model.num_kv_heads
    heads, channels = model.num_heads // ranks, model.ffn_size // ranks
    layer = params["layers"][1]
    for rank in range(ranks):
        first = rank * heads
        kv = sorted({h // group for h in range(first, first + heads)})
        rows = [np.arange(h * size, h * size + size) for h in kv]
        kv_rows = np.concatenate(rows)
        own = slice(first * size, (first + heads) * size)
        half = slice(rank * channels, (rank + 1) * channels)
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        for what in ("weight", "bias"):
            want = [stored[f"{attention}q_proj.{what}"][own]]
            want += [stored[f"{attention}{part}_proj.{what}"][kv_rows] for part in "kv"]
            got = layer["attention"]["qkv"][what].addressable_shards[rank].data
            np.testing.assert_array_equal(got, np.concatenate(want))
        for got, want in (
            (layer["attention"]["out"], stored[f"{attention}o_proj.weight"][:, own]),
            (layer["mlp"]["down"], stored[f"{mlp}down_proj.weight"][:, half]),
            (
                layer["mlp"]["gate_up"],
                np.concatenate([stored[f"{mlp}{p}_proj.weight"][half] for p in ("gate", "up")]),
            ),
        ):
            np.testing.assert_array_equal(got["weight"].addressable_shards[rank].data, want)


@pytest.mark.parametrize("ranks", [2, 4])
def test_orbax_and_dummy_weights_are_cut_too(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    name = "qwen2"
    config, whole = checkpoint.load(folders[name], show_progress=False)
    checkpoint.save_orbax(config, whole, tmp_path / "orbax", folders[name])
    split = Split(config, ranks)
    place = ManyDevices(split, jax.devices()[:ranks])
    # In no order is a tensor that is cut whole on a device.
    for path, leaf in flatten(whole):
        part = place.in_checkpoint_order(path, leaf.shape).shard_shape(leaf.shape)
        if split.cut(path) and leaf.ndim > 1:
            assert np.prod(part) * ranks == leaf.size
    _, direct = checkpoint.load(folders[name], placement=place, show_progress=False)
    _, restored = checkpoint.load(tmp_path / "orbax", placement=place)
    for path, got, want in pairs(restored, direct):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim), path
        np.testing.assert_array_equal(got, want)

    _, dummy = checkpoint.load(folders[name], load_format="dummy", placement=place)
    for path, got, want in pairs(dummy, direct):
        assert got.shape == want.shape
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim), path
    gate_up = np.asarray(place.show(dummy)["layers"][0]["mlp"]["gate_up"]["weight"])
    assert gate_up.std() == pytest.approx(config.hidden_size**-0.5, rel=0.05)
    assert len(np.unique(gate_up)) > 0.99 * gate_up.size  # no rank draws what another drew


# ---- the parameters as users see them


@pytest.mark.parametrize("ranks", [2, 4])
def test_params_are_shown_in_the_order_of_one_device(llama: dict[int, Engine], ranks: int) -> None:
    whole, model = llama[1].executor.params, llama[1].model_config
    place = ManyDevices(Split(model, ranks), jax.devices()[:ranks])
    shown = place.show(place.accept(whole))
    for path, got, want in pairs(shown, whole):
        np.testing.assert_array_equal(got, want, err_msg=str(path))
        if got.ndim > 1:
            assert got.addressable_shards[0].data.nbytes * ranks == got.nbytes
    logits = [models.logits(model, params, range(30)) for params in (shown, whole)]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_params_can_be_read_and_assigned(llms: dict[int, jpd.LLM]) -> None:
    prompt, params = list(range(40, 80)), greedy(max_tokens=12)

    def answer(ranks: int) -> list[int]:
        output = llms[ranks].generate({"prompt_token_ids": prompt}, params)[0]
        return output.outputs[0].token_ids

    old, first = llms[1].params, answer(2)
    assert first == answer(1)
    for path, got, want in pairs(llms[2].params, old):
        np.testing.assert_array_equal(got, want, err_msg=str(path))
    for llm in llms.values():
        llm.params = jax.tree.map(lambda a: -np.asarray(a), old)
    assert answer(2) == answer(1) != first
    llms[2].params = old  # arrays that lie on one device
    assert answer(2) == first
    llms[2].params = llms[2].params
    assert answer(2) == first
    llms[1].params = old
    with pytest.raises(ConfigError, match="must have the structure, shapes and dtypes"):
        llms[2].params = jax.tree.map(lambda a: a[..., :-1], old)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (3, "tensor_parallel_size=3 is not allowed: it must divide .* num_attention_heads=4"),
        (5, "tensor_parallel_size=5 is not allowed: at most 4, the number of cpu devices"),
    ],
)
def test_what_cannot_be_served(folders: dict[str, Path], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(folders[LLAMA], ranks)
