"""How much memory the device has, and how many KV pages fit beside the model."""

from __future__ import annotations

import math
import os

import jax

from jpd.config import EngineConfig
from jpd.engine.shapes import ShapeTable
from jpd.errors import ConfigError
from jpd.models import ModelConfig
from jpd.ops.attention import BLOCK_BYTES

_GIB = 1 << 30


def device_memory(device: jax.Device) -> int:
    """Bytes that this process may use on the device; on a CPU, the memory that is available."""
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return host_memory()


def host_memory() -> int:
    """Bytes that are available on the host."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_of_rank(array: jax.Array) -> int:
    """Bytes of an array on each of the devices that it lies on."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def page_bytes(config: EngineConfig, model: ModelConfig, itemsize: int) -> int:
    """Bytes of one page over all layers."""
    heads = model.num_kv_heads * model.head_dim
    return 2 * model.num_layers * config.page_size * heads * itemsize


def work_bytes(config: EngineConfig, model: ModelConfig, shapes: ShapeTable) -> int:
    """Estimated work space of the largest step: activations, gathered pages, logits, histories."""
    tokens = shapes.most_rows
    wide = max(2 * model.ffn_size, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim)
    activations = 4 * tokens * (wide + 4 * model.hidden_size)
    rows = shapes.batches[-1] + config.max_prefills_per_step
    logits = 6 * 4 * rows * model.vocab_size
    gathered = 3 * BLOCK_BYTES
    histories = 4 * (config.max_num_seqs + 1 + 4 * rows) * (config.max_model_len + 1)
    return activations + logits + gathered + histories


def check_model_fits(model_bytes: int, limit: int, utilization: float, device: object) -> None:
    """Raises `ConfigError` before a model is loaded that cannot fit."""
    usable = int(limit * utilization)
    if model_bytes > usable:
        raise ConfigError(
            f"the model's weights need {model_bytes / _GIB:.2f} GiB; {device} has "
            f"{limit / _GIB:.2f} GiB, of which gpu_memory_utilization={utilization} allows "
            f"{usable / _GIB:.2f} GiB"
        )


def check_pages_fit(
    config: EngineConfig, model: ModelConfig, *, limit: int, model_bytes: int, itemsize: int
) -> None:
    """Raises `ConfigError` before pages are made that cannot fit beside the weights."""
    each = page_bytes(config, model, itemsize)
    if model_bytes + config.num_pages * each > limit:
        raise ConfigError(
            f"num_pages={config.num_pages} of {each / 2**20:.2f} MiB do not fit: beside the "
            f"weights' {model_bytes / _GIB:.2f} GiB the device's {limit / _GIB:.2f} GiB have room "
            f"for at most {(limit - model_bytes) // each}"
        )


def num_pages(
    config: EngineConfig,
    model: ModelConfig,
    shapes: ShapeTable,
    *,
    limit: int,
    model_bytes: int,
    itemsize: int,
    executors: int = 1,
    copies: int = 1,
) -> int:
    """Pages that fit in what weights and work spaces leave, and no more than can be used.

    `copies` of the pages are there at once while executors work.

    Raises:
      ConfigError: fewer than two pages fit.
    """
    work = executors * work_bytes(config, model, shapes)
    left = int(limit * config.gpu_memory_utilization) - model_bytes - work
    fit = left // (copies * page_bytes(config, model, itemsize))
    longest = -(-config.max_model_len // config.page_size)
    pages = min(fit, longest * config.max_num_seqs + 1)
    if pages < 2:
        raise ConfigError(
            f"no memory is left for KV pages: {limit / _GIB:.2f} GiB x gpu_memory_utilization="
            f"{config.gpu_memory_utilization} - weights {model_bytes / _GIB:.2f} GiB - work space "
            f"{work / _GIB:.2f} GiB (lower max_num_batched_tokens={config.max_num_batched_tokens} "
            f"or max_num_seqs={config.max_num_seqs})"
        )
    return pages
