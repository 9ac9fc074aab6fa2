"""What jpd runs on: versions, devices, driver. Nothing here fails where something is missing."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import jax

import jpd
from jpd import ops
from jpd.engine.compile import use_cache_dir

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)


def describe() -> dict[str, Any]:
    """Everything, by name; what is not installed or not there is None or says why."""
    return {
        "jpd": jpd.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpus": _nvidia_smi(),
        "devices": _devices(),
        "implementations": ops.implementations(),
        "compilation_cache_dir": _cache_dir(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> list[str] | str:
    """One line for each GPU: name, driver, memory, compute capability."""
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    try:
        run = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not run: {error}"
    if run.returncode != 0:
        return f"nvidia-smi fails: {(run.stdout or run.stderr).strip()}"
    return run.stdout.strip().splitlines()


def _devices() -> list[str] | str:
    try:
        return [f"{device} ({device.device_kind})" for device in jax.devices()]
    # JAX_PLATFORMS asks for what is not there; without its plugin, JAX fails an assertion.
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        return f"none with JAX_PLATFORMS={asked}: {type(error).__name__} {error}".rstrip()


def _cache_dir() -> str | None:
    try:
        use_cache_dir(None)
    except OSError as error:
        return f"cannot be made: {error}"
    return jax.config.jax_compilation_cache_dir
