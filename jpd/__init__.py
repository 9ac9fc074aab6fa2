"""jpd: an LLM serving system in JAX/Flax for NVIDIA GPUs, and for CPUs to try it on."""

import importlib
from typing import TYPE_CHECKING, Any

from jpd.config import EngineConfig, KernelConfig
from jpd.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    JpdError,
    PromptTooLongError,
    RequestError,
    UnknownArgumentError,
)
from jpd.types import (
    CompletionOutput,
    Delta,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

if TYPE_CHECKING:
    from jpd.async_llm import AsyncLLM
    from jpd.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "JpdError",
    "KernelConfig",
    "Logprob",
    "PromptTooLongError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "UnknownArgumentError",
]


_SUBMODULES = ("box", "checkpoint", "models", "ops")


def __getattr__(name: str) -> Any:
    # The engine imports jax, which takes seconds; configuration and types do not need it.
    if name in _SUBMODULES:
        return importlib.import_module(f"jpd.{name}")
    if name == "LLM":
        from jpd.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from jpd.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module 'jpd' has no attribute {name!r}")
