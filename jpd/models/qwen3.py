"""Qwen3 (dense): a norm on every query and key head in place of the biases."""

from typing import Any

from jpd.models.config import ModelConfig, decoder_from_hf
from jpd.models.family import Family
from jpd.models.llama import NAMES as LLAMA_NAMES
from jpd.models.qwen2 import qwen_windows

NAMES = LLAMA_NAMES | {
    "layers.{i}.attention.q_norm.weight": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.attention.k_norm.weight": ("model.layers.{i}.self_attn.k_norm.weight",),
}


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """Reads a Qwen3 `config.json`; what it leaves out is as in transformers."""
    config = {"num_key_value_heads": 32, "sliding_window": 4096} | config
    bias = config.get("attention_bias", False)
    return decoder_from_hf(
        config | {"head_dim": config.get("head_dim") or 128},
        "qwen3",
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=qwen_windows(config),
    )


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), from_hf, NAMES)
