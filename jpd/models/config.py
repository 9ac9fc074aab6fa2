"""What a decoder model is made of, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jpd.errors import ConfigError
from jpd.layers.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and options of a decoder; every family maps its `config.json` to this."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope: RopeConfig
    max_position: int
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """Tokens each layer sees back, the token itself counted; None is all."""
    dtype: str = "bfloat16"
    """Type of the checkpoint's weights."""
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def rope_from_hf(config: dict[str, Any]) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) and `rope_theta`, `rope_scaling` (before; they win).

    Raises:
      ConfigError: a scaling that jpd does not know.
    """
    scaling = (config.get("rope_parameters") or {}) | (config.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"rope_type={kind!r} is not supported: default, linear, llama3")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    fields = {
        "factor": scaling.get("factor"),
        "low_freq_factor": scaling.get("low_freq_factor"),
        "high_freq_factor": scaling.get("high_freq_factor"),
        "original_max_position": config.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings")
        or config.get("max_position_embeddings"),
    }
    given = {k: v for k, v in fields.items() if v is not None}
    needed = {"default": (), "linear": ("factor",), "llama3": tuple(fields)}[kind]
    missing = [k for k in needed if k not in given]
    if missing:
        raise ConfigError(f"rope_type={kind!r} needs {', '.join(missing)}")
    return RopeConfig(theta=float(theta), kind=kind, **given)


def decoder_from_hf(config: dict[str, Any], family: str, **options: Any) -> ModelConfig:
    """Reads the fields that all families share; `options` are the family's own."""
    for name in _SIZES:
        size = config.get(name)
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"config.json: {name}={size!r} is not allowed: an int >= 1")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act={activation!r} is not supported: silu")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    eos = config.get("eos_token_id")
    options.setdefault("windows", (None,) * layers)
    return ModelConfig(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rms_eps=config.get("rms_norm_eps", 1e-6),
        rope=rope_from_hf(config),
        max_position=config["max_position_embeddings"],
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        **options,
    )


def sliding_layers(config: dict[str, Any], *, from_layer: int) -> tuple[int | None, ...]:
    """The window of each layer: `layer_types` if given, else layers `from_layer` on slide."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    types = config.get("layer_types")
    if types is None:
        types = ["full_attention"] * from_layer + ["sliding_attention"] * (layers - from_layer)
    if len(types) != layers:
        raise ConfigError(f"layer_types has {len(types)} entries for {layers} layers")
    return tuple(window if t == "sliding_attention" else None for t in types)
