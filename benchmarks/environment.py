"""Which machine and which versions a result comes from.

Everything is looked up from outside (installed package metadata, nvidia-smi, git): importing JAX
or torch here would start a GPU context in the middle of somebody's measurement.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from jpd.bench.environment import query_gpus, version


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """Standard output of a command, or None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1).strip() if found else platform.machine()
    return f"{name} x {os.cpu_count()}"


def capture_env() -> dict[str, Any]:
    """Describes this machine: hardware, driver, package versions; None for what is not there.

    ``gpu`` is the name of the first GPU that nvidia-smi lists and ``gpu_count`` how many it lists.
    Package versions are those of the interpreter that runs this.
    """
    listed = query_gpus("name", "driver_version")
    lines = [] if isinstance(listed, str) else listed
    gpus = [line.rsplit(",", 1) for line in lines if "," in line]
    return {
        "gpu": gpus[0][0].strip() if gpus else None,
        "gpu_count": len(gpus),
        "driver": gpus[0][1].strip() if gpus else None,
        "cuda": version("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "nccl": version("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "cpu": _cpu_name(),
    }


def gpu_slug(name: str | None) -> str:
    """Folder name of a GPU: "NVIDIA H100 80GB HBM3" → "h100"; None (no GPU) → "cpu"."""
    if name is None:
        return "cpu"
    words = [w for w in re.split(r"[^a-z0-9]+", name.lower()) if w]
    noise = re.compile(r"nvidia|tesla|geforce|quadro|sxm\d*|pcie|nvl|hbm\d*e?|\d+gb")
    kept = [w for w in words if not noise.fullmatch(w)]
    return "-".join(kept or words)


def git_commit(root: Path | None = None) -> str | None:
    """Commit hash of the checkout, "-dirty" appended for changes outside the results folder.

    None where there is no repository or no commit. Stored results don't count as changes: a run of
    several benchmarks would otherwise call itself dirty from the second one on. A copy of the tree
    without `.git` can be told its commit by the environment variable GIT_COMMIT.
    """
    if told := os.environ.get("GIT_COMMIT"):
        return told
    root = root or Path(__file__).parent.parent
    commit = _output("git", "rev-parse", "HEAD", cwd=root)
    if commit is None:
        return None
    changes = _output(
        "git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", cwd=root
    )
    return commit.strip() + ("-dirty" if changes is None or changes.strip() else "")


def command_line() -> str:
    return shlex.join(["python", *sys.orig_argv[1:]])
