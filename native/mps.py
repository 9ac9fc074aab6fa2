"""An MPS control daemon of jpd's own: processes share one GPU, each on its share of the SMs.

semi-PD, arXiv 2504.19867, §4.3. A share is fixed when a process starts; another share takes another
process. NVIDIA documents what a server cannot do: it does not keep its clients apart when one
causes a fatal GPU fault (all of them see it), and a client that is killed with work in flight may
leave the server undefined: `Mps.terminate_client` comes before the kill.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import threading
from pathlib import Path

from native import mps_checks
from native.mps_control import (
    CONTROL,
    LOG_VARIABLE,
    PIPE_VARIABLE,
    SHARE_VARIABLE,
    ask,
    ask_pids,
    daemon_of,
    end,
    launch,
    polls,
    processes_of,
)
from native.mps_control import MpsError as MpsError
from native.mps_directory import MpsDirectory, default_directory
from native.shares import check_share

_QUERY_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 30.0
_QUIT_PATIENCE_S = 10
# Somebody else may be starting or stopping the daemon, or waiting for an answer that never comes.
_LOCK_TIMEOUT_S = 60.0
_FAILED = re.compile(r"error|fail|cannot|denied|^\s*[1-9]\d*\s*$", re.IGNORECASE)


class Mps:
    """A running daemon in a directory that only this user may enter.

    Whoever starts it with the same directory shares it, and the last one to stop it ends it. A
    process that dies without stopping it is forgotten at once: a daemon that nobody is left to stop
    is adopted by the next start.

    Control questions are asked one at a time, by all threads and processes together: the control
    program fails on some of those that come at the same time.
    """

    def __init__(self, directory: MpsDirectory) -> None:
        """Use `Mps.start`."""
        self._directory = directory
        self._environment = dict(os.environ)
        # A share in the daemon's environment would be a limit for all clients.
        self._environment.pop(SHARE_VARIABLE, None)
        self._environment[PIPE_VARIABLE] = str(directory.pipe)
        self._environment[LOG_VARIABLE] = str(directory.log)
        self._stopping = threading.Lock()

    @classmethod
    def start(cls, directory: Path | None = None) -> Mps:
        """Starts a daemon, or adopts the one that is already in its directory.

        It serves the GPUs of CUDA_VISIBLE_DEVICES, or all. It is stopped when the interpreter
        exits.

        Args:
            directory: for its pipes and logs, with nothing else in it. By default in the folder
                for temporary files, one per user and CUDA_VISIBLE_DEVICES; then no daemon may be
                running in NVIDIA's default directory, whatever GPUs it serves.

        Raises:
            MpsError: there is no GPU, no MPS, no permission, somebody else's MPS, or it does not
                start.
        """
        place = MpsDirectory(default_directory() if directory is None else directory)
        mps_checks.require_mps()
        mps_checks.refuse_foreign(place.pipe, look_at_default=directory is None)
        self = cls(place)
        with place.locked(_LOCK_TIMEOUT_S, make=True):
            place.use()
            try:
                if not self._adopt():
                    self._launch()
            except BaseException:
                self._leave()
                raise
        atexit.register(self.stop)
        return self

    def __enter__(self) -> Mps:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def directory(self) -> Path:
        """Where its pipes and logs are."""
        return self._directory.path

    def environment(self, share: int) -> dict[str, str]:
        """Variables to add to the environment of a process that is to run on `share` percent.

        CUDA reads them when it starts, so they cannot be set later. CUDA_VISIBLE_DEVICES is among
        them where it must differ from this process's: a client counts, from 0, the GPUs that the
        daemon serves. CUDA_MPS_ENABLE_PER_CTX_DEVICE_MULTIPROCESSOR_PARTITIONING is not: it lets
        contexts of one process have different shares, and here a process has one.

        Raises:
            ValueError: `share` is not from 1 to 100.
            MpsError: the daemon is stopped.
        """
        check_share(share)
        self._require_running()
        return {
            PIPE_VARIABLE: str(self._directory.pipe),
            LOG_VARIABLE: str(self._directory.log),
            SHARE_VARIABLE: str(share),
            **mps_checks.client_devices(self._environment),
        }

    def clients(self) -> list[int]:
        """Pids of the processes that use the GPU through this daemon.

        Raises:
            MpsError: the daemon is stopped, or does not answer.
        """
        self._require_running()
        with self._directory.locked(_LOCK_TIMEOUT_S):
            return [pid for clients in self._clients_by_server().values() for pid in clients]

    def terminate_client(self, pid: int) -> None:
        """Ends a client's work on the GPU, after which the process may be killed safely.

        Its CUDA calls fail from then on (CUDA_ERROR_MPS_CLIENT_TERMINATED). A process that is no
        client, or no longer, is fine. For clients that can end by themselves that is better: driver
        580 has not answered in time, and failed another client, where one was in a step.

        Raises:
            MpsError: the daemon is stopped, does not answer, or could not do it.
        """
        self._require_running()
        with self._directory.locked(_LOCK_TIMEOUT_S):
            for server, clients in self._clients_by_server().items():
                if pid not in clients:
                    continue
                command = f"terminate_client {server} {pid}"
                answer = ask(self._environment, command, _QUERY_TIMEOUT_S)
                if _FAILED.search(answer) and pid in self._clients_by_server().get(server, []):
                    raise MpsError(f"MPS did not terminate client {pid}: {answer.strip()}")

    def stop(self) -> None:
        """Leaves the daemon; its last user ends it and its servers and removes its directory.

        Clients that still run then lose their work. Stopping twice is fine.

        Raises:
            MpsError: a process of it cannot be killed.
        """
        with self._stopping:
            if not self._directory.is_used:
                return
            # Made again if somebody removed it: the daemon is to end all the same.
            with self._directory.locked(_LOCK_TIMEOUT_S, make=True):
                self._leave()
        atexit.unregister(self.stop)

    def _require_running(self) -> None:
        if not self._directory.is_used:
            raise MpsError(f"this MPS daemon is stopped: {self.directory}")

    # --- with the lock held ---

    def _adopt(self) -> bool:
        """Whether the directory has a healthy daemon; anything else in it is cleared away."""
        reason = "it has died"
        daemon = daemon_of(self._directory.pipe)
        if daemon is not None:
            name = "CUDA_VISIBLE_DEVICES"
            theirs, ours = daemon.environment.get(name), self._environment.get(name)
            if theirs != ours:
                reason = f"it serves {name}={theirs}, not {ours}"
            else:
                try:
                    ask_pids(self._environment, "get_server_list", _QUERY_TIMEOUT_S)
                    return True
                except MpsError as error:
                    reason = str(error)
        if self._directory.has_other_users():
            raise MpsError(
                f"the MPS daemon in {self.directory} cannot be shared with the processes that use "
                f"it: {reason}. Stop them, or give this one a directory of its own"
            )
        self._clear(patience_s=0)
        return False

    def _launch(self) -> None:
        mps_checks.refuse_exclusive()
        for folder in (self._directory.pipe, self._directory.log):
            folder.mkdir(mode=0o700)
        launch(self._environment, _START_TIMEOUT_S)
        reason = "no daemon is running"
        for _ in polls(_START_TIMEOUT_S):
            if daemon_of(self._directory.pipe) is not None:
                try:
                    ask_pids(self._environment, "get_server_list", _QUERY_TIMEOUT_S)
                    return
                except MpsError as error:  # it may not listen yet
                    reason = str(error)
        raise MpsError(
            f"{CONTROL} -d gave no working daemon within {_START_TIMEOUT_S:g} s: {reason}; its log "
            f"ends with: {self._last_log_line()}"
        )

    def _last_log_line(self) -> str:
        try:
            lines = (self._directory.log / "control.log").read_text().splitlines()
        except FileNotFoundError:
            lines = []
        return lines[-1] if lines else "(nothing)"

    def _leave(self) -> None:
        try:
            if not self._directory.has_other_users():
                patience_s = 0.0
                if daemon_of(self._directory.pipe) is not None:
                    with contextlib.suppress(MpsError):  # one that does not quit is killed
                        command = f"quit -t {_QUIT_PATIENCE_S}"
                        ask(self._environment, command, _QUIT_PATIENCE_S + _QUERY_TIMEOUT_S)
                        patience_s = _QUIT_PATIENCE_S
                self._clear(patience_s)
                self._directory.remove()
        finally:
            self._directory.leave()

    def _clear(self, patience_s: float) -> None:
        end(processes_of(self._directory.pipe), patience_s)
        self._directory.clear()

    def _clients_by_server(self) -> dict[int, list[int]]:
        found = {}
        for server in ask_pids(self._environment, "get_server_list", _QUERY_TIMEOUT_S):
            try:
                command = f"get_client_list {server}"
                found[server] = ask_pids(self._environment, command, _QUERY_TIMEOUT_S)
            except MpsError:
                # A server may end with its last client.
                if server in ask_pids(self._environment, "get_server_list", _QUERY_TIMEOUT_S):
                    raise
        return found


def visible_sms(device: int = 0) -> int:
    """SMs that the calling process got on a GPU: fewer than the chip has under a share below 100.

    Starts CUDA in this process, and makes its context there.

    Raises:
        MpsError: cupy is not installed.
        cupy.cuda.runtime.CUDARuntimeError: CUDA does not start.
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise MpsError("counting SMs takes cupy: pip install jpd[cuda13] or jpd[cuda12]") from error
    with cupy.cuda.Device(device) as chip:
        cupy.cuda.runtime.free(0)  # the share is certain once there is a context
        return int(chip.attributes["MultiProcessorCount"])
