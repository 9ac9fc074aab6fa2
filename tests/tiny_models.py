"""Tiny random checkpoints in the Hugging Face layout, the same bits on every machine.

`CASES` names one small model per option that jpd supports; `make_checkpoint` writes it as a folder.
Needs NumPy only. Weights come from the raw output of PCG64, whose stream NumPy promises never to
change, by integer arithmetic and correctly rounded float operations: no `log`, no `exp`, so no libm
enters the bits. The goldens in `tests/goldens` record the hash of these weights.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS = 45
"""Length of the golden prompts: no multiple of a page or of a chunk, longer than every window."""

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    # With 32 positions, heads of 32 and theta 5e5 all three bands (kept, blended, divided) occur.
    "original_max_position_embeddings": 32,
}


def _config(family: str, *, v5: bool = False, **options: Any) -> dict[str, Any]:
    """One config.json; `v5` names fields as transformers 5 does, not as older versions did."""
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "vocab_size": 256,
        "rms_norm_eps": 1e-5 if family == "llama" else 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype" if v5 else "torch_dtype": "float32",
        "transformers_version": "5.0.0" if v5 else "4.44.0",
        **options,
    }


# One model of each family has rms_norm_eps=1e-3: at the usual 1e-6 a forgotten eps would stay under
# the error that the tests allow.
CASES: dict[str, dict[str, Any]] = {
    # The first Llama 2 configs: neither rope_theta nor num_key_value_heads nor head_dim is present.
    "llama2": _config("llama", rope_scaling=None, vocab_size=257),
    "llama3": _config(
        "llama",
        num_attention_heads=8,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        rope_theta=500000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
    ),
    "llama31": _config(
        "llama",
        hidden_size=96,
        intermediate_size=192,
        num_attention_heads=3,
        num_key_value_heads=1,
        num_hidden_layers=3,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", **_LLAMA3_ROPE},
        eos_token_id=[2, 3, 4],
    ),
    "llama32_v5": _config(
        "llama",
        v5=True,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={
            "rope_theta": 500000.0,
            "rope_type": "llama3",
            **_LLAMA3_ROPE,
            "factor": 32.0,
        },
        tie_word_embeddings=True,
        eos_token_id=[2, 3, 4],
        pad_token_id=None,
    ),
    # "type" is the older spelling of "rope_type".
    "llama_linear": _config(
        "llama",
        num_key_value_heads=4,
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    "llama_linear_v5": _config(
        "llama",
        v5=True,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_theta": 20000.0, "rope_type": "linear", "factor": 2.5},
    ),
    "llama_mqa": _config(
        "llama",
        num_key_value_heads=1,
        num_hidden_layers=3,
        rope_theta=10000.0,
        vocab_size=211,
    ),
    "llama_bias": _config(
        "llama",
        num_key_value_heads=2,
        rope_theta=10000.0,
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral_window": _config(
        "mistral",
        num_hidden_layers=3,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        rope_theta=10000.0,
        sliding_window=16,
    ),
    # As in Mistral Nemo: heads wider than hidden_size / num_attention_heads, and no window.
    "mistral_head_dim_v5": _config(
        "mistral",
        v5=True,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
        sliding_window=None,
    ),
    # The window is written but switched off, as in most released Qwen2 configs.
    "qwen2": _config(
        "qwen2",
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        rope_theta=1000000.0,
        sliding_window=8,
        use_sliding_window=False,
        max_window_layers=0,
        tie_word_embeddings=True,
        vocab_size=300,
    ),
    "qwen2_untied": _config(
        "qwen2",
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=1000000.0,
        sliding_window=512,
        use_sliding_window=False,
        max_window_layers=2,
    ),
    # Layers 0 .. max_window_layers - 1 attend to everything; those from max_window_layers on slide.
    "qwen2_window": _config(
        "qwen2",
        num_hidden_layers=3,
        num_key_value_heads=2,
        rope_theta=10000.0,
        sliding_window=12,
        use_sliding_window=True,
        max_window_layers=1,
    ),
    "qwen3_v5": _config(
        "qwen3",
        v5=True,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
        attention_bias=False,
        layer_types=["full_attention"] * 2,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "qwen3_untied": _config(
        "qwen3",
        hidden_size=80,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=24,
        rope_theta=1000000.0,
        rope_scaling=None,
        attention_bias=False,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=2,
        vocab_size=223,
    ),
    # layer_types decides; max_window_layers alone would make no layer slide.
    "qwen3_window_v5": _config(
        "qwen3",
        v5=True,
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        attention_bias=False,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=10,
        use_sliding_window=True,
        max_window_layers=3,
    ),
    "qwen3_bias": _config(
        "qwen3",
        num_key_value_heads=4,
        head_dim=32,
        rope_theta=1000000.0,
        attention_bias=True,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=2,
    ),
}

# Picked so that 64 greedy tokens neither settle into a short loop nor meet a near tie.
SEEDS: dict[str, int] = dict.fromkeys(CASES, 1) | {
    "llama_linear": 2,
    "qwen2": 3,
    "qwen2_window": 2,
    "qwen3_v5": 8,
    "qwen3_bias": 4,
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor in the checkpoint of `config`; matrices are `[out, in]`."""
    family = config["model_type"]
    width, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", width // heads)
    qkv_bias = family == "qwen2" or config.get("attention_bias", False)
    out_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        linears = {
            "self_attn.q_proj": (heads * head_dim, width, qkv_bias),
            "self_attn.k_proj": (kv_heads * head_dim, width, qkv_bias),
            "self_attn.v_proj": (kv_heads * head_dim, width, qkv_bias),
            "self_attn.o_proj": (width, heads * head_dim, out_bias),
            "mlp.gate_proj": (ffn, width, mlp_bias),
            "mlp.up_proj": (ffn, width, mlp_bias),
            "mlp.down_proj": (width, ffn, mlp_bias),
        }
        norms = {"input_layernorm": width, "post_attention_layernorm": width}
        if family == "qwen3":
            norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
        prefix = f"model.layers.{layer}."
        for name, (out, into, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (out, into)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (out,)
        for name, size in norms.items():
            shapes[f"{prefix}{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def make_tensors(name: str) -> dict[str, np.ndarray]:
    """The float32 weights of one case, by Hugging Face tensor name."""
    config = CASES[name]
    tensors = {}
    for tensor, shape in tensor_shapes(config).items():
        # Seeded by name: adding a tensor to a model leaves all others as they were.
        values = _bell([SEEDS[name], zlib.crc32(f"{name}/{tensor}".encode())], shape)
        if tensor.endswith("norm.weight"):
            values = 1.0 + 0.1 * values
        elif tensor.endswith(".bias"):
            values = 0.3 * values
        elif tensor == "lm_head.weight":
            values = values * (3.0 / math.sqrt(shape[1]))
        elif tensor == "model.embed_tokens.weight":
            # A tied embedding votes for the token just read: small, so that the layers outvote it.
            values = values * (0.35 if config["tie_word_embeddings"] else 1.0)
        else:
            values = values * (1.5 / math.sqrt(shape[1]))
        tensors[tensor] = values.astype(np.float32)
    return tensors


def make_checkpoint(
    name: str,
    folder: str | Path,
    *,
    dtype: str = "float32",
    shards: int = 1,
    rounded_to: str | None = None,
) -> Path:
    """Writes `config.json` and the safetensors file(s) of one case.

    Args:
        name: A key of `CASES`.
        folder: Made where it is missing.
        dtype: Of the stored tensors: "float32", "float16" or "bfloat16" (to nearest, ties to even).
        shards: Number of safetensors files; more than one come with `model.safetensors.index.json`.
        rounded_to: Round the weights to this dtype first, whatever they are stored in.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(CASES[name])
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    tensors = make_tensors(name)
    if rounded_to is not None:
        tensors = {
            key: _widen(_narrow(value, rounded_to), rounded_to) for key, value in tensors.items()
        }
    stored = {key: _narrow(value, dtype) for key, value in tensors.items()}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", stored, dtype)
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        # Dealt out like cards: q, k and v of one layer lie in different files.
        names = list(stored)[shard::shards]
        write_safetensors(folder / file, {key: stored[key] for key in names}, dtype)
        weight_map |= dict.fromkeys(names, file)
    total = sum(value.nbytes for value in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Writes one safetensors file; bfloat16, unknown to NumPy, comes as uint16 patterns."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, value in tensors.items():
        end = offset + value.nbytes
        header[key] = {
            "dtype": _DTYPES[dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(value.astype(value.dtype.newbyteorder("<")).tobytes())


def weights_sha256(tensors: dict[str, np.ndarray]) -> str:
    """Hash of names, shapes and float32 bits, whatever the order or the file they came in."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f"{key}{list(value.shape)}".encode())
        digest.update(value.astype("<f4").tobytes())
    return digest.hexdigest()


def random_prompt(name: str, length: int = PROMPT_TOKENS, *, stream: int = 0) -> list[int]:
    """`length` random token ids of the case's vocabulary; each `stream` is another prompt."""
    raw = np.random.PCG64([SEEDS[name], stream]).random_raw(length)
    return [int(token) for token in raw % np.uint64(CASES[name]["vocab_size"])]


def _bell(seed: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Nearly normal float64 values, mean 0, variance 1: each the sum of four uniform integers."""
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    total = raw.astype("<u8").view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
    mean, deviation = 2 * 65535, math.sqrt((65536**2 - 1) / 3)
    return ((total - mean) / deviation).reshape(shape)


def _narrow(value: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to the stored form of `dtype`; bfloat16 as uint16 patterns."""
    if dtype == "bfloat16":
        bits = value.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return value.astype(dtype)


def _widen(value: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of `_narrow`: stored form to float32."""
    if dtype == "bfloat16":
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32)
