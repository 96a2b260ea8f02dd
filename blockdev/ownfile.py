# SPDX-License-Identifier: Apache-2.0
"""A root's own files: regular ones, opened without waiting, whatever has been put in their place."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_NO_FILE = {errno.EISDIR, errno.ENXIO, errno.ELOOP}  # a directory; a FIFO or socket; a link that is not followed


def open_own(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. OSError, which says so if it is none: a FIFO would be waited for."""
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o600)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
    else:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def open_nameless(folder: Path) -> int:
    """A new file that has no name in this folder, and may be given one. OSError, which names the folder if its file
    system has no such files."""
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        text = f"the file system of {folder} has no files without names (NFS, for one): the root has to be elsewhere"
        raise OSError(error.errno, text, os.fspath(folder)) from None


def read_own(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a regular file. OSError."""
    with open(open_own(path), "rb", buffering=0) as file:
        return file.read(limit) or b""
