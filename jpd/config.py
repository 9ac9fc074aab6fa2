"""Configuration: one frozen dataclass, validated when built, fully decided by `resolve`.

Names are vLLM's where the meaning is the same, so that a comparison changes one import. What is
jpd's own sits in nested groups (`kernels.*`). The command line is generated from these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from jpd.errors import ConfigError, UnknownArgumentError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "orbax", "dummy"]
SchedulingPolicy = Literal["fcfs", "priority", "shortest"]
PrefillPolicy = Literal["mixed", "first"]
Topology = Literal["unified", "semi_pd", "auto", "disaggregated"]
Controller = Literal["auto", "static", "paper", "slo", "mean"]
MatmulAllReduce = Literal["auto", "overlap", "xla"]

MAX_STEP_TOKENS = 65_536
BREAK_EVEN = 1.5
"""Stands for `SemiPDConfig.break_even` where that is None and the controller cannot foresee what
one executor would do. In `jpd simulate` of Llama-3.1-8B on an H200, with requests for 20 s,
`SloController` among (100, 100), (70, 30), (60, 40) and (50, 50), and prefill's measured times
under these shares, two executors had the better mean with azure_conv and arxiv (eight seeds) from
load 0.8 or 0.9 on, with the ShareGPT-like lengths from 1.2 on and with azure_code at none. With
1.5, `auto` had 0.93 times the better one's speed or more everywhere, and kept the tight SLO for 90
% of the requests up to 0.97 times chunked prefill's rate or more. With 1 and 0.7 it did no better
there and lost up to 3 and 5 % with azure_code, with 2, 3 and 4 an earlier controller did much the
same. All that was before the controller counted requests (those that wait, those that would be
lost); since then 1.5 was simulated alone (benchmarks/FINDINGS.md). Runs on an H200 asked for 2.0
and 4.7 (azure_conv, earlier controllers, `break_even_ratio` in benchmarks/results/h200).
Simulations are trials that are not kept."""

_SPLITS = (
    "jpd splits a model by tensor_parallel_size alone (topology='disaggregated' gives each phase a "
    "GPU of its own)"
)
_LORA = "jpd serves no LoRA adapters"
_DRAFTS = "jpd does no speculative decoding"
_TEXT_ONLY = "jpd serves models of text alone"
_NO_OFFLOAD = "jpd keeps weights and KV pages in the device's memory"
# What comparisons with vLLM bring along: its names that jpd does not have, and what to do instead.
_VLLM_NAMES: dict[str, str] = {
    "block_size": "jpd calls it page_size",
    "cpu_offload_gb": _NO_OFFLOAD,
    "data_parallel_size": _SPLITS,
    "disable_log_stats": "read llm.stats",
    "distributed_executor_backend": _SPLITS,
    "enable_chunked_prefill": "prompts longer than max_num_batched_tokens are always chunked",
    "enable_expert_parallel": _SPLITS,
    "enable_lora": _LORA,
    "enforce_eager": "every step is compiled; fewer buckets compile sooner",
    "hf_overrides": "change the folder's config.json",
    "kv_cache_dtype": "KV pages have the type that dtype says",
    "limit_mm_per_prompt": _TEXT_ONLY,
    "max_loras": _LORA,
    "num_gpu_blocks_override": "jpd calls it num_pages",
    "num_speculative_tokens": _DRAFTS,
    "pipeline_parallel_size": _SPLITS,
    "quantization": "weights are float32, bfloat16 or float16, see dtype",
    "revision": "fetch the revision and give its folder as model",
    "speculative_config": _DRAFTS,
    "speculative_model": _DRAFTS,
    "swap_space": _NO_OFFLOAD,
    "tokenizer_mode": "jpd loads fast tokenizers only",
    "trust_remote_code": "jpd never runs code that comes with a checkpoint",
}


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises `ConfigError` that names the field, its value and what is allowed."""
    if not ok:
        raise ConfigError(f"{name}={value!r} is not allowed: {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _decides(value: object) -> bool:
    """It is an object with `decide`, and not the class of one."""
    return hasattr(value, "decide") and not isinstance(value, type)


def check_names(cls: type, names: Iterable[str]) -> None:
    """Raises `UnknownArgumentError` for a name that is not a field of the dataclass."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise UnknownArgumentError(f"{cls.__name__} has no field {name!r}{hint}")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Which implementation of each op the model runs; see `jpd.ops.implementations()`."""

    linear: str = "auto"
    """Matrix product with a weight `[N, K]`, with bias and residual."""
    gated_linear: str = "auto"
    """Product with gate and up weights, and silu(gate) * up."""
    rms_norm: str = "auto"
    """Root-mean-square norm of rows; a norm before a product is part of the product's op."""
    rope_write: str = "auto"
    """Rotation of queries and keys, and store of new keys and values into their pages."""
    decode_attention: str = "auto"
    """Attention of one new token per sequence over paged KV."""
    prefill_attention: str = "auto"
    """Causal attention of prompt chunks over paged KV."""
    matmul_all_reduce: MatmulAllReduce = "auto"
    """Product of a row-parallel layer and its sum over ranks, in steps with prompt tokens:
    "overlap" hides the sum behind the product, "xla" has one after the other, "auto" is "overlap"
    where there is a plan by which that is faster. Decode steps do as with "xla"."""
    self_check: bool = True
    """Compare what the steps run with a reference on the host before anything is served. An
    implementation of your own that computes something else on purpose needs False."""
    pallas_only: bool = False
    """Refuse XLA's implementation of every op: a compiled step then holds no call of cuBLAS, cuDNN
    or Triton, and what no kernel takes is an error."""

    def __post_init__(self) -> None:
        for name in ("self_check", "pallas_only"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"kernels.{name}", value, "True or False")
        value, allowed = self.matmul_all_reduce, MatmulAllReduce.__args__
        require(value in allowed, "kernels.matmul_all_reduce", value, f"one of {list(allowed)}")


@dataclass(frozen=True, kw_only=True)
class SemiPDConfig:
    """Prefill and decode in processes of their own (`topology="semi_pd"`; arXiv 2504.19867)."""

    prefill_share: int = 100
    """SM share of the prefill executor in percent, to begin with; the paper's x."""
    decode_share: int = 100
    """SM share of the decode executor in percent, to begin with; the paper's y. Both may sum to
    more than 100: then the phases compete for the SMs that they have in common."""
    sm_shares: bool = True
    """Give processes their shares, by MPS on a GPU and by CPU affinity without one. Under MPS
    `kernels.pallas_only` holds: cuBLAS computes wrong numbers on a part of the SMs. With False
    a GPU gives both processes slices of its time; both shares are 100 then."""
    controller: Any = "auto"
    """Who changes the shares while requests are served: "static" nobody, "paper" Algorithm 1 of the
    paper, "slo" jpd's own, "mean" the same without SLOs, for the least mean end-to-end time; or
    an object with `decide`, see `jpd.semi_pd.controller`. "auto": nobody, but for `topology="auto"`
    where shares, `break_even` and `prefill_policy` are left as they are: there "slo" if SLOs are
    given, else "mean"."""
    ttft_slo_s: float | None = None
    """Time to the first token that "paper" and "slo" aim at, met by 90 % of the requests."""
    tpot_slo_s: float | None = None
    """Time per token after the first that they aim at."""
    control_interval_s: float = 0.1
    """Seconds between two questions to the controller, and to who decides for `topology="auto"`."""
    step_timeout_s: float = 300.0
    """An executor that has not reported a step for so long is replaced. Long enough for a step that
    has to be compiled first."""
    start_timeout_s: float = 600.0
    """An executor that is not ready so long after its start is ended, as one that failed. Long
    enough to compile every step shape with nothing in the cache."""
    check_ownership: bool = False
    """Debugging: every executor checks before and after each step that no page of the step was
    given to another sequence meanwhile. A page that was ends the engine with an error."""
    kept_shares: tuple[tuple[int, int], ...] = ()
    """(prefill, decode) shares whose executors are kept ready beside those that serve, so that a
    switch to them is a hand-over between two steps. Each costs a process and its work space.
    `topology="auto"` also keeps decode executors on `decode_share` and on all SMs. Where
    `controller="auto"` takes one of jpd's and none are given, (100, 100) and (70, 30)."""
    break_even: float | None = None  # or an object: a command line has numbers alone
    """For `topology="auto"`, who says whether one executor or two serve. None: the controller, if
    it foresees both, as jpd's do ("slo", "mean"; `jpd.semi_pd.mode.ForeseenMode`) with
    `prefill_policy="mixed"`, else 1.5. A number: how many requests two executors must save for each
    one that waits for its first token (`jpd.semi_pd.mode.BreakEven`). Or an object with `decide`.
    """

    def __post_init__(self) -> None:
        for name in ("prefill_share", "decode_share"):
            value = getattr(self, name)
            ok = _is_int(value) and 1 <= value <= 100
            require(ok, f"semi_pd.{name}", value, "an int of percent, 1 to 100")
        for name in ("sm_shares", "check_ownership"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"semi_pd.{name}", value, "True or False")
        timeouts = ("step_timeout_s", "start_timeout_s")
        for name in ("control_interval_s", *timeouts, "ttft_slo_s", "tpot_slo_s"):
            value = getattr(self, name)
            ok = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            ok = ok or (value is None and name.endswith("slo_s"))
            require(ok, f"semi_pd.{name}", value, "a number of seconds above 0")
        kept = self.kept_shares
        ok = isinstance(kept, list | tuple) and all(
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(_is_int(share) and 1 <= share <= 100 for share in pair)
            for pair in kept
        )
        require(ok, "semi_pd.kept_shares", kept, "pairs of ints of percent, 1 to 100")
        object.__setattr__(self, "kept_shares", tuple(tuple(pair) for pair in kept))
        named = isinstance(self.controller, str)
        ok = self.controller in Controller.__args__ if named else _decides(self.controller)
        allowed = f"one of {list(Controller.__args__)} or an object with decide"
        require(ok, "semi_pd.controller", self.controller, allowed)
        for name in ("ttft_slo_s", "tpot_slo_s"):
            value = getattr(self, name)
            needed = named and self.controller in ("paper", "slo")
            require(not needed or value is not None, f"semi_pd.{name}", value, "a time in seconds")
        even = self.break_even
        number = isinstance(even, int | float) and not isinstance(even, bool)
        ok = 0 < even < math.inf if number else even is None or _decides(even)
        require(ok, "semi_pd.break_even", even, "a number above 0, or an object with decide")
        if not self.sm_shares:
            full = self.prefill_share == self.decode_share == 100 and not self.kept_shares
            require(
                full and not self.is_controlled,
                "semi_pd.sm_shares",
                False,
                "True with shares below 100, kept_shares or a controller",
            )

    @property
    def is_controlled(self) -> bool:
        """Shares may change while requests are served."""
        return self.controller not in ("static", "auto")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that decides how an engine is built."""

    model: str
    """Folder of a Hugging Face or Orbax checkpoint, or a Hugging Face name when online."""
    tokenizer: str | None = None
    """Folder or name of the tokenizer; the model's own when not given."""
    skip_tokenizer_init: bool = False
    """Serve token ids only; `text` of every output stays empty."""
    dtype: Dtype = "auto"
    """Type of weights, activations and KV; "auto" takes the checkpoint's."""
    load_format: LoadFormat = "auto"
    """"dummy" makes random weights on the device, for benchmarks at real scale."""
    seed: int = 0
    """Seed of dummy weights and of requests that bring no seed of their own."""
    max_model_len: int | None = None
    """Tokens a sequence may hold, prompt and output; the model's own limit when not given."""
    max_num_seqs: int | None = None
    """Sequences that run at once; 256 on a GPU and 16 on a CPU when not given."""
    max_num_batched_tokens: int | None = None
    """Prompt tokens plus decoding rows in one step, padded ones included unless these are more than
    half of it; longer prompts are prefilled in chunks. 2048 on a GPU and 512 on a CPU when not
    given."""
    max_num_mixed_tokens: int | None = None
    """The same of a step that has both, whose prompt tokens hold up who decodes: with fewer, gaps
    between tokens are shorter, and prompts take more steps. At least `max_num_seqs`. When not
    given `max_num_batched_tokens`, but on a GPU with `topology="auto"` 1024 if that is less. It is
    for one executor that serves both phases: those of one phase have no such steps, nor has
    `prefill_policy="first"`."""
    max_prefills_per_step: int = 8
    """Sequences that may have a prompt chunk in one step."""
    page_size: int = 16
    """Tokens a KV page holds."""
    num_pages: int | None = None
    """KV pages; from `gpu_memory_utilization` when not given."""
    gpu_memory_utilization: float = 0.9
    """Share of the memory that jax has on the device for weights, KV pages and work space."""
    enable_prefix_caching: bool = True
    """Reuse the KV pages of equal prompt prefixes."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """Which prompt in the queue is begun next: "fcfs" the first that came; "priority" one of the
    lowest `priority`; "shortest" a short one: each is overtaken by those that come up to 5 ms later
    for every token by which they are shorter, 40 s for 8000 tokens, but not for ever. Where prompts
    queue, as they do for prefill executors with a part of the SMs, that shortens the mean TTFT, and
    long prompts pay for it. A request that has given tokens is overtaken by none that come after
    it."""
    prefill_policy: PrefillPolicy = "mixed"
    """Where one executor computes both phases: "mixed" lets prompt chunks ride along with decoding
    rows (chunked prefill); "first" computes prompts alone, and decodes when none can be computed
    (vLLM's old default)."""
    async_scheduling: bool = True
    """Launch the next step before the tokens of the running one are read."""
    batch_buckets: tuple[int, ...] | None = None
    """Decoding rows that steps are compiled for; when not given, powers of two and, above 32, what
    is halfway between. Steps that hold prompts too have only those of them that hold 8, 32, 128 and
    so on, and the largest."""
    token_buckets: tuple[int, ...] | None = None
    """Prompt tokens plus padded decoding rows that steps with prompts are compiled for."""
    context_buckets: tuple[int, ...] | None = None
    """Context lengths in tokens that steps are compiled for."""
    compile_sampled_steps: bool = True
    """Compile the steps in which a decoding row is sampled, or its log-probabilities are wanted, at
    the start, like those that are greedy throughout. Without them a start compiles about half as
    many; it is for engines that get greedy requests alone. The first steps of another request are
    then compiled while requests wait (`stats.recompiles`)."""
    compilation_cache_dir: str | None = None
    """Folder of the persistent compilation cache; "" leaves jax's own setting as it is. When not
    given, the folder that jax is set to, or else `~/.cache/jpd/xla`."""
    show_progress: bool = True
    """Progress bars for loading and compiling, on stderr."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    """Implementation of each op."""
    topology: Topology = "unified"
    """"unified" runs both phases on one executor in this process; "semi_pd" each on executors of
    their own, which share one copy of weights and KV pages; "auto" has the executors of "semi_pd"
    and lets one of them run both phases while that is better (where they cannot be had, for want of
    MPS, it becomes "unified" and warns); "disaggregated" each on a device of its
    own, with `num_pages` on each, and sends the KV of a prompt while it is computed."""
    semi_pd: SemiPDConfig = field(default_factory=SemiPDConfig)
    """SM shares of the two phases."""
    tensor_parallel_size: int = 1
    """Devices that every layer and every KV page is split over, by heads and channels; how is in
    `jpd.parallel`. A divisor of the model's heads, `intermediate_size` and `vocab_size`. With
    topology="semi_pd" both phases are on the same devices, with "disaggregated" prefill is on the
    first so many and decode on the next."""

    def __post_init__(self) -> None:
        at_least = {
            "max_model_len": 1,
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
            "max_num_mixed_tokens": 1,
            "max_prefills_per_step": 1,
            "page_size": 1,
            "num_pages": 2,  # page 0 is never given out: padded rows write there
            "tensor_parallel_size": 1,
        }
        for name, least in at_least.items():
            value, optional = getattr(self, name), getattr(EngineConfig, name) is None
            if value is not None or not optional:
                ok = _is_int(value) and value >= least
                require(ok, name, value, f"an int >= {least}")
        for f in dataclasses.fields(self):
            if f.type == "bool":
                value = getattr(self, f.name)
                require(isinstance(value, bool), f.name, value, "True or False")
        require(_is_int(self.seed), "seed", self.seed, "an int")
        require(isinstance(self.kernels, KernelConfig), "kernels", self.kernels, "a KernelConfig")
        require(isinstance(self.semi_pd, SemiPDConfig), "semi_pd", self.semi_pd, "a SemiPDConfig")
        require(
            self.topology in ("semi_pd", "auto") or self.semi_pd == SemiPDConfig(),
            "semi_pd",
            self.semi_pd,
            "only with topology='semi_pd' or 'auto'",
        )
        require(
            self.topology == "auto" or self.semi_pd.break_even is None,
            "semi_pd.break_even",
            self.semi_pd.break_even,
            "only with topology='auto'",
        )
        require(
            self.topology in ("unified", "auto") or self.prefill_policy == "mixed",
            "prefill_policy",
            self.prefill_policy,
            "only with topology='unified' or 'auto'",
        )
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None:
            require(
                tokens <= MAX_STEP_TOKENS,
                "max_num_batched_tokens",
                tokens,
                f"at most {MAX_STEP_TOKENS}",
            )
        mixed = self.max_num_mixed_tokens
        for name, value in (("max_num_batched_tokens", tokens), ("max_num_mixed_tokens", mixed)):
            if value is not None and seqs is not None:
                require(value >= seqs, name, value, f"at least max_num_seqs={seqs}")
        if mixed is not None and tokens is not None:
            most = f"at most max_num_batched_tokens={tokens}"
            require(mixed <= tokens, "max_num_mixed_tokens", mixed, most)
        require(
            self.page_size & (self.page_size - 1) == 0,
            "page_size",
            self.page_size,
            "a power of two",
        )
        share = self.gpu_memory_utilization
        require(
            isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1,
            "gpu_memory_utilization",
            share,
            "in (0, 1]",
        )
        for name, allowed in (
            ("dtype", Dtype),
            ("load_format", LoadFormat),
            ("scheduling_policy", SchedulingPolicy),
            ("prefill_policy", PrefillPolicy),
            ("topology", Topology),
        ):
            value = getattr(self, name)
            require(value in allowed.__args__, name, value, f"one of {list(allowed.__args__)}")
        for name in ("batch_buckets", "token_buckets", "context_buckets"):
            value = getattr(self, name)
            if value is not None:
                ok = isinstance(value, list | tuple) and len(value) > 0
                ok = ok and all(_is_int(v) and v > 0 for v in value)
                require(ok, name, value, "a non-empty tuple of positive ints")
                object.__setattr__(self, name, tuple(sorted(set(value))))

    @classmethod
    def from_kwargs(cls, model: str, **kwargs: Any) -> EngineConfig:
        """Builds a config.

        Raises:
          UnknownArgumentError: a keyword that is no field; the message names the nearest one, or
            what jpd has instead of an argument of vLLM's.
          ConfigError: a value that is not allowed.
        """
        for name in kwargs:
            if name in _VLLM_NAMES:
                raise UnknownArgumentError(
                    f"{name}={kwargs[name]!r} of vLLM is not supported by jpd: {_VLLM_NAMES[name]}"
                )
        check_names(cls, kwargs)
        for name, group in (("kernels", KernelConfig), ("semi_pd", SemiPDConfig)):
            given = kwargs.get(name)
            if isinstance(given, dict):
                check_names(group, given)
                kwargs[name] = group(**given)
        return cls(model=str(model), **kwargs)

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)
