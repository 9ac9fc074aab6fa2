"""Why MPS cannot be started here, in words that say what to do."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from native.mps_control import CONTROL, PIPE_VARIABLE, MpsError, ask, daemon_of

DEVICE = Path("/dev/nvidiactl")
"""Is there with an NVIDIA driver, also in containers."""
DEFAULT_PIPE = Path("/tmp/nvidia-mps")
"""Where a daemon listens that was started without CUDA_MPS_PIPE_DIRECTORY."""

_TIMEOUT_S = 10


def require_mps() -> None:
    """Refuses a machine without MPS.

    Raises:
        MpsError: no GPU that this process may use, or no MPS.
    """
    if not DEVICE.exists():
        raise MpsError(f"MPS needs an NVIDIA GPU, and there is no {DEVICE}")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise MpsError(f"no permission to use the GPU: {DEVICE} cannot be read and written")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        raise MpsError(f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU")
    if shutil.which(CONTROL) is None:
        found = shutil.which(CONTROL, mode=os.F_OK)
        if found is not None:
            raise MpsError(f"no permission to run {found}")
        raise MpsError(
            f"{CONTROL} is not installed (not on PATH): it comes with the NVIDIA driver, in "
            "packages called nvidia-compute-utils or nvidia-driver-cuda; in a container it needs "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )


def refuse_foreign(own_pipe: Path, look_at_default: bool) -> None:
    """Refuses to run beside an MPS daemon that others use.

    Args:
        own_pipe: the pipe directory that may have a daemon.
        look_at_default: whether a daemon in `DEFAULT_PIPE` matters: it may serve other GPUs.

    Raises:
        MpsError: there is one.
    """
    named = os.environ.get(PIPE_VARIABLE)
    if named and Path(named) != own_pipe and (owner := _owner_of_daemon(Path(named))):
        raise MpsError(
            f"{PIPE_VARIABLE}={named} names an MPS daemon of {owner}, and jpd uses only its own: "
            f"unset the variable, and stop that daemon if it serves the same GPU "
            f"(echo quit | {PIPE_VARIABLE}={named} {CONTROL})"
        )
    if look_at_default and (owner := _owner_of_daemon(DEFAULT_PIPE)):
        raise MpsError(
            f"an MPS daemon of {owner} is running in {DEFAULT_PIPE}, and two on one GPU would take "
            f"turns: stop it (as that user: echo quit | {CONTROL}), or, if it serves other GPUs "
            "only, give this one a directory of its own"
        )


def _owner_of_daemon(pipe: Path) -> str | None:
    """Whose daemon lives there; None if none does."""
    try:
        daemon = daemon_of(pipe)
        is_alive = daemon is not None or ((pipe / "control").exists() and _answers(pipe))
    except PermissionError:  # it cannot be seen whether it is alive
        daemon, is_alive = None, True
    if not is_alive:
        return None
    user_id = pipe.stat().st_uid if daemon is None else daemon.user_id
    if user_id == os.geteuid():
        return "yours"
    try:
        return f"user {pwd.getpwuid(user_id).pw_name}"
    except KeyError:  # as in a container
        return f"user {user_id}"


def _answers(pipe: Path) -> bool:
    """A daemon outside this container has no pid that means anything here."""
    try:
        ask(os.environ | {PIPE_VARIABLE: str(pipe)}, "get_server_list", _TIMEOUT_S)
    except MpsError:
        return False
    return True


def refuse_exclusive() -> None:
    """Refuses a GPU on which an MPS server could not make a context.

    Only where nvidia-smi is there and can tell: without it CUDA's own errors say less.

    Raises:
        MpsError: its compute mode forbids it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [] if visible is None else ["-i", visible]
    modes = _nvidia_smi("gpu", ["uuid", "compute_mode"], chosen)
    users = _nvidia_smi("compute-apps", ["gpu_uuid", "pid", "process_name"], chosen)
    for uuid, mode in modes:
        if mode == "Prohibited":
            raise MpsError(f"{uuid} is in compute mode Prohibited: sudo nvidia-smi -i {uuid} -c 0")
        if mode != "Exclusive_Process":
            continue
        for used, pid, name in users:
            if used == uuid:
                raise MpsError(
                    f"{uuid} is in compute mode Exclusive_Process and process {pid} ({name}) has "
                    f"it: stop that process, or sudo nvidia-smi -i {uuid} -c 0"
                )


def _nvidia_smi(table: str, columns: list[str], chosen: list[str]) -> list[list[str]]:
    """Rows of a table; none where there is no answer."""
    command = ["nvidia-smi", *chosen, f"--query-{table}={','.join(columns)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    rows = [line.split(", ", len(columns) - 1) for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == len(columns)]


def client_devices(environment: Mapping[str, str]) -> dict[str, str]:
    """What CUDA_VISIBLE_DEVICES must be in a client of a daemon with this environment.

    The daemon numbers the GPUs that it was given from 0, so a client with the same list of numbers
    would name other GPUs, or none. UUIDs mean the same to both.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not all(entry.strip().isdecimal() for entry in visible.split(",")):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(visible.split(",")))))}
