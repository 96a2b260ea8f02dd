# SPDX-License-Identifier: Apache-2.0
"""A whole blob beside the cache: a copy of a local file that becomes an entry at once, or never was.

Copy() makes the copy in files without names: a file that shares its blocks where the file
system can, else one the kernel copies. put() gives both their names. A crash before that leaves nothing.
"""

from __future__ import annotations

import array
import errno
import fcntl
import hashlib
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

from blockdev import entryfiles
from blockdev.engine import EXTENT_SIZE, crc32c
from blockdev.errors import CorruptImage, from_os
from blockdev.ownfile import open_nameless
from blockdev.ranges import write_at
from formats import presence

PIECE = 4 << 20  # bytes hashed at a time; a multiple of the extent
_COPY_AT_ONCE = 1 << 30  # bytes; the kernel stops a call at 2 GiB anyway
_FICLONE = 0x40049409
_NO_SHARING = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EBADF, errno.EPERM}
_MASK = 0xFFFFFFFF


class Copy:
    """A copy of the blob `digest` that fd reads, checked. Close it, whether it was put in place or not."""

    def __init__(self, blobs: Path, fd: int, digest: str) -> None:
        """CorruptImage if the file is another blob; what from_os() says if it cannot be copied."""
        self._path = entryfiles.path_of(blobs, digest)
        self._fds: list[int] = []
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            data, table = self._nameless(), self._nameless()
            size = os.fstat(fd).st_size
            copy_content(fd, data, size)
            entries = array.array("I")

            def note(piece: memoryview) -> None:
                extents = range(0, len(piece), EXTENT_SIZE)
                entries.extend(crc32c(_MASK, piece[at : at + EXTENT_SIZE]) ^ _MASK or 1 for at in extents)

            found = digest_of(data, digest.partition(":")[0], note)
            if found != digest:
                raise CorruptImage(f"adopt blob: {digest}: offset 0: the file's digest is {found}")
            if sys.byteorder != "little":
                entries.byteswap()
            os.ftruncate(table, presence.map_size(size))
            write_at(table, presence.Head(digest, size, verified=True).build(), 0)
            write_at(table, entries.tobytes(), presence.TABLE_OFFSET)
            for copied in self._fds:
                os.fsync(copied)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise from_os("adopt blob", error, digest) from error
            raise

    def put(self) -> None:
        """Take the place of the entry that may be there, which nobody uses and nobody opens meanwhile."""
        try:
            entryfiles.name_files(self._path, *self._fds)
        except OSError as error:
            raise from_os("adopt blob", error, str(self._path)) from error

    def close(self) -> None:
        """Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def _nameless(self) -> int:
        self._fds.append(open_nameless(self._path.parent))
        return self._fds[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def copy_content(source: int, target: int, size: int) -> None:
    """The first `size` bytes of a file as the content of an empty one: shared, or copied by the kernel."""
    if stat.S_ISREG(os.fstat(source).st_mode):
        try:
            fcntl.ioctl(target, _FICLONE, source)
            return
        except OSError as error:
            if error.errno not in _NO_SHARING:
                raise
    done = 0
    while done < size:
        try:
            copied = os.copy_file_range(source, target, min(_COPY_AT_ONCE, size - done), done, done)
        except OSError as error:
            if error.errno not in _NO_SHARING:
                raise
            copied = write_at(target, os.pread(source, PIECE, done), done)
        if not copied:
            break  # it has become shorter: its digest will tell
        done += copied


def digest_of(fd: int, algorithm: str, note: Callable[[memoryview], None] | None = None) -> str:
    """The digest of all that a file holds; note() is given its pieces, whole extents each but the last."""
    digest = hashlib.new(algorithm)
    buffer = memoryview(bytearray(PIECE))
    offset = 0
    while filled := _fill(fd, buffer, offset):
        piece = buffer[:filled]
        digest.update(piece)
        if note:
            note(piece)
        offset += filled
    return f"{algorithm}:{digest.hexdigest()}"


def _fill(fd: int, buffer: memoryview, offset: int) -> int:
    filled = 0
    while filled < len(buffer) and (got := os.preadv(fd, [buffer[filled:]], offset + filled)):
        filled += got
    return filled
