"""Llama 2, 3, 3.1 and later dense text models."""

from typing import Any

from jpd.models.config import ModelConfig, decoder_from_hf
from jpd.models.family import Family

NAMES: dict[str, tuple[str, ...]] = {
    "embed.weight": ("model.embed_tokens.weight",),
    "layers.{i}.attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.attention.qkv.weight": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.attention.qkv.bias": (
        "model.layers.{i}.self_attn.q_proj.bias",
        "model.layers.{i}.self_attn.k_proj.bias",
        "model.layers.{i}.self_attn.v_proj.bias",
    ),
    "layers.{i}.attention.out.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.attention.out.bias": ("model.layers.{i}.self_attn.o_proj.bias",),
    "layers.{i}.mlp_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.mlp.gate_up.weight": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.mlp.gate_up.bias": (
        "model.layers.{i}.mlp.gate_proj.bias",
        "model.layers.{i}.mlp.up_proj.bias",
    ),
    "layers.{i}.mlp.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
    "layers.{i}.mlp.down.bias": ("model.layers.{i}.mlp.down_proj.bias",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
"""Parameter path -> checkpoint names, stacked along axis 0 in this order."""


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """Reads a Llama `config.json`."""
    bias = config.get("attention_bias", False)
    return decoder_from_hf(
        config,
        "llama",
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=config.get("mlp_bias", False),
    )


FAMILY = Family("llama", ("LlamaForCausalLM",), from_hf, NAMES)
