# SPDX-License-Identifier: Apache-2.0
"""A file that takes the place of another one, whole or not at all, also across a power cut."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blockdev.errors import UsageError, from_os

UNFINISHED = ".part"  # ends the name of what was being written when the power went


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A new, empty file, open for reading and writing, that becomes `path` when the block ends well.

    If it raises, whatever was at `path` stays as it was. A symbolic link is followed. What
    is there and no regular file is refused: UsageError.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UsageError(f"write file: {path}: it is there and no regular file")
    part = target.with_name(f".{secrets.token_hex(8)}{UNFINISHED}")
    try:
        # Not mkstemp: the file shall have the mode that any new file of the user has.
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise from_os("write file", error, str(path)) from error
    try:
        yield fd
        try:
            if target.exists():
                os.fchmod(fd, target.stat().st_mode & 0o777)
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


def sync_directory(path: Path) -> None:
    """What was created, renamed or removed in it outlasts a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
