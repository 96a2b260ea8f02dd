# SPDX-License-Identifier: Apache-2.0
"""Opening what holds bytes at offsets: a regular file or a block device, and nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blockdev.errors import UsageError, from_os


def open_regular(path: str | Path, doing: str, *, write: bool = False) -> int:
    """A descriptor for reading (or writing too). Waits for nobody. UsageError for a path of another kind."""
    if "\0" in str(path):
        raise UsageError(f"{doing}: {str(path)!r}: no path has a NUL in it")
    try:
        fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise from_os(doing, error, str(path)) from None
    kind = os.fstat(fd).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)) or not _has_size(fd):
        os.close(fd)
        hint = f" (an image layout is oci:{path})" if stat.S_ISDIR(kind) else ""
        raise UsageError(f"{doing}: {path}: neither a file nor a block device{hint}")
    return fd


def _has_size(fd: int) -> bool:
    """Not so for /proc/PID/mem, which calls itself a file."""
    try:
        os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError:
        return False
    return True
