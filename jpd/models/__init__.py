"""Model families, and the forward pass of a whole sequence.

To add a family: one file with a `FAMILY` (see `llama.py`), and its name in `_FAMILIES` below.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jpd import ops
from jpd.config import KernelConfig
from jpd.errors import ConfigError
from jpd.layers.attention import causal_attend
from jpd.models import llama, mistral, qwen2, qwen3
from jpd.models.config import ModelConfig
from jpd.models.decoder import Params, abstract_params, bind, init_params
from jpd.models.family import Family

__all__ = [
    "DENSE_KERNELS",
    "Family",
    "ModelConfig",
    "Params",
    "abstract_params",
    "bind",
    "config_from_hf",
    "family_of",
    "init_params",
    "logits",
]

_FAMILIES = {m.FAMILY.name: m.FAMILY for m in (llama, mistral, qwen2, qwen3)}


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Reads a parsed `config.json`.

    Raises:
      ConfigError: no known architecture, or an option that the family does not support.
    """
    names = config.get("architectures") or []
    for family in _FAMILIES.values():
        if set(names) & set(family.architectures):
            if config.get("quantization_config"):
                raise ConfigError("quantization_config: quantised checkpoints are not supported")
            return family.from_hf(config)
    known = ", ".join(a for f in _FAMILIES.values() for a in f.architectures)
    raise ConfigError(f"architectures={names!r} is not supported; known: {known}")


def family_of(config: ModelConfig) -> Family:
    """The family that a config was read by."""
    return _FAMILIES[config.family]


DENSE_KERNELS = KernelConfig(linear="xla", gated_linear="xla", rms_norm="xla")
"""The implementations that have gradients: what a model without an engine runs on."""


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    attend = causal_attend(config)
    with ops.using(DENSE_KERNELS):
        return bind(config, params)(tokens, jnp.arange(tokens.shape[0]), attend)


def logits(config: ModelConfig, params: Params, tokens: Any) -> jax.Array:
    """Logits `[T, V]` float32 of one whole sequence of token ids `[T]`, without a KV cache.

    Every op is XLA's, so that gradients exist.
    """
    return _logits(config, params, jnp.asarray(tokens, jnp.int32))
