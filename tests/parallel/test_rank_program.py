"""The step of two ranks as XLA compiles it for GPUs, of which none is needed."""

from __future__ import annotations

import re

import jax
import pytest
from jax import export

from jpd.config import EngineConfig, KernelConfig
from jpd.engine.build import resolve
from jpd.engine.compile import step_options
from jpd.engine.executor import Executor
from jpd.engine.lowering import DONATED, StepSource
from jpd.engine.rank_step import input_shardings
from jpd.engine.shapes import StepShape
from jpd.models import config_from_hf, init_params
from jpd.ops.pallas import Gpu
from jpd.parallel import MESH_AXIS, Split
from tests.aot import compile_for_h200, needs_wheels

ONLY = KernelConfig(pallas_only=True)
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@needs_wheels
@pytest.mark.parametrize("tokens", [0, 32], ids=["decode", "mixed"])
def test_pages_stay_in_place_and_products_are_of_kernels(tokens: int) -> None:
    model = config_from_hf(MODEL)
    config = EngineConfig(
        model="",
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        num_pages=901,
        batch_buckets=(2,),
        token_buckets=(32,),
        context_buckets=(64,),
        kernels=ONLY,
    )
    config = resolve(config, model, on_cpu=True)
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
        ONLY,
        "gpu",
        Gpu("NVIDIA H200", 132, "9.0"),
        split=split,
    )
    module = export.deserialize(bytearray(source.export(shape, inputs).module))
    compiled = compile_for_h200(
        lambda *inputs: module.call(*jax.tree.leaves(inputs)),
        inputs,
        donate=DONATED,
        options=step_options(ONLY),
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
