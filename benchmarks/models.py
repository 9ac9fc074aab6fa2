"""The model shapes that benchmarks use, and the least work that one decode step of them needs.

Every implementation builds its model from these fields and is held against the same cost, so rows
of one case are comparable. Weights are random: none of these files comes from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Fields as in the models' published config.json.
MODELS: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "llama31-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "llama3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    # For trying a benchmark out on a GPU: small, of sizes that the kernels take.
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    # For trying a benchmark out on a CPU; its times mean nothing.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}


class Cost(NamedTuple):
    """Fewest bytes through device memory, and arithmetic operations."""

    nbytes: int
    flops: int


def case_name(model: str, batch: int, context: int) -> str:
    """Name of a decode case in result rows."""
    return f"{model} B={batch} S={context}"


def decode_cost(
    config: Mapping[str, Any], batch: int, context_tokens: int, *, bytes_per_value: int = 2
) -> Cost:
    """Least work of one decode step: one new token for each of `batch` sequences.

    Every weight is read once, of the embedding table only the rows of the step's tokens; the keys
    and values of `context_tokens` tokens are read and one token's are written. Activations (some
    hundred kB) are left out. A multiply-add counts as two operations.

    Args:
        config: an entry of :data:`MODELS`.
        batch: sequences in the step.
        context_tokens: tokens that each sequence attends to, the new one included.
        bytes_per_value: of weights and KV alike; 2 for bfloat16.
    """
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = width // heads
    attention = 2 * width * heads * head_size + 2 * width * kv_heads * head_size
    matrices = layers * (attention + 3 * width * config["intermediate_size"])
    matrices += width * config["vocab_size"]
    norms = (2 * layers + 1) * width
    kv_per_token = 2 * layers * kv_heads * head_size
    values = matrices + norms + batch * (width + kv_per_token * context_tokens)
    flops = 2 * batch * matrices + 4 * batch * context_tokens * layers * heads * head_size
    return Cost(values * bytes_per_value, flops)
