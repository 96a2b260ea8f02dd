# SPDX-License-Identifier: Apache-2.0
"""The root: the one directory that holds an owner's lock, version, socket, log and cache.

    lock         flock()ed by the owner while it lives; says "name pid"
    version      LAYOUT_VERSION of what lies here
    control.sock where the owner listens
    owner.log    what an owner started on demand has to say, and owner.log.1 before it
    blobs/       the cache (blockdev/cache.py)
    catalog/     what is known of images without their registries (blockdev/catalog.py)
    converted/   which layers of the cache are conversions of what (blockdev/build/workshop.py)
    mounts/      an empty file for each mounted file system, under its FUSE file

A root belongs to one uid. Everything but taking the lock may be done by clients too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from blockdev.errors import AccessDenied, DeviceError, EngineError

LAYOUT_VERSION = 1
_MOUNTS = "mounts"
_POLL = 0.02  # seconds between looks at a lock; flock(2) has no timeout
_LOCK_TEXT_MAX = 200
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
        """Make the directory if there is none. AccessDenied if it cannot be ours alone."""
        with self._refusals("making the root"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        if found.st_uid not in (os.geteuid(), 0):
            raise AccessDenied(f"using the root failed: {self.path}: it belongs to uid {found.st_uid}")
        if found.st_mode & stat.S_IWOTH:
            raise AccessDenied(f"using the root failed: {self.path}: everybody may write to it")
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise AccessDenied(f"using the root failed: {self.path}: no permission to write to it")

    def acquire(self, name: str, timeout: float) -> None:
        """Become the owner, as "name pid" in the lock; DeviceError names another one
        that has not left within `timeout` seconds. The lock ends with release() or this process."""
        with self._refusals("opening the lock"):
            fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not _lock_within(fd, timeout):
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
        try:
            with open(self.lock, "rb") as file:
                return file.read(_LOCK_TEXT_MAX).decode(errors="replace").strip() or None
        except FileNotFoundError:
            return None

    def owned(self) -> bool:
        """Whether some process holds the lock now. Takes it for an instant if none does."""
        try:
            fd = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            return not _lock_within(fd, 0)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def starting(self, timeout: float) -> Iterator[None]:
        """Held by the one client that starts an owner; others wait their turn."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _lock_within(fd, timeout):
                raise DeviceError(f"starting the owner failed: {self.path}: another command is still trying")
            yield
        finally:
            os.close(fd)

    def check_version(self) -> None:
        """Refuse what a newer program wrote; make room for ourselves where an older one did.

        The caller is the owner. Version 0 (a root with a cache and no version) never was
        released, so its cache is dropped and refills; a later change of layout adds its step here.
        """
        with self._refusals("reading the version"):
            found = self._read_version()
            if found > LAYOUT_VERSION:
                raise DeviceError(
                    f"using the root failed: {self.path}: written by a newer version (layout {found}, "
                    f"this program knows {LAYOUT_VERSION})"
                )
            if found == LAYOUT_VERSION:
                return
            if self.blobs.exists():
                shutil.rmtree(self.blobs)
            written = self.version.with_name("version.new")
            written.write_text(f"{LAYOUT_VERSION}\n")
            written.replace(self.version)

    def _read_version(self) -> int:
        try:
            text = self.version.read_text(errors="replace").strip()
        except FileNotFoundError:
            return 0
        if not (text.isascii() and text.isdigit()):
            raise DeviceError(f"using the root failed: {self.version}: {text[:20]!r} is not a version")
        return int(text)

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = EngineError if error.errno in _FULL else AccessDenied
            raise kind(f"{what} failed: {error.filename or self.path}: {error.strerror}") from None


def is_mount_file(path: Path) -> bool:
    """Whether a path is in some root's mounts/, by its looks: umount knows no root."""
    return path.parent.name == _MOUNTS and path.parent.with_name("lock").exists()


def _lock_within(fd: int, timeout: float) -> bool:
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
