"""A latency model from a GPU's speeds and a model's shape: arithmetic, no engine is measured.

What SM shares do is fitted to single steps of one model on one H200, see `LatencyModel`.

With tensor parallelism a step is one rank's part of the model, and what ranks send each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from jpd.parallel import Split
from jpd.semi_pd.share_models import Interference
from jpd.simulate.latency import DecodeTime, LatencyModel, Overheads, PromptTime

ARITHMETIC = "arithmetic; SM shares and phases side by side as measured on one H200"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a GPU can do for a decoder in bfloat16."""

    name: str
    bytes_per_s: float
    """That kernels get from its memory."""
    flops_per_s: float
    """That matrix products of whole tiles get."""
    attention_flops_per_s: float
    """That attention of prompts gets."""
    exposed_rows: float
    """Part, 0..1, of the products of decoding rows that takes longer than to read their weights."""
    link_bytes_per_s: float
    """From the memory of another of the same host."""
    link_latency_s: float
    """Of a collective over such GPUs, whatever it sends."""
    memory_bytes: int
    """For weights, pages and work space."""
    prefill_at: tuple[tuple[int, float], ...] = ()
    """As `LatencyModel` has it."""


H200 = Gpu(
    name="H200",
    # Of 4.8e12 in the data sheet; a copy gets 4.3e12. With it decode steps of 32 and 64 rows
    # alone on all SMs are within 2 % of benchmarks/results/h200/sm_share_surface.json.
    bytes_per_s=3.8e12,
    # The next three are of dense_gemm, prefill_attention and flat_gemm in benchmarks/results/h200.
    # Of 989e12 in the data sheet; the products of a layer of Llama-3.1-8B get 700e12 with 2048
    # rows, single ones 670e12 to 720e12, with 256 rows 390e12 to 670e12.
    flops_per_s=700e12,
    # 380e12 for 1024 tokens and 470e12 for 2048, 340e12 in eight chunks.
    attention_flops_per_s=400e12,
    # Products of a layer of Llama-3.1-8B: 108, 120, 143 us with 1, 32, 128 rows.
    exposed_rows=1 / 3,
    # NVLink: a line through what all-reduces of NCCL 2.28 without multicast took between two GPUs:
    # 33, 74, 248 and 887 us for 4, 16, 64 and 256 MiB, within 4 %. 1 MiB took 35 us, for which it
    # says 23; smaller ones, and more than two GPUs, were not measured. All these are of early
    # trials, whose commands are not kept; `benchmarks.overlap --tune` samples such times.
    link_bytes_per_s=300e9,
    link_latency_s=20e-6,
    memory_bytes=int(0.95 * 139 * 2**30),
    # 2048 prompt tokens of Llama-3.1-8B alone: 47.3 ms on all SMs, 54.9, 56.2, 66.4 on 80, 70 and
    # 60 % of them (sm_share_surface.json).
    prefill_at=((80, 1.16), (70, 1.19), (60, 1.40)),
)

TURNS = 1.6
"""As `LatencyModel` has it: beside 39 steps of 2048 prompt tokens of Llama-3.1-8B an H200 ran 63
decode steps of 64 rows, and 61 of 32 (benchmarks/results/h200/sm_share_surface.json)."""

TIME_SLICES = Interference(prefill_slowdown=1.94, decode_slowdown=1.57, overlap_wait=0.0)
"""Two processes without MPS. One H200 with 8 layers of a 7B model, prefill of 2048 tokens beside
decode of 32 x 1024: 22.5 ms instead of 11.6, and 4.4 instead of 2.8."""


def arithmetic(
    split: Split,
    rank_bytes: int,
    gpu: Gpu = H200,
    *,
    page_size: int,
    sm_shares: bool = True,
) -> LatencyModel:
    """Steps as long as their bytes take through memory, and prompts also as long as their products.

    A step reads the weights once and the keys and values that its rows attend to. A prompt token
    costs two operations for each weight and four for each key and channel; what could overlap is
    added up, the sums over ranks too. Those, one after each row-parallel layer and one for the
    embeddings, send each number 2 (n - 1) / n times over each of n ranks' links, as rings do, and
    logits are gathered. Times of the host are guesses of the size seen with such engines. That a
    decode step of 16 layers took 3 % longer in a process of its own on an H200 (a trial that is not
    kept) is left out.

    How near that is to an H200 that served Llama-3.1-8B: `python -m benchmarks.simulated_serving`,
    `benchmarks/results/cpu/simulated_serving.json`. Its single steps under shares are in
    `benchmarks/results/h200/sm_share_surface.json`: decode comes within 6 % of them, 2 % in the
    mean, and 2048 prompt tokens within 4 %, 1 % in the mean, but under (100, 30), where decode
    takes a quarter (64 rows) to a third (32) longer than this says and prefill 5 to 9 % less.

    Args:
      split: of the model over ranks; windows are not looked at.
      rank_bytes: of the weights of one rank, 2 a weight.
      gpu: what runs it.
      page_size: tokens that a KV page holds.
      sm_shares: executors have SM shares; False for time slices without MPS.
    """
    model, cut = split.rank_model, split.cut_axes
    heads = model.num_layers * model.num_kv_heads * model.head_dim
    kv_bytes = 2 * 2 * heads
    kv_s = kv_bytes / gpu.bytes_per_s
    # Of the embedding table only a few rows are read.
    read = rank_bytes - 2 * model.vocab_size * model.hidden_size * (not model.tie_embeddings)
    sums = model.num_layers * len(cut & {"heads", "ffn"}) + ("vocab" in cut)
    gathers = int("vocab" in cut)  # of logits
    step_s = read / gpu.bytes_per_s + (sums + gathers) * gpu.link_latency_s
    others = 1 - 1 / split.ranks
    sums_s = sums * 2 * others * 2 * model.hidden_size / gpu.link_bytes_per_s
    logits_s = gathers * others * 2 * split.model.vocab_size / gpu.link_bytes_per_s
    # Two operations for each weight of two bytes; logits are computed for few tokens.
    weights = read / 2 - model.vocab_size * model.hidden_size
    channels = model.num_layers * model.num_heads * model.head_dim
    return LatencyModel(
        source=f"{gpu.name}: {ARITHMETIC}",
        tensor_parallel_size=split.ranks,
        decode=DecodeTime(
            step_s=step_s,
            row_s=gpu.exposed_rows * read / gpu.flops_per_s + sums_s + logits_s,
            context_token_s=kv_s,
        ),
        prompt=PromptTime(
            step_s=step_s,
            token_s=2 * weights / gpu.flops_per_s + sums_s,
            pair_s=4 * channels / gpu.attention_flops_per_s,
            context_token_s=kv_s,
        ),
        overheads=Overheads(
            launch_s=4e-4,
            deliver_s=2e-4,
            deliver_token_s=4e-6,
            message_s=1e-4,
        ),
        page_copy_s=page_size * kv_bytes / gpu.link_bytes_per_s,
        prefill_at=gpu.prefill_at,
        **({"turns": TURNS} if sm_shares else {"interference": TIME_SLICES}),
    )
