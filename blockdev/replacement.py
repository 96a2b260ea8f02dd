# SPDX-License-Identifier: Apache-2.0
"""A file that takes the place of another one, whole or not at all, also across a power cut."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blockdev.errors import UsageError, from_os

UNFINISHED = ".part"  # ends the name of what was being written when the power went


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A new, empty file, open for reading and writing, that becomes `path` when the block ends well.

    It has the owner and the mode of what was at `path`, which stays as it was if the block raises.
    A symbolic link is followed. What is there and no regular file is refused: UsageError.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{secrets.token_hex(8)}{UNFINISHED}")
    try:
        before = target.stat() if target.exists() else None
        if before and not stat.S_ISREG(before.st_mode):
            raise UsageError(f"write file: {path}: it is there and no regular file")
        # Not mkstemp: the file shall have the mode that any new file of the user has.
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise from_os("write file", error, str(path)) from error
    try:
        try:
            if before:
                _make_like(before, fd)
        except OSError as error:
            raise from_os("write file", error, str(path)) from error
        yield fd
        try:
            os.fsync(fd)
            part.replace(target)
            sync_directory(target.parent)
        except OSError as error:
            raise from_os("write file", error, str(path)) from error
    except BaseException:
        with suppress(FileNotFoundError):
            part.unlink()
        raise
    finally:
        os.close(fd)


def _make_like(before: os.stat_result, fd: int) -> None:
    made = os.fstat(fd)
    if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
        os.fchown(fd, before.st_uid, before.st_gid)
    os.fchmod(fd, before.st_mode & 0o777)


def check_apart(output: str | Path | int, inputs: Iterable[tuple[str, str | Path | int]]) -> None:
    """UsageError if what is to be written is one of what it is made of, by whatever name.

    Each input is its name, and its path or descriptor. What does not exist is for others to find.
    """
    try:
        written = _identity(output)
    except OSError:
        return
    for name, read in inputs:
        with suppress(OSError):
            if _identity(read) == written and written is not None:
                shown = "stdout" if output == 1 else output
                raise UsageError(f"write file: {shown}: it is {name}, which is read for it")


def _identity(file: str | Path | int) -> tuple[int, ...] | None:
    """Equal for two names of one file or block device; None for what keeps no bytes."""
    found = os.stat(file)  # noqa: PTH116 - of a descriptor too
    if stat.S_ISBLK(found.st_mode):
        return (found.st_rdev,)
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def sync_directory(path: Path) -> None:
    """What was created, renamed or removed in it outlasts a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
