"""Qwen2 and Qwen2.5: biases on the q, k and v projections, a window on the upper layers."""

from typing import Any

from jpd.models.config import ModelConfig, decoder_from_hf, sliding_layers
from jpd.models.family import Family
from jpd.models.llama import NAMES


def qwen_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide, if `use_sliding_window` says so."""
    layers = config["num_hidden_layers"]
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    first = config.get("max_window_layers")
    return sliding_layers(config, from_layer=layers if first is None else min(first, layers))


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """Reads a Qwen2 `config.json`; what it leaves out is as in transformers."""
    config = {"num_key_value_heads": 32, "sliding_window": 4096} | config
    return decoder_from_hf(
        config,
        "qwen2",
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=True,
        windows=qwen_windows(config),
    )


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), from_hf, NAMES)
