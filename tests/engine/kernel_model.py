"""A tiny model whose widths every kernel takes, and an engine's options for it."""

from __future__ import annotations

from typing import Any

from jpd.config import EngineConfig, KernelConfig
from jpd.engine.build import resolve
from jpd.models import config_from_hf
from jpd.models.config import ModelConfig


def kernel_model(architecture: str, ffn_size: int, layers: int = 1, **changes: Any) -> ModelConfig:
    """Four query heads of 64, two KV heads.

    Args:
        architecture: as Hugging Face names it.
        ffn_size: FFN channels; 512 can be split over two ranks.
        layers: how many.
        changes: more of `config.json`.
    """
    return config_from_hf(
        {
            "architectures": [architecture],
            "hidden_size": 128,
            "intermediate_size": ffn_size,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 256,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            **changes,
        }
    )


def kernel_config(model: ModelConfig, **changes: Any) -> EngineConfig:
    """Two sequences, steps of 32 tokens, a handful of pages; resolved."""
    options: dict[str, Any] = {
        "model": "",
        "dtype": "bfloat16",
        "max_model_len": 64,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 32,
        "num_pages": 9,
        "batch_buckets": (2,),
        "token_buckets": (32,),
        "context_buckets": (64,),
        "kernels": KernelConfig(pallas_only=True),
    }
    return resolve(EngineConfig(**options | changes), model, on_cpu=True)
