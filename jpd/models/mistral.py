"""Mistral: Llama with a sliding window."""

from typing import Any

from jpd.models.config import ModelConfig, decoder_from_hf, sliding_layers
from jpd.models.family import Family
from jpd.models.llama import NAMES


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """Reads a Mistral `config.json`; what it leaves out is as in transformers."""
    config = {"num_key_value_heads": 8, "sliding_window": 4096} | config
    return decoder_from_hf(
        config,
        "mistral",
        tie_embeddings=config.get("tie_word_embeddings", False),
        windows=sliding_layers(config, from_layer=0),
    )


FAMILY = Family("mistral", ("MistralForCausalLM",), from_hf, NAMES)
