# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, whose fault it is, and whether to try again.

Every error a user can see is a BlockdevError. Its text is one sentence of the form
"what failed: which thing: why". Its class carries the exit code, the errno a device
answers with, and whether trying again may help. Nothing else maps errors to codes.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar


class BlockdevError(Exception):
    """The root of all our errors; raised itself only for what has no better class."""

    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = errno.EIO
    retriable: ClassVar[bool] = False


class UsageError(BlockdevError):
    """The caller asked for something that makes no sense."""

    exit_code = 2
    errno = errno.EINVAL


class NotFound(BlockdevError):
    """An image, tag, blob or file is not where the caller said."""

    exit_code = 3
    errno = errno.ENOENT


class AccessDenied(BlockdevError):
    """Credentials were missing or refused, or a path may not be used."""

    exit_code = 4
    errno = errno.EACCES


class CorruptImage(BlockdevError):
    """Image content breaks its format or its checksum. Names blob and offset."""

    exit_code = 5


class SourceError(BlockdevError):
    """A registry or peer did not deliver.

    `retry_after`: seconds until it wants to be asked again, if it said so. `host`: which one it
    was, where that need not be the one the image comes from.
    """

    exit_code = 6
    retriable = True

    def __init__(self, text: str, *, retry_after: float | None = None, host: str = "") -> None:
        super().__init__(text)
        self.retry_after = retry_after
        self.host = host


class DeviceError(BlockdevError):
    """The kernel, a mount point, a device or another owner is in the way."""

    exit_code = 7
    errno = errno.EBUSY


class EngineError(BlockdevError):
    """A defect of ours, or a resource of this machine ran out."""

    exit_code = 8


_SENSELESS = {errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}  # names that can be no such thing
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_ABSENT = {errno.ENOENT, errno.ENOTDIR}


def from_os(what: str, error: OSError, thing: str = "") -> BlockdevError:
    """A failed system call as the error it stands for. `what` was to be done to `thing` (default: the call's file)."""
    code = error.errno or 0
    kinds = ((_SENSELESS, UsageError), (_REFUSED, AccessDenied), (_ABSENT, NotFound))
    kind = next((kind for codes, kind in kinds if code in codes), EngineError)
    return kind(f"{what}: {thing or error.filename}: {error.strerror or os.strerror(code)}")


_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT}


def shortage(error: BaseException) -> str:
    """What ran out, if that is what an exception says; else ""."""
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "no thread can be started"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno in _SHORT else ""
