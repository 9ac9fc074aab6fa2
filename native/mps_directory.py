"""The directory of an MPS daemon: who uses it, and who may change it now.

Two file locks, which the kernel lets go of when their process dies, however it dies: `lock` is held
for moments by whoever starts, stops or asks; `users` is shared by all who use the daemon.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from native.mps_control import MpsError, polls

# A UNIX socket's path has at most 107 bytes; this is the longest name that the daemon puts there.
MAX_PATH_BYTES = 107 - len("/pipe/control_privileged")


def default_directory() -> Path:
    """Of this user, for the GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    digest = hashlib.sha256(visible.encode()).hexdigest()[:8]  # UUIDs would be too long
    return Path(tempfile.gettempdir(), f"jpd-mps-{os.geteuid()}-{digest}")


class MpsDirectory:
    """Every method but `locked` is to be called with the lock held.

    Raises:
        MpsError: its path is too long.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if len(os.fsencode(self.path)) > MAX_PATH_BYTES:
            raise MpsError(
                f"the MPS directory's path may have at most {MAX_PATH_BYTES} bytes, as sockets lie "
                f"in it: {self.path}"
            )
        self.pipe, self.log = self.path / "pipe", self.path / "log"
        self._users: int | None = None

    @contextlib.contextmanager
    def locked(self, timeout_s: float, make: bool = False) -> Iterator[None]:
        """Holds the lock, against other threads as against other processes.

        Args:
            make: make the directory where it is missing.

        Raises:
            MpsError: the directory is missing, cannot be made, is open to other users, or somebody
                else keeps the lock for `timeout_s`.
        """
        file = self.path / "lock"
        for _ in polls(timeout_s):
            if make:
                self._make()
            try:
                lock = os.open(file, os.O_RDWR | (os.O_CREAT if make else 0), 0o600)
            except FileNotFoundError:
                if make:  # its last user has just removed it
                    continue
                raise MpsError(f"the MPS directory {self.path} has been removed") from None
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                # Between opening and locking, the file may have been removed and made again.
                if not file.exists() or not os.path.samestat(os.fstat(lock), file.stat()):
                    continue
                yield
                return
            finally:
                os.close(lock)
        raise MpsError(f"somebody else has kept {file} locked for {timeout_s:g} s")

    def _make(self) -> None:
        try:
            # Not exist_ok, which looks again, and fails if it has been removed in between.
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700, parents=True)
            status = self.path.lstat()
        except FileNotFoundError:  # removed in between
            return
        except OSError as error:
            raise MpsError(f"the MPS directory {self.path} cannot be made: {error}") from error
        mode, owner = stat.S_IMODE(status.st_mode), status.st_uid
        if not stat.S_ISDIR(status.st_mode) or owner != os.geteuid() or mode & 0o077:
            raise MpsError(
                f"the MPS directory {self.path} must be a directory of yours with mode 0700; it "
                f"has mode {mode:04o} and its owner is user {owner}"
            )

    @property
    def is_used(self) -> bool:
        """Whether `use` was called, and `leave` was not."""
        return self._users is not None

    def use(self) -> None:
        """Makes this object one of the users."""
        self._users = os.open(self.path / "users", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._users, fcntl.LOCK_SH)

    def has_other_users(self) -> bool:
        """Whether there are more than this one."""
        assert self._users is not None
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            # A failed upgrade may lose the shared lock. Nobody looks before the outer one is free.
            fcntl.flock(self._users, fcntl.LOCK_SH)
        return False

    def leave(self) -> None:
        """Ends the use."""
        assert self._users is not None
        os.close(self._users)
        self._users = None

    def clear(self) -> None:
        """Removes what a daemon left."""
        for folder in (self.pipe, self.log):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)

    def remove(self) -> None:
        """Removes the directory, but for files that are not the daemon's."""
        self.clear()
        (self.path / "users").unlink(missing_ok=True)
        # The lock goes last: until then nobody else can be starting a daemon here.
        (self.path / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others wait for it, or keep files in it
            self.path.rmdir()
