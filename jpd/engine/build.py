"""From a configuration to a running engine: resolve, load, allocate, compile."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpd import checkpoint, ops
from jpd.config import EngineConfig, require
from jpd.engine import memory
from jpd.engine.compile import use_cache_dir
from jpd.engine.coordinator import Coordinator
from jpd.engine.executor import Executor
from jpd.engine.lane import OneExecutor, Topology
from jpd.engine.rank_step import overlaps
from jpd.engine.shapes import ShapeTable, shape_table
from jpd.errors import ConfigError
from jpd.models import ModelConfig, Params
from jpd.ops import self_check, sum_check
from jpd.parallel import ManyDevices, Placement, Split, place
from jpd.text import Tokenizer

logger = logging.getLogger(__name__)

_MIXED_TOKENS = 1024
"""Of a step with prompts and rows, on a GPU, where one executor of `topology="auto"` serves: mean
end-to-end times on an H200 were shorter than with 2048 at every rate measured
(`semi_pd_serving_mixed_tokens.json`)."""
_JAX_MEMORY_SHARE = "0.95"
"""The rest is for what is not JAX's: CUDA's context, loaded programs, and, of several GPUs, NCCL's
buffers for XLA's collectives and for those that overlap, some hundred MiB a communicator."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A coordinator with everything it was built from."""

    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    topology: Topology
    coordinator: Coordinator

    @property
    def executor(self) -> Executor:
        """The executor of an engine that runs in this process.

        Raises:
          ConfigError: they run in processes of their own.
        """
        if not isinstance(self.topology, OneExecutor):
            raise ConfigError(
                f"topology={self.config.topology!r} keeps parameters and pages in other processes; "
                "topology='unified' has them in this one"
            )
        return self.topology.executor


def resolve(config: EngineConfig, model: ModelConfig, *, on_cpu: bool) -> EngineConfig:
    """The config with every "auto" and None decided, but for `num_pages`.

    Raises:
      ConfigError: `max_model_len` exceeds the model's own limit, or `max_num_mixed_tokens` is less
        than the default of `max_num_seqs`.
    """
    longest = config.max_model_len or model.max_position
    require(
        longest <= model.max_position,
        "max_model_len",
        longest,
        f"at most the model's max_position_embeddings={model.max_position}",
    )
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    mixed = config.max_num_mixed_tokens
    default_seqs, default_tokens = (16, 512) if on_cpu else (256, 2048)
    tokens = tokens or max(default_tokens, seqs or 0, mixed or 0)
    seqs = seqs or min(default_seqs, tokens)
    if mixed is None:
        small = config.topology == "auto" and not on_cpu
        mixed = max(seqs, min(tokens, _MIXED_TOKENS)) if small else tokens
    resolved = config.replace(
        dtype=model.dtype if config.dtype == "auto" else config.dtype,
        max_model_len=longest,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_num_mixed_tokens=mixed,
    )
    for buckets, most in (
        ("batch_buckets", "max_num_seqs"),
        ("token_buckets", "max_num_batched_tokens"),
        ("context_buckets", "max_model_len"),
    ):
        given, limit = getattr(resolved, buckets), getattr(resolved, most)
        if given is not None and given[-1] < limit:
            logger.warning(
                "%s end at %d, %s=%d: larger steps will be compiled while requests wait",
                buckets,
                given[-1],
                most,
                limit,
            )
    return resolved


def default_device() -> jax.Device:
    """The first device that jax finds.

    On a GPU jax takes 75 % of the memory when it starts, too little for an engine that is to use
    90; if jax has not started yet and nobody else chose, it takes 95.

    Raises:
      ConfigError: the platform that JAX_PLATFORMS names cannot be used.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _JAX_MEMORY_SHARE)
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(
            f"jax finds no device with JAX_PLATFORMS={platforms!r} (a GPU needs jpd[cuda12] or "
            f"jpd[cuda13]): {type(error).__name__} {error}"
        ) from error


def devices_for(config: EngineConfig, device: jax.Device) -> list[jax.Device]:
    """As many devices of its kind as the model is split over, `device` the first of them.

    Raises:
      ConfigError: there are fewer.
    """
    others = [d for d in jax.local_devices(backend=device.platform) if d != device]
    require(
        config.tensor_parallel_size <= 1 + len(others),
        "tensor_parallel_size",
        config.tensor_parallel_size,
        f"at most {1 + len(others)}, the number of {device.platform} devices that jax finds",
    )
    return [device, *others][: config.tensor_parallel_size]


def check_memory(executor: Executor, model_bytes: int, limit: int) -> None:
    """Raises `ConfigError` if weights, pages and the work space of the largest step do not fit."""
    kv = sum(memory.bytes_of_rank(leaf) for leaf in jax.tree.leaves(executor.kv))
    work = executor.compiled.temp_bytes()
    if model_bytes + kv + work > limit:
        gib = 1 << 30
        raise ConfigError(
            f"weights {model_bytes / gib:.2f} GiB + KV pages {kv / gib:.2f} GiB + work space of "
            f"the largest step {work / gib:.2f} GiB exceed the device's {limit / gib:.2f} GiB: "
            "lower num_pages, gpu_memory_utilization or max_num_batched_tokens"
        )


def widths_of(config: EngineConfig, model: ModelConfig) -> self_check.Widths:
    """What the shapes of a rank's ops follow from."""
    return self_check.Widths(
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=config.page_size,
        windows=model.windows,
        dtype=config.dtype,
        eps=model.rms_eps,
        qk_norm=model.qk_norm,
        sums=config.tensor_parallel_size > 1,
    )


def check_kernels(
    config: EngineConfig, model: ModelConfig, params: Params, device: jax.Device
) -> None:
    """Compares what the steps will run with a reference, on a GPU or where a kernel was registered.

    Raises:
      KernelError: something is wrong on this machine.
    """
    selected = {
        name
        for op, names in ops.implementations().items()
        for name in (
            names if getattr(config.kernels, op) == "auto" else [getattr(config.kernels, op)]
        )
    }
    if device.platform != "gpu" and not selected - {"xla", "pallas"}:
        return
    if not config.kernels.self_check:
        logger.warning("kernels.self_check=False: nothing compared this machine's kernels")
        return
    shapes = shape_table(config)
    rows = sorted({shape.batch + shape.tokens for shape in shapes.all()})
    # Every decoding row, and the last of each chunk.
    chunks = config.max_prefills_per_step
    ends = sorted({shape.batch + (chunks if shape.tokens else 0) for shape in shapes.all()})
    layer = params["layers"][0]
    attention, mlp = layer["attention"], layer["mlp"]
    head = params["embed"] if model.tie_embeddings else params["lm_head"]

    def product(
        name: str, layer: Params, rows: Sequence[int], **options: Any
    ) -> self_check.Product:
        return self_check.Product(name, layer["weight"], rows, layer.get("bias"), **options)

    checked = self_check.run(
        widths_of(config, model),
        config.kernels,
        [
            product("qkv", attention["qkv"], rows, eps=model.rms_eps),
            product("out", attention["out"], rows, residual=True),
            product("gate and up", mlp["gate_up"], rows, gated=True, eps=model.rms_eps),
            product("down", mlp["down"], rows, residual=True),
            product("logits", head, ends),
        ],
        shapes.batches,
        device,
    )
    logger.info("kernels agree with their references: %s", "; ".join(checked))


def check_ranks(
    config: EngineConfig,
    split: Split,
    params: Params,
    placement: Placement,
    shapes: ShapeTable,
) -> None:
    """`check_kernels` on every device of a placement, each with its part of the parameters, and the
    sums that hide behind products in steps of these shapes on all of them.

    Raises:
      KernelError: something is wrong on this machine.
    """
    for rank, device in enumerate(placement.devices):
        check_kernels(config, split.rank_model, placement.of_rank(params, rank), device)
    if isinstance(placement, ManyDevices):
        check_sums(config, split, params, placement.mesh, shapes)


def check_sums(
    config: EngineConfig,
    split: Split,
    params: Params,
    mesh: jax.sharding.Mesh,
    shapes: ShapeTable,
) -> None:
    """Compares sums that will hide behind products with a reference, where plans ask for that.

    Raises:
      KernelError: something is wrong on this machine.
    """
    if not config.kernels.self_check or config.kernels.matmul_all_reduce == "xla":
        return
    rows = sorted({shape.batch + shape.tokens for shape in filter(overlaps, shapes.all())})
    layer = params["layers"][0]
    layers = {"heads": ("out", layer["attention"]["out"]), "ffn": ("down", layer["mlp"]["down"])}
    sums = [
        sum_check.Sum(name, part["weight"], rows)
        for axis, (name, part) in layers.items()
        if axis in split.cut_axes
    ]
    checked = sum_check.run(widths_of(config, split.rank_model), config.kernels, sums, mesh)
    if checked:
        logger.info("overlapped sums agree with their references: %s", "; ".join(checked))


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of an engine that needs no device."""

    config: EngineConfig
    """Resolved, with `num_pages`."""
    split: Split
    """Of the model, over `tensor_parallel_size` ranks."""
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    model_bytes: int
    """Of one rank."""
    phi: np.ndarray | None

    @property
    def model(self) -> ModelConfig:
        """The whole model."""
        return self.split.model


def prepare(
    config: EngineConfig, *, on_cpu: bool, limit: int, device: object, executors: int = 1
) -> Prepared:
    """Decides everything that is open and reads what is small.

    Args:
      config: as the user gave it.
      on_cpu: steps run on a CPU.
      limit: bytes of each device that weights, KV pages and work space share.
      device: for messages.
      executors: that share weights and pages on the devices, each with its work space.

    Raises:
      ConfigError: the configuration, the checkpoint or the machine does not allow it.
    """
    ops.check(config.kernels)
    folder = checkpoint.resolve_folder(config.model, weights=config.load_format != "dummy")
    model = checkpoint.read_config(folder)
    config = resolve(config.replace(model=str(folder)), model, on_cpu=on_cpu)
    # What one rank has; of logits all have the whole.
    split = Split(model, config.tensor_parallel_size)
    part = split.rank_model
    model_bytes = checkpoint.param_bytes(part, config.dtype)
    sized = part.replace(vocab_size=model.vocab_size)
    memory.check_model_fits(model_bytes, limit, config.gpu_memory_utilization, device)
    sizes = {
        "limit": limit,
        "model_bytes": model_bytes,
        "itemsize": jnp.dtype(config.dtype).itemsize,
    }
    if config.num_pages is None:
        shapes = shape_table(config)
        # XLA's CPU client copies pages that are not its own memory, in each executor.
        copies = 1 + executors if on_cpu and config.topology != "unified" else 1
        pages = memory.num_pages(config, sized, shapes, executors=executors, copies=copies, **sizes)
        config = config.replace(num_pages=pages)
    memory.check_pages_fit(config, sized, **sizes)
    tokenizer = None
    if not config.skip_tokenizer_init:
        named = config.tokenizer
        tokenizer = Tokenizer.load(
            checkpoint.resolve_folder(named, weights=False) if named else folder
        )
        if tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
                f"{model.vocab_size}"
            )
    eos = set(model.eos_token_ids) | set(tokenizer.eos_token_ids if tokenizer else ())
    # Random weights have scores of their own.
    phi = None if config.load_format == "dummy" else checkpoint.load_phi(folder, model)
    logger.info("%s", config)
    return Prepared(config, split, tokenizer, tuple(sorted(eos)), model_bytes, phi)


def build(config: EngineConfig, device: jax.Device | None = None) -> Engine:
    """Loads the model and compiles its steps, for one executor in this process.

    Raises:
      ConfigError: the configuration, the checkpoint or the machine does not allow it.
    """
    devices = devices_for(config, device or default_device())
    device = devices[0]
    limit = min(map(memory.device_memory, devices))
    if device.platform == "cpu":
        limit //= len(devices)  # of one host
    prepared = prepare(config, on_cpu=device.platform == "cpu", limit=limit, device=device)
    config, model = prepared.config, prepared.model
    use_cache_dir(config.compilation_cache_dir)
    placement = place(prepared.split, devices)
    _, params = checkpoint.load(
        config.model,
        dtype=config.dtype,
        load_format=config.load_format,
        seed=config.seed,
        show_progress=config.show_progress,
        placement=placement,
    )
    shapes = shape_table(config)
    check_ranks(config, prepared.split, params, placement, shapes)
    executor = Executor(
        config,
        model,
        params,
        device,
        prepared.eos_token_ids,
        prepared.phi,
        shapes=shapes,
        placement=placement,
    )
    executor.compile_ahead()
    check_memory(executor, prepared.model_bytes, limit)
    if device.platform == "gpu":
        executor.run_for_nobody()
    topology = OneExecutor(executor, config.max_num_seqs, depth=1 + config.async_scheduling)
    return assemble(prepared, topology)


def assemble(prepared: Prepared, topology: Topology) -> Engine:
    """An engine on a topology that is ready."""
    coordinator = Coordinator(
        prepared.config, prepared.model, topology, prepared.tokenizer, prepared.eos_token_ids
    )
    return Engine(prepared.config, prepared.model, prepared.tokenizer, topology, coordinator)
