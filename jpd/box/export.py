"""Writes a model as a Hugging Face folder: `LlamaForCausalLM` with a fast tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save as serialize
from tokenizers import Tokenizer

from jpd.box.corpus import BOS, BOS_ID, EOS, EOS_ID
from jpd.models import ModelConfig, Params, family_of
from jpd.models.family import checkpoint_names, flatten

# The model has only seen novels, so a conversation is written as one: each message a paragraph.
# It then goes on with the next paragraphs, which role markers it has never seen would not give.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['content'] | trim }}{{ '\\n\\n' }}{% endfor %}"
)


def hf_config(
    *,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn_size: int,
    max_position: int,
) -> dict[str, Any]:
    """`config.json` of a Llama with tied embeddings; RoPE base 10 000 in both spellings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": ffn_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_position,
        "rope_theta": 10_000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "dtype": "bfloat16",
    }


def checkpoint_tensors(config: ModelConfig, params: Params) -> dict[str, jax.Array]:
    """Parameters under their checkpoint names in bfloat16; what jpd stacks is split again."""
    tensors = {}
    for path, leaf in flatten(params):
        names = checkpoint_names(family_of(config), path)
        sizes = [leaf.shape[0] // len(names)] * len(names)
        if "qkv" in path:
            heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
            sizes = [h * config.head_dim for h in heads]
        parts = jnp.split(leaf.astype(jnp.bfloat16), np.cumsum(sizes[:-1]))
        tensors.update(zip(names, parts, strict=True))
    return tensors


def save(folder: Path, hf: dict[str, Any], tensors: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Writes config, weights, tokenizer and generation defaults to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = serialize(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    files = {
        "config.json": hf,
        "generation_config.json": {**ids, "do_sample": True, "temperature": 0.8, "top_p": 0.95},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": hf["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
