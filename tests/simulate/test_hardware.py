"""Arithmetic latencies: what a rank computes, and what ranks send each other."""

import dataclasses
import json
import math
from functools import partial
from typing import Any

import pytest

from benchmarks.readme import RESULTS
from jpd import checkpoint
from jpd.bench import traces
from jpd.config import EngineConfig
from jpd.errors import ConfigError
from jpd.parallel import Split
from jpd.simulate import engine, hardware
from jpd.simulate.hardware import H200
from jpd.simulate.latency import LatencyModel, StepWork
from jpd.simulate.run import simulate
from tests.tiny_models import CASES

FREE_LINK = dataclasses.replace(H200, link_bytes_per_s=math.inf, link_latency_s=0.0)
LAYERS, WIDTH, VOCAB = 4, 8192, 128256


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """Four layers of the shape of Llama-3-70B."""
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 28672,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folder = tmp_path_factory.mktemp("llama3-70b")
    (folder / "config.json").write_text(json.dumps(CASES["llama3"] | sizes))
    return folder


@pytest.fixture(scope="module")
def model(shape):
    return checkpoint.read_config(shape)


def arithmetic(model, ranks: int, gpu=H200) -> LatencyModel:
    split = Split(model, ranks)
    rank_bytes = checkpoint.param_bytes(split.rank_model, "bfloat16")
    return hardware.arithmetic(split, rank_bytes, gpu, page_size=16)


def prompt(tokens: int, padded_rows: int = 0) -> StepWork:
    """A step with one prompt."""
    pairs = tokens * (tokens + 1) // 2
    return StepWork(
        rows=0,
        context_tokens=0,
        prompt_tokens=tokens,
        pairs=pairs,
        padded_rows=padded_rows,
        padded_tokens=tokens,
        padded_context=tokens,
    )


def decode(rows: int, context: int) -> StepWork:
    return StepWork(
        rows=rows,
        context_tokens=rows * context,
        prompt_tokens=0,
        pairs=0,
        padded_rows=rows,
        padded_tokens=0,
        padded_context=context,
    )


def sent_s(model, ranks: int, work: StepWork) -> float:
    """What a step takes longer because ranks wait for each other."""
    return arithmetic(model, ranks).full_s(work) - arithmetic(model, ranks, FREE_LINK).full_s(work)


@pytest.mark.parametrize("work", [prompt(2048), decode(64, 4096)], ids=["prompt", "decode"])
def test_each_rank_computes_its_part(model, work):
    whole_s = arithmetic(model, 1).full_s(work)
    for ranks in (2, 4, 8):
        found = arithmetic(model, ranks, FREE_LINK)
        assert found.tensor_parallel_size == ranks
        # The norms' weights are whole on every rank.
        assert found.full_s(work) == pytest.approx(whole_s / ranks, rel=1e-3)
    assert sent_s(model, 1, work) == 0


@pytest.fixture
def llama_8b(tmp_path):
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(CASES["llama3"] | sizes))
    return tmp_path


@pytest.fixture
def latencies_8b(llama_8b):
    return arithmetic(checkpoint.read_config(llama_8b), 1)


def test_decoding_rows_hide_behind_the_weights_as_they_did_on_the_gpu(latencies_8b):
    more_s = latencies_8b.full_s(decode(128, 0)) - latencies_8b.full_s(decode(32, 0))
    # The four products of a layer: benchmarks/results/h200/flat_gemm.json.
    assert more_s == pytest.approx(32 * (142.7e-6 - 119.9e-6), rel=0.1)


def test_products_of_prompts_take_what_they_took_on_the_gpu(latencies_8b):
    products = dataclasses.replace(latencies_8b.prompt, step_s=0.0, pair_s=0.0)
    # The four products of a layer: benchmarks/results/h200/dense_gemm.json.
    layer_s = 144.4e-6 + 102.2e-6 + 689.5e-6 + 339.1e-6
    assert products.seconds(prompt(2048)) == pytest.approx(32 * layer_s, rel=0.02)


def work_of(row: dict[str, Any]) -> StepWork:
    """What a row of sm_share_surface.json computed."""
    return StepWork(**{field.name: row[field.name] for field in dataclasses.fields(StepWork)})


def test_steps_under_shares_take_what_they_took_on_the_gpu(latencies_8b):
    """Also decode under (80, 20), for whose SMs the table of products had no entries."""
    rows = json.loads((RESULTS / "h200" / "sm_share_surface.json").read_text())["rows"]
    off: dict[str, list[float]] = {"decode": [], "prefill": []}
    for row in rows:
        prefill, decode, phase = row["prefill_share"], row["decode_share"], row["phase"]
        # Whole steps take turns there, which no model here knows.
        if (prefill, decode) == (100, 30):
            continue
        is_prompt = phase == "prefill"
        own, other = (prefill, decode) if is_prompt else (decode, prefill)
        case = is_prompt, own, None if row["beside"] is None else other
        full_s = latencies_8b.full_s(work_of(row))
        if prefill == decode == 100 and row["beside"] is not None:
            (beside,) = (
                of_other
                for of_other in rows
                if of_other["configuration"] == row["configuration"] and of_other["phase"] != phase
            )
            other_s = latencies_8b.full_s(work_of(beside))
            seconds = latencies_8b.in_turns_s(is_prompt, full_s, other_s)
        else:
            stretch = latencies_8b.stretch(*case, padded_rows=row["padded_rows"])
            seconds = full_s * stretch + latencies_8b.wait_s(*case)
        off[phase].append(seconds / row["seconds"] - 1)
    assert len(off["decode"]) >= 16
    assert len(off["prefill"]) >= 12
    for phase, most, mean in (("decode", 0.06, 0.025), ("prefill", 0.04, 0.015)):
        errors = [abs(error) for error in off[phase]]
        assert max(errors) < most
        assert sum(errors) < mean * len(errors)


def test_prefill_goes_through_what_was_measured_at_shares(latencies_8b):
    smooth = dataclasses.replace(latencies_8b, prefill_at=())
    for percent, factor in H200.prefill_at:
        assert latencies_8b.stretch(True, percent, None) == pytest.approx(factor)
        assert smooth.stretch(True, percent, None) != pytest.approx(factor, rel=0.01)
    for percent in (100, 50, 30, 10):  # and bends no more than at the nearest of them
        ratio = latencies_8b.stretch(True, percent, None) / smooth.stretch(True, percent, None)
        bend = 1 if percent == 100 else 1.40 / smooth.stretch(True, 60, None)
        assert ratio == pytest.approx(bend)
    for wrong in ((100, 1.0), (0, 2.0), (50, 0.9)):
        with pytest.raises(ConfigError, match="prefill_at="):
            dataclasses.replace(latencies_8b, prefill_at=(wrong,))


def test_products_compute_whole_tiles(latencies_8b):
    products = dataclasses.replace(latencies_8b.prompt, step_s=0.0, pair_s=0.0)

    def tiles(tokens: int, padded_rows: int = 0) -> float:
        return products.seconds(prompt(tokens, padded_rows)) / products.seconds(prompt(256))

    rows_and_tiles = {64: 1 / 4, 256: 1, 257: 2, 512: 2, 2048: 8, 2049: 9}
    assert {rows: tiles(rows) for rows in rows_and_tiles} == pytest.approx(rows_and_tiles)
    assert tiles(2048 - 32, 32) == pytest.approx(8)
    assert tiles(2048, 32) == pytest.approx(9)


def mean_e2e_of(folder, latencies, requests, semi_pd, topology: str, **options) -> float:
    """Seconds; `semi_pd` are the options of topologies with two executors."""
    options |= {"topology": topology, "max_model_len": 8192, "num_pages": 18_432}
    options |= {"batch_buckets": (32, 128, 256), "token_buckets": (256, 512, 1024, 2048)}
    if topology != "unified":
        options["semi_pd"] = semi_pd
    config = EngineConfig.from_kwargs(str(folder), **options)
    one = engine.build(engine.prepare(config, 1 << 37, "a GPU"), latencies)
    records = simulate(requests, [one])
    one.close()
    return sum(record.e2e_s for record in records) / len(records)


@pytest.mark.parametrize(
    ("workload", "rate", "better"),
    [
        ("azure_conv", 22.2, "semi_pd"),  # decode is held up for most of the time
        ("azure_conv", 8.0, "unified"),
        ("azure_code", 15.0, "unified"),  # so it is, but few decode and many wait
        ("sharegpt_like", 33.0, "unified"),  # very many decode, but are hardly held up
    ],
)
def test_the_default_break_even_takes_what_is_better(
    llama_8b, latencies_8b, workload, rate, better
):
    n = round(8 * rate)
    requests = traces.make(workload, rate=rate, n=n, seed=0, max_total_tokens=8192)
    fixed = {"prefill_share": 70, "decode_share": 30}
    mean_e2e_s = partial(mean_e2e_of, llama_8b, latencies_8b, requests, fixed)
    found = {topology: mean_e2e_s(topology) for topology in ("unified", "semi_pd")}
    assert min(found, key=found.get) == better
    assert mean_e2e_s("auto") < 1.02 * found[better] < 0.98 * max(found.values())


@pytest.mark.parametrize(
    ("workload", "rate", "order", "kept", "better"),
    [
        ("azure_conv", 26.7, "shortest", ((100, 100), (70, 30)), "semi_pd"),
        ("azure_conv", 8.0, "fcfs", ((100, 100), (70, 30)), "unified"),
        ("azure_code", 15.0, "fcfs", ((100, 100), (70, 30)), "unified"),
        # Decode is hardly held up, but there is much of it, and little prefill.
        ("sharegpt_like", 55.0, "fcfs", ((100, 100), (60, 40), (40, 60)), "semi_pd"),
    ],
)
def test_what_the_controller_foresees_to_be_better_is(
    llama_8b, latencies_8b, workload, rate, order, kept, better
):
    """`auto` has three quarters at least of what the better one gains over the other."""
    n = round(16 * rate)
    requests = traces.make(workload, rate=rate, n=n, seed=0, max_total_tokens=8192)
    steered = {"controller": "mean", "kept_shares": kept}
    mean_e2e_s = partial(
        mean_e2e_of, llama_8b, latencies_8b, requests, steered, scheduling_policy=order
    )
    found = {topology: mean_e2e_s(topology) for topology in ("unified", "semi_pd")}
    assert min(found, key=found.get) == better
    gain_s = max(found.values()) - found[better]
    assert gain_s > 0.05 * found[better]
    assert mean_e2e_s("auto") < found[better] + gain_s / 4


def test_kv_heads_that_several_ranks_have(model):
    """A rank has one KV head at least, of keys and of what is sent between GPUs."""
    eight, sixteen = (arithmetic(model, ranks) for ranks in (8, 16))
    assert sixteen.decode.context_token_s == eight.decode.context_token_s
    assert sixteen.page_copy_s == eight.page_copy_s == arithmetic(model, 1).page_copy_s / 8


@pytest.mark.parametrize(("mib", "measured_us"), [(4, 33), (16, 74), (64, 248), (256, 887)])
def test_sums_over_two_ranks_take_what_they_took_on_two_gpus(model, mib, measured_us):
    tokens = (mib << 20) // (2 * WIDTH)
    sums = 2 * LAYERS + 1  # of the embeddings too
    took_s = (sent_s(model, 2, prompt(tokens)) - H200.link_latency_s) / sums  # gathered logits
    assert 1e6 * took_s == pytest.approx(measured_us, rel=0.04)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_links_of_a_ring(model, ranks):
    rows, collectives = 64, 2 * LAYERS + 2
    sums = (2 * LAYERS + 1) * 2 * (ranks - 1) / ranks * rows * 2 * WIDTH
    logits = (ranks - 1) / ranks * rows * 2 * VOCAB
    expected_s = collectives * H200.link_latency_s + (sums + logits) / H200.link_bytes_per_s
    assert sent_s(model, ranks, decode(rows, 1000)) == pytest.approx(expected_s)


def test_axes_that_are_not_cut_need_no_sum(model):
    rules = {"heads": None, "kv_heads": None, "ffn": "tp", "vocab": None}
    split = Split(model, 2, rules={"width": None, "head_dim": None} | rules)
    rank_bytes = checkpoint.param_bytes(split.rank_model, "bfloat16")
    with_link, without = (
        hardware.arithmetic(split, rank_bytes, gpu, page_size=16) for gpu in (H200, FREE_LINK)
    )
    work = decode(1, 10)
    expected_s = LAYERS * (H200.link_latency_s + 2 * WIDTH / H200.link_bytes_per_s)
    assert with_link.full_s(work) - without.full_s(work) == pytest.approx(expected_s)


def test_pages_fill_the_memory_of_each_rank(shape):
    sizes = {"max_model_len": 8192, "max_num_seqs": 512, "num_pages": None}
    config = EngineConfig(model=str(shape), **sizes)
    used, pages = [], []
    for ranks in (1, 2, 4):
        found = engine.prepare(config.replace(tensor_parallel_size=ranks), 20 << 30, "a GPU")
        pages.append(found.config.num_pages)
        page_bytes = 2 * LAYERS * 16 * (8 // ranks) * 128 * 2
        used.append(found.model_bytes + pages[-1] * page_bytes)
    # Work space is less where there are fewer channels.
    assert used == pytest.approx([used[0]] * 3, rel=0.05)
    assert 2 * pages[0] < pages[1]
    assert 2 * pages[1] < pages[2]
