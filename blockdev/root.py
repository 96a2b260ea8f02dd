# SPDX-License-Identifier: Apache-2.0
"""The root: the one directory that holds an owner's lock, version, socket, log and cache.

    lock         flock()ed by the owner while it lives; says "name pid"
    version      LAYOUT_VERSION of what lies here
    control.sock where the owner listens
    owner.log    what an owner started on demand has to say, and owner.log.1 before it
    blobs/       the cache (blockdev/cache.py)
    catalog/     what is known of images without their registries (blockdev/catalog.py)
    converted/   which layers of the cache are conversions of what (blockdev/build/workshop.py)
    mounts/      names under which EROFS gets its FUSE file (blockdev/mountpoint.py), while it is mounted

A root belongs to one uid. Everything but taking the lock may be done by clients too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from blockdev.errors import AccessDenied, DeviceError, EngineError, NotFound
from blockdev.ownfile import open_own, read_own
from blockdev.ranges import write_at
from blockdev.replacement import UNFINISHED, replacing

LAYOUT_VERSION = 1
_MOUNTS = "mounts"
_POLL = 0.02  # seconds between looks at a lock; flock(2) has no timeout
_LOCK_TEXT_MAX = 200
_VERSION_TEXT_MAX = 20
_FIRST_FILES = {"lock", "version", "owner.log", "owner.log.1", "control.sock"}  # what a first start may leave
_FIRST_FOLDERS = {"blobs", "catalog", "converted", _MOUNTS}  # ... empty
_VOLUME = "lost+found"  # what a volume has when it is new
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Root:
    """Paths below one root, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.lock = self.path / "lock"
        self.version = self.path / "version"
        self.socket = self.path / "control.sock"
        self.log = self.path / "owner.log"
        self.blobs = self.path / "blobs"
        self.catalog = self.path / "catalog"
        self.converted = self.path / "converted"
        self.mounts = self.path / _MOUNTS
        self._lock_fd = -1

    def prepare(self) -> None:
        """Make the directory if there is none. AccessDenied if it cannot be ours alone; DeviceError if it is
        something else than a root. Then nothing in it has been touched."""
        with self._refusals("making the root"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        if found.st_uid not in (os.geteuid(), 0):
            raise AccessDenied(f"using the root failed: {self.path}: it belongs to uid {found.st_uid}")
        if found.st_mode & stat.S_IWOTH:
            raise AccessDenied(f"using the root failed: {self.path}: everybody may write to it")
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise AccessDenied(f"using the root failed: {self.path}: no permission to write to it")
        with self._refusals("using the root"):
            self._check_ours()

    def acquire(self, name: str, timeout: float) -> None:
        """Become the owner, as "name pid" in the lock; DeviceError names another one
        that has not left within `timeout` seconds. The lock ends with release() or this process."""
        with self._refusals("opening the lock"):
            fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not lock_within(fd, timeout):
            os.close(fd)
            holder = self.holder() or "another process"
            raise DeviceError(f"taking the root failed: {self.path}: it is owned by {holder}")
        self._lock_fd = fd
        with self._refusals("taking the root"):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{name} {os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Stop being the owner. The file stays: removing a lock file is a race."""
        if self._lock_fd >= 0:
            os.ftruncate(self._lock_fd, 0)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def holder(self) -> str | None:
        """"name pid" as the last owner wrote it; None if it left in order or never was."""
        with self._refusals("reading the lock"):
            try:
                return read_own(self.lock, _LOCK_TEXT_MAX).decode(errors="replace").strip() or None
            except FileNotFoundError:
                return None

    def owned(self) -> bool:
        """Whether some process holds the lock now. Takes it for an instant if none does."""
        with self._refusals("opening the lock"):
            try:
                fd = open_own(self.lock, os.O_NOFOLLOW)
            except FileNotFoundError:
                return False
            except NotADirectoryError:
                raise NotFound(f"opening the lock failed: {self.path}: it is no directory") from None
        try:
            return not lock_within(fd, 0)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def starting(self, timeout: float) -> Iterator[None]:
        """Held by the one client that starts an owner; others wait their turn."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not lock_within(fd, timeout):
                raise DeviceError(f"starting the owner failed: {self.path}: another command is still trying")
            yield
        finally:
            os.close(fd)

    def check_version(self) -> None:
        """Refuse what a newer program wrote; a root that has no version yet gets ours.

        The caller is the owner, after prepare(). A later change of layout adds its step here.
        """
        with self._refusals("reading the version"):
            found = self._read_version()
            if found > LAYOUT_VERSION:
                raise DeviceError(
                    f"using the root failed: {self.path}: written by a newer version (layout {found}, "
                    f"this program knows {LAYOUT_VERSION})"
                )
            if not found:
                with replacing(self.version) as fd:
                    write_at(fd, f"{LAYOUT_VERSION}\n".encode(), 0)

    def _check_ours(self) -> None:
        """Without a version, only what a first start leaves that was cut off is a root to be."""
        # Listed before the version is looked for: what we would not know comes after it.
        names = sorted(path.name for path in self.path.iterdir())
        if not self._read_version():
            other = next((name for name in names if not self._is_first(name)), None)
            if other and "version" in names:
                raise DeviceError(
                    f"using the root failed: {self.version}: it is empty, but {other} is there: "
                    f"if {self.path} is a root, write {LAYOUT_VERSION} to it"
                )
            if other:
                raise DeviceError(
                    f"using the root failed: {self.path}: it is no root: {other} is there, but no version; "
                    "name a root, or an empty directory"
                )
        if os.path.lexists(self.blobs) and not self.blobs.is_dir():
            raise DeviceError(f"using the root failed: {self.blobs}: it is no directory")

    def _is_first(self, name: str) -> bool:
        path = self.path / name
        if name in _FIRST_FOLDERS:
            return path.is_dir() and {below.name for below in path.iterdir()} <= {_VOLUME}
        return name in _FIRST_FILES or name == _VOLUME or (name.startswith(".") and name.endswith(UNFINISHED))

    def _read_version(self) -> int:
        """0: there is none, or it is empty, as a power cut may leave it."""
        try:
            text = read_own(self.version, _VERSION_TEXT_MAX).decode(errors="replace").strip()
        except FileNotFoundError:
            return 0
        if text and not (text.isascii() and text.isdigit() and int(text)):
            raise DeviceError(f"using the root failed: {self.version}: {text!r} is not a version")
        return int(text or 0)

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = EngineError if error.errno in _FULL else AccessDenied
            raise kind(f"{what} failed: {error.filename or self.path}: {error.strerror or error}") from None


def lock_within(fd: int, timeout: float) -> bool:
    """flock() it, alone; False if somebody else has it for so many seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL)
        else:
            return True
