"""Whole steps on the Pallas kernels: interpreted on the CPU, and lowered for a GPU.

The model is tiny but has widths that every kernel takes.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from jpd import ops
from jpd.config import EngineConfig, KernelConfig
from jpd.engine.compile import step_options
from jpd.engine.coordinator import Coordinator
from jpd.engine.executor import Executor
from jpd.engine.shapes import StepShape
from jpd.engine.step import step
from jpd.errors import ConfigError
from jpd.models import init_params
from jpd.semi_pd.page_push import PushProgress
from native.kv_push import link
from pallas_kernels import dataflow, gemv, mosaic
from tests.aot import compile_for_h200, needs_wheels
from tests.engine.kernel_model import kernel_config, kernel_model
from tests.engine.tiny_engine import greedy, one_executor, run

ONLY = KernelConfig(pallas_only=True)
FAMILIES = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "mha": {"architecture": "LlamaForCausalLM", "num_key_value_heads": 4},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 24},
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True},
}


def make_executor(
    family: str = "llama", kernels: KernelConfig = ONLY, dtype: str = "bfloat16", layers: int = 1
) -> tuple[EngineConfig, Executor]:
    """An executor of a random model with a handful of pages."""
    device = jax.devices("cpu")[0]
    model = kernel_model(ffn_size=256, layers=layers, **FAMILIES[family])
    config = kernel_config(
        model,
        dtype=dtype,
        max_prefills_per_step=2,
        show_progress=False,
        skip_tokenizer_init=True,
        kernels=kernels,
    )
    # Larger weights than a new model's, so that the layer changes what the embedding says.
    params = jax.tree.map(lambda p: 5 * p if p.ndim > 1 else p, init_params(model, dtype, 0))
    return config, Executor(config, model, params, device, ())


def run_op_by_op(executor: Executor) -> None:
    """Steps are not compiled: interpreted kernels of one program may wait for the same threads."""
    config, chunks = executor._config, executor._config.max_prefills_per_step

    def get(shape: StepShape, lower: object) -> Any:
        def run_step(*inputs: Any) -> Any:
            inputs = jax.tree.map(jnp.asarray, inputs)
            with ops.using(config.kernels, "cpu"):
                return step(
                    executor._model, shape, chunks, config.page_size, *inputs, phi=executor._phi
                )

        return run_step

    executor.compiled.get = get


def serve(config: EngineConfig, executor: Executor) -> tuple[list[dict[int, float]], Coordinator]:
    """Log-probabilities of every token that two requests get, and the coordinator."""
    coordinator = Coordinator(config, executor._model, one_executor(config, executor), None, ())
    prompts = [list(range(3, 23)), [9, 8, 7]]
    params = greedy(max_tokens=2, ignore_eos=True, logprobs=5)
    outputs = run(coordinator, prompts, params)
    return [entry for o in outputs for entry in o.outputs[0].logprobs], coordinator


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Persistent kernels start a block for each SM; interpreted ones take turns."""
    monkeypatch.setattr(mosaic, "sm_count", lambda: 2)


@pytest.mark.usefixtures("few_blocks")
def test_serving_on_interpreted_kernels_gives_what_xla_gives() -> None:
    family = "qwen3"  # the one with head norms
    before = ops.choices()
    config, executor = make_executor(family)
    run_op_by_op(executor)
    with ops.kernels_without_gpu(plgpu.InterpretGPUParams()):
        got, coordinator = serve(config, executor)
    after = ops.choices()
    taken = {key for key, n in after.items() if n > before.get(key, 0)}
    assert taken == {(op, "pallas") for op in ops.implementations()}
    assert coordinator.stats().softmax_recomputed_rows == 0
    want, _ = serve(*make_executor(family, KernelConfig()))
    assert len(got) == len(want) == 4
    for one, other in zip(got, want, strict=True):
        shared = set(one) & set(other)
        assert len(shared) >= 4
        for token in shared:
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=0.1)


@pytest.mark.usefixtures("few_blocks")
def test_recomputed_rows_reach_the_stats() -> None:
    """A phi far from all scores: each row of each decoding step is computed again."""
    config, executor = make_executor("qwen2")
    want, _ = serve(*make_executor("qwen2", KernelConfig()))
    executor._phi = np.full((1, 4), 500.0, np.float32)
    run_op_by_op(executor)
    with ops.kernels_without_gpu(plgpu.InterpretGPUParams()):
        got, coordinator = serve(config, executor)
    # Two requests decode one of their two tokens, in a layer with two key heads.
    assert coordinator.stats().softmax_recomputed_rows == 2 * 2
    assert [max(e, key=lambda t: e[t].logprob) for e in got] == [
        max(e, key=lambda t: e[t].logprob) for e in want
    ]


def gpu_step(executor: Executor, shape: StepShape) -> tuple[Any, tuple[Any, ...]]:
    """The function of a step and its arguments."""
    config = executor._config
    fn = partial(step, executor._model, shape, config.max_prefills_per_step, config.page_size)
    inputs = (executor.params, executor.kv, executor.history)
    return fn, inputs + executor._host_inputs(shape, None)


def lowered_for_gpu(executor: Executor, shape: StepShape) -> Any:
    """The step of a shape, as it is lowered on a machine with a GPU."""
    fn, inputs = gpu_step(executor, shape)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)
    with ops.kernels_without_gpu(), ops.using(executor._config.kernels, "gpu"):
        traced = jax.jit(fn, donate_argnums=(1, 2)).trace(*abstract)
        return traced.lower(lowering_platforms=("cuda",))


SHAPES = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(StepShape(2, 0, 64, True), id="decode"),
        pytest.param(StepShape(2, 0, 64, False), id="decode-sampling"),
        pytest.param(StepShape(2, 32, 64, False), id="mixed-sampling"),
    ],
)
_FOREIGN = re.compile(r"cublas|cudnn|triton|gemm_fusion", re.IGNORECASE)
_PRODUCT = re.compile(r"stablehlo\.(dot_general|dot|convolution)\b")


def foreign_calls(text: str) -> Counter[str]:
    """Calls of libraries, and products that XLA would make into such, in lowered StableHLO."""
    targets = re.findall(r"custom_call @([\w.]+)", text)
    assert "mosaic_gpu_v2" in targets, "this is no step that the test can read"
    found = Counter(t for t in targets if _FOREIGN.search(t))
    return found + Counter(_PRODUCT.findall(text))


@SHAPES
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_holds_a_call_of_another_library(family: str, shape: StepShape) -> None:
    _, executor = make_executor(family)
    assert foreign_calls(lowered_for_gpu(executor, shape).as_text()) == {}


@needs_wheels
@SHAPES
def test_the_compiled_step_is_a_chain_of_kernels(shape: StepShape) -> None:
    """No library, no Triton, no copy of a page, and nothing of XLA's between a layer's kernels."""
    _, executor = make_executor("qwen3", layers=3)
    fn, inputs = gpu_step(executor, shape)
    with ops.kernels_without_gpu(), ops.using(ONLY, "gpu"):
        options = step_options(ONLY)
        text = compile_for_h200(fn, inputs, donate=(1, 2), options=options).as_text()
    text = re.sub(r'module = "[^"]*"', "", text)  # the kernels' own code
    # Norm, product, rotation, attention, product, norm, two products; prompts have attention of
    # their own. Last come a norm and the logits.
    in_layer = 8 + (shape.tokens > 0 and shape.batch > 0)
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 3 * in_layer + 2
    assert not _FOREIGN.search(text)
    assert not re.search(r"= \S+ (dot|convolution)\(", text)
    pages = ",".join(map(str, executor.kv[0][0].shape))
    assert not re.search(rf"bf16\[{pages}\]\S* copy", text)
    if shape.tokens == 0:
        entry = text[text.index("ENTRY") :]
        run = re.findall(r"^\s+(?:ROOT )?\S+ = .*? (fusion|custom-call|copy|while)\(", entry, re.M)
        # Of the second layer, from before its last kernels to before the third's.
        kernels = [i for i, kind in enumerate(run) if kind == "custom-call"]
        assert kernels[14] - kernels[6] == 8, run


@needs_wheels
def test_products_of_one_row_take_the_norms_of_layers_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choose(m: int, n: int, k: int, *, gated: bool = False, **_: Any) -> dataflow.Choice:
        assert m == 1
        return dataflow.Choice("gemv", gemv.default(m, n // (1 + gated), k, gated), "table")

    monkeypatch.setattr(dataflow, "choose", choose)
    _, executor = make_executor("qwen3", layers=3)
    fn, inputs = gpu_step(executor, StepShape(1, 0, 64, True))
    with ops.kernels_without_gpu(), ops.using(ONLY, "gpu"):
        options = step_options(ONLY)
        text = compile_for_h200(fn, inputs, donate=(1, 2), options=options).as_text()
    text = re.sub(r'module = "[^"]*"', "", text)
    # Product, rotation, attention, three products; last come a norm and the logits.
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 3 * 6 + 2


@needs_wheels
def test_a_step_that_sends_its_pages_says_so_between_the_kernels_of_a_layer() -> None:
    shape = StepShape(2, 32, 64, True)
    _, executor = make_executor("qwen3", layers=3)
    fn, inputs = gpu_step(executor, shape)
    fn = partial(fn, progress=PushProgress())

    def with_targets(*inputs: Any) -> Any:
        link._library()  # here: the platform, made by compile_for_h200, must be there before
        return fn(*inputs)

    with ops.kernels_without_gpu(), ops.using(ONLY, "gpu"):
        options = step_options(ONLY)
        compiled = compile_for_h200(with_targets, inputs, donate=(1, 2), options=options)
    text = re.sub(r'module = "[^"]*"', "", compiled.as_text())
    pages = ",".join(map(str, executor.kv[0][0].shape))
    assert not re.search(rf"bf16\[{pages}\]\S* copy", text)
    targets = re.findall(r'custom_call_target="(\w+)"', text)
    told = [i for i, target in enumerate(targets) if target == "jpd_kv_filled"]
    assert len(told) == 3
    # Behind the product and the write of a layer, in front of its attention.
    assert targets[: told[0]].count("mosaic_gpu_v2") >= 2
    for begin, end in zip(told, [*told[1:], len(targets)], strict=True):
        assert targets[begin + 1 : end].count("mosaic_gpu_v2") >= 4
    assert targets[-1] == "jpd_kv_ended"


def test_the_reader_sees_what_xla_would_do() -> None:
    _, executor = make_executor(kernels=KernelConfig(gated_linear="xla", linear="pallas"))
    text = lowered_for_gpu(executor, StepShape(2, 0, 64, True)).as_text()
    assert foreign_calls(text) == {"dot_general": 1}


def test_a_step_clears_its_counters_once() -> None:
    """All kernels that count arrivals share one workspace, however many layers there are."""
    shape = StepShape(2, 0, 64, True)
    counts = []
    for layers in (1, 3):
        _, executor = make_executor(layers=layers)
        text = lowered_for_gpu(executor, shape).as_text()
        counts.append(len(re.findall(r"broadcast_in_dim .*-> tensor<32768xi32>", text)))
    assert counts == [1, 1]


def test_float32_has_no_kernels() -> None:
    _, executor = make_executor(dtype="float32")
    with pytest.raises(ConfigError, match=r"pallas_only=True, but no kernel takes \w+\(float32\["):
        lowered_for_gpu(executor, StepShape(2, 0, 64, True))


def test_without_a_gpu_kernels_are_refused_or_passed_over() -> None:
    config, executor = make_executor()
    with pytest.raises(ConfigError, match="the kernels run on GPUs, not on 'cpu'"):
        executor._lower(StepShape(2, 0, 64, True))
    with pytest.raises(ConfigError, match=r"kernels.rms_norm='xla' contradicts"):
        ops.check(KernelConfig(pallas_only=True, rms_norm="xla"))
    assert not ops.may_run(KernelConfig(), "cpu")
    assert config.kernels.pallas_only


def test_steps_with_kernels_are_compiled_for_overlapping_launches() -> None:
    _, plain = make_executor(kernels=KernelConfig())
    with ops.kernels_without_gpu():
        _, kernels = make_executor()
        _, without = make_executor(
            kernels=KernelConfig(**dict.fromkeys(ops.implementations(), "xla"))
        )
    assert plain.compiled._options is None
    assert without.compiled._options is None
    assert kernels.compiled._options == step_options(ONLY)
    assert kernels.compiled._options["xla_gpu_enable_command_buffer"] == ""
