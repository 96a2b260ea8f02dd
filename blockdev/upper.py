# SPDX-License-Identifier: Apache-2.0
"""The two files of a writable layer: making a pair, and opening one that nobody else changes.

A pair is locked (flock, on its data file) for as long as somebody writes it, so an owner
that serves it, a commit that reads it and a resize exclude each other; the lock goes where the
descriptor goes, and ends with its last copy. docs/formats/lsmt.md.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid as uuids
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockdev.errors import CorruptImage, DeviceError, UsageError, from_os
from blockdev.replacement import sync_directory
from formats import lsmt
from formats.errors import FormatError
from formats.lsmt import NULL_UUID, Head
from formats.pair import PairWriter
from formats.readat import check_range

LOCK_PATIENCE = 3.0  # seconds: an owner hears of an unmount when it is over, and then still syncs and closes
_LOCK_POLL = 0.02


def create_pair(data: Path, index: Path, size: int, parent_uuid: str = NULL_UUID) -> Head:
    """Make an empty pair of new files, of a disk of `size` bytes (0: that of what is below). Its head.

    Both files are there, and on the disk, or neither.
    """
    head = Head(0, size, uuid=str(uuids.uuid4()).upper(), parent_uuid=parent_uuid.upper())
    pieces: tuple[list[bytes], list[bytes]] = ([], [])
    try:
        PairWriter(pieces[0].append, pieces[1].append, head)
    except FormatError as error:
        raise UsageError(f"create writable layer: {data}: {error.what}") from None
    with ExitStack() as undo:
        for path, piece in zip((data, index), pieces, strict=True):
            _write_new(path, b"".join(piece), undo)
        undo.pop_all()
    return head


def _write_new(path: Path, content: bytes, undo: ExitStack) -> None:
    try:
        with open(path, "xb", buffering=0) as file:
            undo.callback(path.unlink)
            file.write(content)
            os.fsync(file.fileno())
        sync_directory(path.absolute().parent)
    except FileExistsError:
        raise DeviceError(f"create writable layer: {path}: it is there already") from None
    except OSError as error:
        raise from_os("create writable layer", error, str(path)) from None


def lock(fd: int, name: str, *, exclusive: bool) -> None:
    """Nobody else changes (exclusive: or reads) the pair of this data file until fd and its copies are closed."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DeviceError(f"open writable layer: {name}: it is in use") from None
            time.sleep(_LOCK_POLL)
        else:
            return


@dataclass(frozen=True)
class FileAt:
    """An open file as formats read it."""

    fd: int
    size: int

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(offset, length, self.size)
        content = os.pread(self.fd, length, offset)
        if len(content) != length:
            raise FormatError(f"{length} bytes wanted, {len(content)} are left", offset)
        return content


@dataclass(frozen=True)
class PairFiles:
    """An open, locked pair. Whoever opened it closes it."""

    name: str
    data: FileAt
    index: FileAt
    head: Head  # of the index file: its size and UUIDs count
    log: lsmt.Log


@contextmanager
def open_pair_files(data: Path, index: Path, *, change: bool) -> Iterator[PairFiles]:
    """The pair, locked against writers, or with `change` against everybody. CorruptImage if it is none."""
    with ExitStack() as undo:
        files = [_open(path, undo, change=change) for path in (data, index)]
        lock(files[0].fd, str(data), exclusive=change)
        try:
            log = lsmt.open_log(files[1], files[0])
        except FormatError as error:
            raise CorruptImage(f"open writable layer: {data} with {index}: {error}") from None
        yield PairFiles(str(data), files[0], files[1], log.head, log)


@contextmanager
def open_sealed_file(path: Path) -> Iterator[tuple[FileAt, lsmt.Sealed]]:
    """A sealed layer that is neither compressed nor wrapped. CorruptImage if it is none."""
    with ExitStack() as undo:
        file = _open(path, undo, change=False)
        try:
            sealed = lsmt.open_sealed(file)
        except FormatError as error:
            raise CorruptImage(f"open layer: {path}: {error}") from None
        yield file, sealed


def _open(path: Path, undo: ExitStack, *, change: bool) -> FileAt:
    try:
        fd = os.open(path, (os.O_RDWR if change else os.O_RDONLY) | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        return FileAt(fd, os.fstat(fd).st_size)
    except OSError as error:
        raise from_os("open writable layer", error, str(path)) from None
