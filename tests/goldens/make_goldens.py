"""Makes `goldens.npz`: what `transformers` says about every model of `tests/tiny_models.py`.

Needs torch and transformers 5. From the repository's root:

    python -m tests.goldens.make_goldens

Two further runs say whether the goldens are a fair and a sharp test. In float64 the same model
shows how far float32 itself is from the truth; with one option switched off, how far a model is
that ignores it. The script refuses to write goldens that are not both.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from torch.overrides import TorchFunctionMode

from tests import tiny_models

GOLDENS = Path(__file__).parent / "goldens.npz"
GREEDY_TOKENS = 64
MIN_MARGIN = 1e-3
"""Top-1 minus top-2 logit at every greedy step, of logits that an error of 1e-5 moves by 3e-5."""
MIN_DISTINCT = 24
"""Distinct tokens among the greedy ones: fewer mean a loop, which hides a wrong position."""
MIN_SENSITIVITY = 1e-4
"""Relative error of a model that ignores the option: 10 times what the tests allow."""

_ROPE_OFF = ("rope scaling ignored", {"rope_scaling": None})
_WINDOW_OFF = ("window ignored", {"sliding_window": None})
_EPS_OFF = ("rms_norm_eps ignored", {"rms_norm_eps": 1e-6})
_BIAS_OFF = ("biases ignored", {".bias": 0.0})
_ALL_SLIDE = ("every layer slides", {"max_window_layers": 0, "layer_types": None})

ABLATIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    # A key with a dot sets all parameters whose name ends so; any other changes config.json.
    "llama2": [("rope_theta 5e5", {"rope_theta": 5e5})],
    "llama3": [_EPS_OFF, ("rope_theta ignored", {"rope_theta": 1e4})],
    "llama31": [_ROPE_OFF],
    "llama32_v5": [
        ("rope scaling ignored", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    ],
    "llama_linear": [_ROPE_OFF],
    "llama_linear_v5": [
        ("rope scaling ignored", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
        (
            "rope_theta ignored",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        ),
    ],
    "llama_mqa": [("rope_theta 5e5", {"rope_theta": 5e5})],
    "llama_bias": [
        ("attention_bias ignored", {"_proj.bias": 0.0}),
        ("o_proj.bias ignored", {".o_proj.bias": 0.0}),
        ("down_proj.bias ignored", {".down_proj.bias": 0.0}),
    ],
    "mistral_window": [
        _WINDOW_OFF,
        ("window one too wide", {"sliding_window": 17}),
        _EPS_OFF,
    ],
    "mistral_head_dim_v5": [
        (
            "rope_parameters ignored",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        )
    ],
    "qwen2": [
        _BIAS_OFF,
        _EPS_OFF,
        ("use_sliding_window=false ignored", {"use_sliding_window": True}),
    ],
    "qwen2_untied": [_BIAS_OFF],
    "qwen2_window": [_WINDOW_OFF, _ALL_SLIDE],
    "qwen3_v5": [
        _EPS_OFF,
        ("q_norm weight ignored", {".q_norm.weight": 1.0}),
        ("k_norm weight ignored", {".k_norm.weight": 1.0}),
    ],
    "qwen3_untied": [("rope_theta ignored", {"rope_theta": 1e4})],
    "qwen3_window_v5": [
        ("layer_types ignored", {"layer_types": None}),
        ("window one too wide", {"sliding_window": 11}),
        _ALL_SLIDE,
    ],
    "qwen3_bias": [_BIAS_OFF, ("o_proj.bias ignored", {".o_proj.bias": 0.0})],
}


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """`||got - want|| / ||want||`, both as float64."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class Float64Mode(TorchFunctionMode):
    """Turns the float32 that models ask for by name (norms, softmax, angles) into float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{key: widen(arg) for key, arg in (kwargs or {}).items()})


def load(folder: Path) -> torch.nn.Module:
    """The float32 model of a folder, with plain (eager) attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits `[T, V]` of all positions, without a cache; float64 from a float64 model."""
    out = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return (out.float() if out.dtype == torch.bfloat16 else out).numpy()


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[list[int], float]:
    """`count` greedy tokens, never stopping at eos, and the smallest top-1 to top-2 margin."""
    tokens, margin = list(prompt), np.inf
    for _ in range(count):
        last = logits(model, tokens)[-1]
        second, first = np.sort(last)[-2:]
        margin = min(margin, float(first - second))
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :], margin


def to_float64(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, rotary frequencies computed anew; run it under `Float64Mode`."""
    model = model.double()
    rotary = model.model.rotary_emb
    rope_type = rotary.rope_type
    if rope_type == "default":
        init = rotary.compute_default_rope_parameters
    else:
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope_type]
    with Float64Mode():
        rotary.inv_freq = init(rotary.config)[0]
    assert rotary.inv_freq.dtype == torch.float64
    return model


def load_ablated(folder: Path, change: dict[str, Any]) -> torch.nn.Module:
    """The model of `folder` with one entry of `ABLATIONS` applied."""
    weights = {key: value for key, value in change.items() if "." in key}
    path = folder / "config.json"
    original = path.read_text()
    path.write_text(json.dumps({**json.loads(original), **change}))
    model = load(folder)
    path.write_text(original)
    for suffix, value in weights.items():
        hit = [p for name, p in model.named_parameters() if name.endswith(suffix)]
        assert hit, f"no parameter ends with {suffix}"
        for parameter in hit:
            parameter.data.fill_(value)
    return model


def golden(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Everything stored about one case; raises where it would be an unfair or a blunt test."""
    tiny_models.make_checkpoint(name, folder)
    prompt = tiny_models.random_prompt(name)
    model = load(folder)
    want = logits(model, prompt)
    tokens, margin = greedy(model, prompt, GREEDY_TOKENS)
    sensitivity = {
        label: relative_error(logits(load_ablated(folder, change), prompt), want)
        for label, change in ABLATIONS[name]
    }
    # Every third row and the last: before, at and after every window, at a third of the bytes.
    positions = np.array([*range(0, len(prompt) - 1, 3), len(prompt) - 1])
    half = {"bfloat16_error": logits(load(folder).bfloat16(), prompt)}
    for dtype in ("bfloat16", "float16"):
        rounded = tiny_models.make_checkpoint(name, folder / dtype, dtype=dtype)
        half[f"{dtype}_weights_error"] = logits(load(rounded), prompt)
    half = {key: relative_error(got[positions], want[positions]) for key, got in half.items()}
    model = to_float64(model)
    with Float64Mode():
        exact = logits(model, prompt)
        exact_tokens, _ = greedy(model, prompt, GREEDY_TOKENS)
    assert exact.dtype == np.float64
    error = relative_error(want, exact)

    distinct = len(set(tokens))
    blunt = {label: value for label, value in sensitivity.items() if value < MIN_SENSITIVITY}
    print(
        f"| {name} | {error:.1e} | {half['bfloat16_error']:.1e} | {margin:.1e} | {distinct} | "
        + ", ".join(f"{label} {value:.1e}" for label, value in sensitivity.items())
        + " |"
    )
    if margin < MIN_MARGIN or distinct < MIN_DISTINCT or tokens != exact_tokens or blunt:
        raise ValueError(
            f"{name}: margin {margin} (at least {MIN_MARGIN}), {distinct} distinct tokens "
            f"(at least {MIN_DISTINCT}), float64 tokens equal: {tokens == exact_tokens}, "
            f"options that hardly matter: {blunt}. Choose another seed in tiny_models.SEEDS."
        )
    return {
        "prompt": np.array(prompt, np.int32),
        "positions": positions.astype(np.int32),
        "logits": want[positions].astype(np.float32),
        "greedy": np.array(tokens, np.int32),
        "margin": np.array(margin),
        "float64_error": np.array(error),
        **{key: np.array(value) for key, value in half.items()},
        "weights_sha256": np.array(tiny_models.weights_sha256(tiny_models.make_tensors(name))),
    }


def main() -> None:
    """Writes `goldens.npz` beside this file."""
    arrays = {
        "versions": np.array(
            f"torch {torch.__version__}, transformers {transformers.__version__}, "
            f"safetensors {safetensors.__version__}, numpy {np.__version__}"
        )
    }
    for name in tiny_models.CASES:
        with tempfile.TemporaryDirectory() as folder:
            for key, value in golden(name, Path(folder)).items():
                arrays[f"{name}/{key}"] = value
    np.savez_compressed(GOLDENS, **arrays)
    print(f"{GOLDENS.name}: {GOLDENS.stat().st_size} bytes, {arrays['versions']}")


if __name__ == "__main__":
    main()
