"""The step of two ranks as XLA compiles it for GPUs, of which none is needed."""

from __future__ import annotations

import re

import jax
import pytest
from jax import export

from jpd.engine.compile import step_options
from jpd.engine.executor import Executor
from jpd.engine.lowering import DONATED, StepSource
from jpd.engine.rank_step import input_shardings
from jpd.engine.shapes import StepShape
from jpd.models import init_params
from jpd.ops.pallas import Gpu
from jpd.parallel import MESH_AXIS, Split
from tests.aot import compile_for_h200, needs_wheels
from tests.engine.kernel_model import kernel_config, kernel_model


@needs_wheels
@pytest.mark.parametrize("tokens", [0, 32], ids=["decode", "mixed"])
def test_pages_stay_in_place_and_products_are_of_kernels(tokens: int) -> None:
    model = kernel_model("Qwen3ForCausalLM", ffn_size=512, layers=2)
    config = kernel_config(model, num_pages=901)
    shape, device = StepShape(2, tokens, 64, False), jax.devices("cpu")[0]
    # The arrays of all ranks together are as large as those of one that has all.
    one = Executor(config, model, init_params(model, "bfloat16", 0), device, ())
    inputs = one.params, one.kv, one.history, *one._host_inputs(shape, None)
    split = Split(model, 2)
    source = StepSource(
        split.rank_model,
        config.max_prefills_per_step,
        config.page_size,
        None,
        config.kernels,
        "gpu",
        Gpu("NVIDIA H200", 132, "9.0"),
        split=split,
    )
    module = export.deserialize(bytearray(source.export(shape, inputs).module))
    compiled = compile_for_h200(
        lambda *inputs: module.call(*jax.tree.leaves(inputs)),
        inputs,
        donate=DONATED,
        options=step_options(config.kernels),
        mesh=(2, MESH_AXIS),
        specs=jax.tree.map(lambda sharding: sharding.spec, input_shardings(split, inputs)),
    )
    hlo = compiled.as_text()
    aliases = re.search(r"input_output_alias=\{.*?\}, entry", hlo)[0]
    assert aliases.count("alias)") == 2 * 2 + 1  # pages of two layers, and the history
    half = sum(leaf.nbytes for leaf in jax.tree.leaves(one.kv)) // 2
    assert compiled.memory_analysis().alias_size_in_bytes == half + one.history.nbytes
    assert not re.search(r"= bf16\[901,[^=]* copy", hlo), "a copy of pages"
    assert not re.search("__(cublas|cudnn|triton)", hlo)
    assert hlo.count("mosaic_gpu_v2") > 10
