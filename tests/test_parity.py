"""Every supported model option against `transformers` in float32.

The stored goldens (`tests/goldens`) are checked everywhere; where torch is importable, so is
`transformers` itself, on other prompts and at all positions.
"""

import types
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpd
from jpd import checkpoint, models
from tests import tiny_models

MAX_ERROR = 1e-5
"""Per position. float32 itself is at most 3e-6 from float64 on these models (goldens/README.md)."""

HALF_CASE = "qwen3_bias"

Golden = Callable[[str], dict[str, np.ndarray]]
every_case = pytest.mark.parametrize("name", tiny_models.CASES)


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Finds what `transformers` said about a case, by name."""
    with np.load(Path(__file__).parent / "goldens" / "goldens.npz") as file:
        arrays = dict(file)

    def of_case(name: str) -> dict[str, np.ndarray]:
        prefix = f"{name}/"
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    return of_case


@pytest.fixture
def transformers_reference() -> types.ModuleType:
    """`make_goldens`, which can load and run a folder with torch."""
    pytest.importorskip(
        "torch", reason="torch is not installed: only the stored goldens speak for transformers"
    )
    from tests.goldens import make_goldens

    return make_goldens


def norm_error(got: np.ndarray, want: np.ndarray, axis: int | None = None) -> np.ndarray:
    """`||got - want|| / ||want||` in float64, of the whole array or along an axis."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want, axis=axis) / np.linalg.norm(want, axis=axis)


def assert_same_logits(got: np.ndarray, want: np.ndarray, positions: np.ndarray) -> None:
    """Logits `[T, V]` agree at every position."""
    assert got.shape == want.shape
    errors = norm_error(got, want, axis=-1)
    worst = int(errors.argmax())
    assert errors[worst] <= MAX_ERROR, f"relative error {errors[worst]} at {positions[worst]}"


def folder_logits(folder: Path, tokens: np.ndarray | list[int], dtype: str) -> np.ndarray:
    """Logits `[T, V]` of a checkpoint folder, by jpd."""
    config, params = checkpoint.load(folder, dtype=dtype, show_progress=False)
    logits = np.asarray(models.logits(config, params, np.asarray(tokens)))
    assert logits.dtype == np.float32
    return logits


def assert_same_params(got: Path, want: Path) -> None:
    """Two folders load to the same numbers, bit for bit, in float32.

    Their logits need not be equal to the last bit: a GPU may choose other kernels when it compiles
    again, as it does for a config that names another dtype.
    """
    trees = (checkpoint.load(f, dtype="float32", show_progress=False)[1] for f in (got, want))
    jax.tree.map(np.testing.assert_array_equal, *trees)


@every_case
def test_the_weights_are_those_of_the_golden(name: str, golden: Golden, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    found = tiny_models.weights_sha256(load_file(folder / "model.safetensors"))
    assert found == golden(name)["weights_sha256"].item(), (
        f"the weights of {name} are not those that the golden was made from: tests/tiny_models.py "
        "changed (run tests/goldens/make_goldens.py), or NumPy's PCG64 stream did"
    )
    assert tiny_models.random_prompt(name) == golden(name)["prompt"].tolist()


@every_case
def test_logits_equal_those_of_transformers(name: str, golden: Golden, tmp_path: Path) -> None:
    want = golden(name)
    folder = tiny_models.make_checkpoint(name, tmp_path)
    got = folder_logits(folder, want["prompt"], "float32")
    assert got.shape == (len(want["prompt"]), tiny_models.CASES[name]["vocab_size"])
    assert_same_logits(got[want["positions"]], want["logits"], want["positions"])


@every_case
@pytest.mark.parametrize(
    "max_num_batched_tokens",
    [pytest.param(16, id="three_chunks"), pytest.param(64, id="one_chunk")],
)
def test_greedy_tokens_equal_those_of_transformers(
    name: str, max_num_batched_tokens: int, golden: Golden, tmp_path: Path
) -> None:
    want = golden(name)
    llm = jpd.LLM(
        str(tiny_models.make_checkpoint(name, tmp_path)),
        dtype="float32",
        load_format="auto",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=max_num_batched_tokens,
        # One size of each kind keeps the compiler's part of the test small.
        batch_buckets=(4,),
        token_buckets=(max_num_batched_tokens,),
        context_buckets=(128,),
        page_size=16,
        num_pages=64,
        show_progress=False,
    )
    greedy = jpd.SamplingParams(temperature=0, max_tokens=len(want["greedy"]), ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": want["prompt"].tolist()}], greedy)
    assert len(outputs) == 1
    assert list(outputs[0].outputs[0].token_ids) == want["greedy"].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_checkpoint_is_read_without_loss(
    dtype: str, golden: Golden, tmp_path: Path
) -> None:
    prompt = golden(HALF_CASE)["prompt"]
    stored = tiny_models.make_checkpoint(HALF_CASE, tmp_path / "stored", dtype=dtype)
    widened = tiny_models.make_checkpoint(HALF_CASE, tmp_path / "widened", rounded_to=dtype)
    assert_same_params(stored, widened)  # the same numbers in wider boxes

    got = folder_logits(stored, prompt, "float32")
    want = golden(HALF_CASE)
    error = norm_error(got[want["positions"]], want["logits"])
    # Rounding moves each weight by at most 2^-9 (bfloat16) or 2^-12 (float16) of itself, and the
    # logits of this model by 0.8 % or 0.09 %. From the same rounded weights transformers gets
    # the same distance; two float32 errors of 1e-6 each shift it by less than 1 % of itself.
    assert error == pytest.approx(want[f"{dtype}_weights_error"].item(), rel=1e-2)
    assert error <= {"bfloat16": 2e-2, "float16": 2.5e-3}[dtype]


@pytest.mark.parametrize("name", ["llama31", "mistral_window", "qwen2", "qwen3_v5"])
def test_bfloat16_is_as_close_as_that_of_transformers(
    name: str, golden: Golden, tmp_path: Path
) -> None:
    want = golden(name)
    folder = tiny_models.make_checkpoint(name, tmp_path)
    got = folder_logits(folder, want["prompt"], "bfloat16")
    error = norm_error(got[want["positions"]], want["logits"])
    # Both round to bfloat16 between operations, though not at all the same places.
    assert error <= 1.25 * want["bfloat16_error"].item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_make_no_difference(dtype: str, tmp_path: Path) -> None:
    single = tiny_models.make_checkpoint(HALF_CASE, tmp_path / "single", dtype=dtype)
    sharded = tiny_models.make_checkpoint(HALF_CASE, tmp_path / "sharded", dtype=dtype, shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert_same_params(sharded, single)


@every_case
def test_live_logits_equal_those_of_transformers(
    name: str, golden: Golden, tmp_path: Path, transformers_reference: types.ModuleType
) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    model = transformers_reference.load(folder)
    want = golden(name)
    again = transformers_reference.logits(model, want["prompt"].tolist())
    assert_same_logits(again[want["positions"]], want["logits"], want["positions"])

    # A second prompt, beyond every window and the original length of scaled rope, at all positions.
    tokens = tiny_models.random_prompt(name, 2 * tiny_models.PROMPT_TOKENS + 7, stream=1)
    got = folder_logits(folder, tokens, "float32")
    assert_same_logits(got, transformers_reference.logits(model, tokens), np.arange(len(tokens)))
