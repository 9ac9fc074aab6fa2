"""What jpd runs on: versions, devices, driver. Nothing here fails where something is missing.

Only `describe` imports jax: to look at jax's devices is to start it on them.
"""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import jpd

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
    from jpd import ops

    return {
        "jpd": jpd.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in _PACKAGES},
        "gpus": query_gpus("name", "driver_version", "memory.total", "compute_cap"),
        "devices": _devices(),
        "implementations": ops.implementations(),
        "kernels": ops.describe_kernels(),
        "compilation_cache_dir": _cache_dir(),
    }


def version(*packages: str) -> str | None:
    """Version of the first of these packages that is installed."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def query_gpus(*fields: str) -> list[str] | str:
    """These fields of nvidia-smi, one line for each GPU; or why there are none."""
    try:
        run = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
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
    import jax

    try:
        return [f"{device} ({device.device_kind})" for device in jax.devices()]
    # JAX_PLATFORMS asks for what is not there; without its plugin, JAX fails an assertion.
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        return f"none with JAX_PLATFORMS={asked}: {type(error).__name__} {error}".rstrip()


def _cache_dir() -> str | None:
    import jax

    from jpd.engine.compile import use_cache_dir

    try:
        use_cache_dir(None)
    except OSError as error:
        return f"cannot be made: {error}"
    return jax.config.jax_compilation_cache_dir
