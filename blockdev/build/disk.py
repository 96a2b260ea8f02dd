# SPDX-License-Identifier: Apache-2.0
"""A raw disk as a layer: import.

What is zero for 32 KiB or longer is not stored, whether the file has a hole there or
zeros, so equal disks give equal layers. A disk that cannot seek is spooled into an
unlinked file first, as a layer begins with its disk's size. The layer is there whole
or not at all. Memory is bounded by a few pieces.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from blockdev.build.layerfile import LayerFile, Wrapping
from blockdev.engine import is_zero
from blockdev.errors import EngineError, UsageError, from_os
from blockdev.replacement import replacing
from formats.errors import FormatError
from formats.lsmt import COMMIT_STEP, NULL_UUID, SECTOR, VIRTUAL_SIZE_MAX, CommitWriter, Head

GRAIN = 4096  # where zeros are looked for: a file system's block
HOLE_MIN = 32 << 10  # shorter runs of zeros are stored: an entry costs more than they do once compressed
_PIECE = 1 << 20  # bytes read at a time; a multiple of GRAIN and COMMIT_STEP

Progress = Callable[[int, int], None]  # bytes of the disk done, and in all


@dataclass(frozen=True)
class LayerOptions:
    """How to make the layer. With a parent, zeros of the disk hide what lies below."""

    wrapping: Wrapping = field(default_factory=Wrapping)
    uuid: str = NULL_UUID
    parent_uuid: str = NULL_UUID


@dataclass(frozen=True)
class Imported:
    """A layer that was made; bytes. `stored` is what of the disk is kept, before compression."""

    disk_size: int
    stored: int
    layer_size: int
    index_entries: int


def import_disk(
    fd: int, name: str, out: Path, options: LayerOptions | None = None, progress: Progress | None = None
) -> Imported:
    """Make a layer at `out` of the raw disk that fd reads and messages call `name`.

    UsageError if the disk is not whole sectors or cannot be a layer, or an option is bad.
    """
    options = options or LayerOptions()
    head = _head(options)
    with replacing(out) as target, _seekable(fd, name, out) as (source, size):
        if size == 0 or size % SECTOR or size > VIRTUAL_SIZE_MAX:
            raise UsageError(f"import disk: {name}: {size} bytes are not a whole number of {SECTOR}-byte sectors")
        try:
            with LayerFile(target, options.wrapping) as layer:
                writer = CommitWriter(layer.write, Head(0, size, uuid=head.uuid, parent_uuid=head.parent_uuid))
                cutter = _Cutter(writer, mask=head.parent_uuid != NULL_UUID)
                for done in _feed(source, name, size, cutter):
                    (progress or _silent)(done, size)
                cutter.finish()
                trailer = writer.finish()
                return Imported(size, cutter.stored, layer.finish(), trailer.index_count)
        except FormatError as error:
            raise UsageError(f"import disk: {name}: {error.what}") from error
        except OSError as error:
            raise from_os("import disk", error, f"{name} to {out}") from error


def _head(options: LayerOptions) -> Head:
    """UUIDs as overlaybd writes them: upper case."""
    head = Head(0, 0, uuid=options.uuid.upper(), parent_uuid=options.parent_uuid.upper())
    try:
        head.build()
    except FormatError as error:
        raise UsageError(f"import disk: {error.what}") from error
    if not (head.uuid and head.parent_uuid):
        raise UsageError("import disk: an empty text is no UUID")
    options.wrapping.check()
    return head


class _Cutter:
    """Cuts a disk into runs of data and of zeros, and hands them to the writer in order."""

    def __init__(self, writer: CommitWriter, *, mask: bool) -> None:
        self._writer = writer
        self._mask = mask
        self._start = 0  # of `_data` in the disk
        self._data = bytearray()  # of the run at hand, not handed on yet
        self._zeros = 0  # that follow the run, not decided yet
        self.stored = 0

    def add(self, piece: memoryview) -> None:
        """The next bytes of the disk."""
        if is_zero(piece):
            self.skip(len(piece))
            return
        for start in range(0, len(piece), GRAIN):
            grain = piece[start : start + GRAIN]
            if is_zero(grain):
                self.skip(len(grain))
            else:
                self._store(grain)

    def skip(self, length: int) -> None:
        """The next bytes of the disk are zeros."""
        self._zeros += length

    def finish(self) -> None:
        """The disk ends here."""
        if self._zeros < HOLE_MIN:
            self._data += bytes(self._zeros)
            self._zeros = 0
        self._end_run()

    def _store(self, grain: memoryview) -> None:
        if self._zeros >= HOLE_MIN:
            self._end_run()
        else:
            self._data += bytes(self._zeros)
            self._zeros = 0
        self._data += grain
        if len(self._data) >= _PIECE:
            self._hand_on(len(self._data) // COMMIT_STEP * COMMIT_STEP)

    def _end_run(self) -> None:
        """Hand on the run, then the zeros after it."""
        self._hand_on(len(self._data))
        if self._mask and self._zeros:
            self._writer.zeroed(self._start // SECTOR, self._zeros // SECTOR)
        self._start += self._zeros
        self._zeros = 0

    def _hand_on(self, length: int) -> None:
        if length:
            self._writer.data(self._start // SECTOR, bytes(self._data[:length]))
        del self._data[:length]
        self._start += length
        self.stored += length


def _feed(fd: int, name: str, size: int, cutter: _Cutter) -> Iterator[int]:
    """Give the whole disk to the cutter; yields how far it is."""
    buffer = memoryview(bytearray(_PIECE))
    at = 0
    for start, end in _data_ranges(fd, size):
        cutter.skip(start - at)
        at = start
        while at < end:
            piece = buffer[: min(_PIECE, end - at)]
            _read(fd, name, at, piece)
            cutter.add(piece)
            at += len(piece)
            yield at
    cutter.skip(size - at)
    yield size


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file may hold anything but zeros, on GRAIN borders; all of it if it cannot tell holes."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        yield 0, size
        return
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        start = max(at, start // GRAIN * GRAIN)
        at = min(-(-end // GRAIN) * GRAIN, size)
        yield start, at


def _read(fd: int, name: str, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if not got:
            raise EngineError(f"import disk: {name}: it ends at {offset + done} while it is read")
        done += got


@contextmanager
def _seekable(fd: int, name: str, out: Path) -> Iterator[tuple[int, int]]:
    """The disk as something that can seek, and its size: fd itself, or a copy beside `out`."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        yield fd, os.lseek(fd, 0, os.SEEK_END)
        return
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(TemporaryFile(dir=out.absolute().parent)).fileno()
            size = _spool(fd, copy)
        except OSError as error:
            raise from_os("import disk", error, f"{name} to {out}") from error
        yield copy, size


def _spool(fd: int, copy: int) -> int:
    """Copy a stream to its end, leaving holes where it is zero; its length."""
    size = 0
    while piece := os.read(fd, _PIECE):
        if not is_zero(piece):
            done = 0
            while done < len(piece):
                done += os.pwrite(copy, piece[done:], size + done)
        size += len(piece)
    os.ftruncate(copy, size)
    return size


def _silent(done: int, total: int) -> None:
    pass
