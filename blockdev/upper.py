# SPDX-License-Identifier: Apache-2.0
"""The two files of a writable layer: making, opening, sealing, resizing and compacting a pair.

Whatever changes a pair leaves it, at every moment, as it was or as it shall be. A pair is
locked (flock, on its data file): by one who writes it, or by any number who read it. The lock
goes where the descriptor goes, to an owner, and ends with its last copy. docs/formats/lsmt.md.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid as uuids
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from blockdev.errors import CorruptImage, DeviceError, UsageError, from_os
from blockdev.ranges import write_at
from blockdev.regular import open_regular
from blockdev.replacement import replacing, sync_directory
from formats import lsmt
from formats.errors import FormatError
from formats.lsmt import ENTRY_SIZE, HEAD_SIZE, LENGTH_MAX, NULL_UUID, SEALED_ENTRIES_MAX, SECTOR, Head, Segment, pack
from formats.pair import PairWriter, compact, replaying, seal, zeros
from formats.readat import check_range

LOCK_PATIENCE = 6.0  # seconds: an owner hears of an unmount when it is over, and then still syncs and closes
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


def claim(fd: int, name: str) -> None:
    """Lock a data file to write to it. UsageError if it has been sealed."""
    lock(fd, name, exclusive=True)
    size = os.fstat(fd).st_size
    if _is_sealed(FileAt(fd, size)):
        raise UsageError(f"open writable layer: {name}: it is sealed")


def _is_sealed(data: FileAt) -> bool:
    """Whether it ends in a trailer of its own: what was written last may look like one of another layer."""
    try:
        header = Head.parse(data.read_at(0, HEAD_SIZE))
        return lsmt.open_sealed(data).head.uuid == header.uuid != NULL_UUID
    except FormatError:
        return False


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

    def live(self) -> list[Segment]:
        """The live map. CorruptImage."""
        return list(self.replaying())

    def replaying(self) -> Iterator[Segment]:
        """The live map, one entry after the other. CorruptImage."""
        try:
            yield from replaying(lsmt.read_log(self.index, self.log))
        except FormatError as error:
            raise CorruptImage(f"read writable layer: {self.name}: {error}") from None


@contextmanager
def open_pair_files(data: Path, index: Path, *, change: bool) -> Iterator[PairFiles]:
    """The pair, locked against writers, or with `change` against everybody. CorruptImage if it is none."""
    with ExitStack() as undo:
        fd = _open(data, undo, change=change)
        if change:
            claim(fd, str(data))
        else:
            lock(fd, str(data), exclusive=False)
        # Only now: whoever had the lock may have changed the one and replaced the other.
        files = [FileAt(file, os.fstat(file).st_size) for file in (fd, _open(index, undo, change=change))]
        try:
            log = lsmt.open_log(files[1], files[0])
        except FormatError as error:
            raise CorruptImage(f"open writable layer: {data} with {index}: {error}") from None
        yield PairFiles(str(data), files[0], files[1], log.head, log)


@contextmanager
def open_sealed_file(path: Path) -> Iterator[tuple[FileAt, lsmt.Sealed]]:
    """A sealed layer that is neither compressed nor wrapped. CorruptImage if it is none."""
    with ExitStack() as undo:
        fd = _open(path, undo, change=False)
        file = FileAt(fd, os.fstat(fd).st_size)
        try:
            sealed = lsmt.open_sealed(file)
        except FormatError as error:
            raise CorruptImage(f"open layer: {path}: {error}") from None
        yield file, sealed


def _open(path: Path, undo: ExitStack, *, change: bool) -> int:
    fd = open_regular(path, "open writable layer", write=change)
    undo.callback(os.close, fd)
    return fd


# ---- changing a pair that nobody has open ----


def seal_pair(data: Path, index: Path) -> int:
    """Make the data file a read-only layer by itself: append its index and a trailer. How many entries.

    Garbage stays in it. The index file is of no more use, and is left.
    """
    with open_pair_files(data, index, change=True) as pair, _writing("seal", data):
        live = pair.live()
        if len(live) > SEALED_ENTRIES_MAX:
            raise UsageError(f"seal: {data}: {len(live)} entries, no reader takes more than {SEALED_ENTRIES_MAX}")
        size = pair.data.size // SECTOR * SECTOR
        tail = seal(pair.head, size, live)
        try:
            write_at(pair.data.fd, tail[:-HEAD_SIZE], size)
            os.fsync(pair.data.fd)
            write_at(pair.data.fd, tail[-HEAD_SIZE:], size + len(tail) - HEAD_SIZE)
            os.fsync(pair.data.fd)
        except OSError:
            os.ftruncate(pair.data.fd, size)
            raise
        return len(live)


def resize_pair(data: Path, index: Path, size: int) -> int:
    """Give the disk another size, 0 being that of what is below; its size before.

    What is cut off is gone: it reads as zeros if the disk becomes larger again. How far what is
    below reaches is not known here, so it is hidden when a disk that ended before it grows.
    """
    with open_pair_files(data, index, change=True) as pair, _writing("resize", data):
        head = replace(pair.head, virtual_size=size)
        try:
            field = head.build()[_SIZE_FIELD]
        except FormatError as error:
            raise UsageError(f"resize: {data}: {error.what}") from None
        before = pair.head.virtual_size
        if before and not size:
            raise UsageError(f"resize: {data}: what is below may reach beyond {before} bytes: want a size")
        cut = _hidden(pair, size, str(data)) if size else b""
        with replacing(index) as made:  # the size that counts, and what it cuts off, at once
            kept = HEAD_SIZE + pair.log.index_count * ENTRY_SIZE
            _copy(pair.index.fd, 0, made, 0, kept)
            write_at(made, cut, kept)
            write_at(made, field, _SIZE_FIELD.start)
        write_at(pair.data.fd, field, _SIZE_FIELD.start)
        os.fdatasync(pair.data.fd)
        return before


def _hidden(pair: PairFiles, size: int, name: str) -> bytes:
    """Entries of zeros from the end of the smaller disk to that of the larger one, and of all that was written."""
    live = pair.live()
    before = pair.head.virtual_size or size
    start = min(before, size) // SECTOR
    end = max(before // SECTOR, size // SECTOR, *(segment.end for segment in live), 0)
    if len(live) + (end - start) // LENGTH_MAX >= SEALED_ENTRIES_MAX:
        raise UsageError(f"resize: {name}: {size} bytes: too far from the {before} bytes it has")
    return pack(zeros(start, end - start, pair.data.size // SECTOR))


_SIZE_FIELD = slice(48, 56)  # of virtual_size, in a head


@dataclass(frozen=True)
class Compacted:
    """Bytes of the data file, before and after; index entries likewise."""

    data_before: int
    data_after: int
    entries_before: int
    entries_after: int


def compact_pair(data: Path, index: Path) -> Compacted:
    """Take the garbage out of a pair, in place: what was overwritten or discarded.

    Live data move into gaps that nothing points at; then a new index takes the old one's place
    at once; then the data file is cut. It needs no room but the new index's.
    """
    with open_pair_files(data, index, change=True) as pair, _writing("compact", data):
        plan = compact(pair.live())
        for source, target, length in plan.moves:
            _copy(pair.data.fd, source * SECTOR, pair.data.fd, target * SECTOR, length * SECTOR)
        os.fsync(pair.data.fd)
        with replacing(index) as made:
            write_at(made, pair.index.read_at(0, HEAD_SIZE) + pack(plan.live), 0)
        os.ftruncate(pair.data.fd, plan.data_end * SECTOR)
        os.fsync(pair.data.fd)
        return Compacted(pair.data.size, plan.data_end * SECTOR, pair.log.index_count, len(plan.live))


_COPY_SIZE = 4 << 20  # bytes at a time


def _copy(source: int, place: int, target: int, where: int, length: int) -> None:
    for done in range(0, length, _COPY_SIZE):
        write_at(target, os.pread(source, min(_COPY_SIZE, length - done), place + done), where + done)


@contextmanager
def _writing(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os(what, error, str(path)) from None
