# SPDX-License-Identifier: Apache-2.0
"""The two files of a cached blob, below a root's blobs/.

    sha256/HEX       the blob's bytes, sparse where they are missing
    sha256/HEX.map   its presence map (docs/formats/presence-map.md)

Here they are made, opened, sealed, looked at and removed; the engine fills them. Assumes
that one process writes, and that no two of its threads open the same entry at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from blockdev import whose
from blockdev.errors import CorruptImage, DeviceError, EngineError, UsageError, from_os, shortage
from blockdev.ownfile import open_nameless, open_own, read_own
from blockdev.ranges import data_ranges
from formats import presence
from formats.errors import FormatError

log = logging.getLogger(__name__)

ALGORITHMS = {"sha256": 64, "sha512": 128}  # hex digits of a digest
SIZE_MAX = 1 << 40  # bytes of a blob, the engine's BLOB_SIZE_MAX: far more than any layer, and tables of 64 MiB
_MAP = ".map"
_BLOCK = 512  # st_blocks' unit, whatever the file system
_BROKEN = bytes(presence.SEAL_SIZE)
_ENTRY = 4  # bytes of a table entry
_TABLE_ALIGN = 256  # bytes, which divides ...
_TABLE_PIECE = 64 << 10  # ... bytes of a table looked at together


@dataclass(frozen=True)
class Found:
    """What the files of an entry say of it, unchecked; bytes. `allocated` counts disk space, map included.

    `flaw`: why they hold nothing that could be used. half_made: since one of them is not there.
    """

    digest: str
    size: int
    present: int
    allocated: int
    verified: bool
    flaw: str = ""
    half_made: bool = False
    newer: bool = False  # a later version's
    repository: str = ""  # its key: what is unverified came from there


class EntryFiles:
    """An entry opened for use: both descriptors, and the head of its map."""

    def __init__(self, path: Path, data_fd: int, map_fd: int, head: presence.Head) -> None:
        self.data_fd = data_fd
        self.map_fd = map_fd
        self.head = head
        self.folder = path.parent
        self.had_names = True  # those of the blob: files that have lost them never get any again
        self._path = path

    @classmethod
    def open(cls, blobs: Path, wanted: presence.Head) -> EntryFiles:
        """The files of a blob. What they hold damaged, or not for who wants it (whose.py), is thrown away.

        CorruptImage if the blob is known to have another size; whose.OfAnother if others say that it has another;
        DeviceError if a later version of this program wrote the map; AccessDenied or EngineError if
        they cannot be written.
        """
        path = path_of(blobs, wanted.blob_digest)

        def named(file: Path) -> int:
            return open_own(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)

        try:
            return cls._open(path, named, wanted)
        except EngineError:  # no room, most likely
            if _is_half_made(path):
                with contextlib.suppress(OSError):  # what is in its way is told already
                    remove(blobs, wanted.blob_digest)
            raise

    @classmethod
    def open_nameless(cls, blobs: Path, wanted: presence.Head) -> EntryFiles:
        """Empty files beside those of the blob, which others use. They go when they are closed, unless put()."""
        path = path_of(blobs, wanted.blob_digest)
        files = cls._open(path, lambda file: open_nameless(file.parent), wanted)
        files.had_names = False
        return files

    @classmethod
    def _open(cls, path: Path, opener: Callable[[Path], int], wanted: presence.Head) -> EntryFiles:
        fds: list[int] = []
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in (path, map_of(path)):
                fds.append(opener(file))
            files = cls(path, fds[0], fds[1], wanted)
            files._take_over(wanted)
            return files
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, OSError):
                raise from_os("open cache entry", error, str(path)) from error
            raise

    def _take_over(self, wanted: presence.Head) -> None:
        """Go on with what the files hold of this blob, or make them an empty entry."""
        raw = os.pread(self.map_fd, presence.HEAD_SIZE, 0)
        try:
            found = self.head = _parse(raw, wanted.blob_digest)
            _check_data(found, os.fstat(self.data_fd).st_size)
            if found.verified and _present_bytes(self.map_fd, found.size) != found.size:
                log.warning("blob no longer verified digest=%s: its map has lost extents", found.blob_digest)
                self.head = replace(found, verified=False)
            kept = whose.taken_over(self.head, wanted, self.empty)
            if kept != found:
                self.write_head(kept)
        except presence.NewerVersion as error:
            raise DeviceError(f"open cache entry: {wanted.blob_digest}: {error.what}") from error
        except FormatError as error:
            if raw:
                log.warning("cache entry starts empty digest=%s: %s", wanted.blob_digest, error.what)
            self._start_empty(wanted, new=not raw)

    def _start_empty(self, wanted: presence.Head, *, new: bool) -> None:
        os.ftruncate(self.map_fd, 0)
        if not new:
            os.fsync(self.map_fd)  # after a power cut, the new head must not stand before the old table
        os.ftruncate(self.data_fd, 0)
        os.ftruncate(self.data_fd, wanted.size)
        os.ftruncate(self.map_fd, presence.map_size(wanted.size))
        os.pwrite(self.map_fd, wanted.build(), 0)
        self.head = wanted

    def put(self) -> None:
        """Take the names of the blob's files, whatever has them. Files that never had a name only."""
        try:
            name_files(self._path, self.data_fd, self.map_fd)
        except OSError as error:
            raise from_os("name cache entry", error, str(self._path)) from error
        self.had_names = True

    def empty(self) -> bool:
        """Whether no extent is here."""
        try:
            return not _any_present(self.map_fd, self.head.size)
        except OSError as error:
            raise from_os("read cache entry", error, str(self._path)) from error

    def read(self, offset: int, length: int) -> bytes:
        """What the data file holds there, which may be nothing yet."""
        try:
            return os.pread(self.data_fd, length, offset)
        except OSError as error:
            raise from_os("read cache entry", error, str(self._path)) from error

    def sync(self) -> None:
        """All that is in the files, and the files' names, are on the disk."""
        try:
            with ExitStack() as undo:
                directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                undo.callback(os.close, directory)
                for fd in (self.data_fd, self.map_fd, directory):
                    os.fsync(fd)
        except OSError as error:
            raise from_os("sync cache entry", error, str(self._path)) from error

    def write_seal(self) -> None:
        """Say durably that the blob is whole and its digest right. sync() comes before."""
        self._write(replace(self.head, verified=True).build()[presence.SEAL_OFFSET :], presence.SEAL_OFFSET)

    def break_seal(self) -> None:
        """Say durably that nothing is known of the blob as a whole."""
        self._write(_BROKEN, presence.SEAL_OFFSET)

    def write_head(self, head: presence.Head) -> None:
        """Say durably what the extents that are here were held against, or whose they are, and those that come will be.

        While no engine has the map, or before the blob is sealed.
        """
        self._write(head.build(), 0)
        self.head = head

    def write_words(self, table: str, repository: str) -> None:
        """As write_head(), while an engine has the map, and may break the seal: what is left of that is none."""
        head = replace(self.head, table=table, repository=repository)
        self._write(head.build()[: presence.SEAL_OFFSET], 0)
        self.head = head

    def _write(self, content: bytes, place: int) -> None:
        try:
            os.pwrite(self.map_fd, content, place)
            os.fsync(self.map_fd)
        except OSError as error:
            raise from_os("mark blob", error, str(self._path)) from error

    def close(self) -> None:
        """Once."""
        os.close(self.data_fd)
        os.close(self.map_fd)


def wanted(digest: str, size: int, table: str = "", repository: str = "") -> presence.Head:
    """The head of a blob's entry. UsageError if that is no digest, or no size; CorruptImage: one that no blob has."""
    head = presence.Head(digest, size, verified=False, table=table, repository=repository)
    try:
        head.build()
    except FormatError as error:
        raise UsageError(f"open cache entry: {digest}: {error}") from error
    if digest.partition(":")[0] not in ALGORITHMS:
        raise UsageError(f"open cache entry: {digest}: only {' and '.join(ALGORITHMS)} are known")
    if size > SIZE_MAX:
        raise CorruptImage(f"open cache entry: {digest}: {size} bytes: more than {SIZE_MAX}, which no layer has")
    return head


def path_of(blobs: Path, digest: str) -> Path:
    """Where the bytes of a blob are."""
    algorithm, _, name = digest.partition(":")
    return blobs / algorithm / name


def map_of(path: Path) -> Path:
    """Where the map is of the bytes at `path`."""
    return path.with_name(path.name + _MAP)


def digests(blobs: Path) -> list[str]:
    """Every entry, also those of which but one file is there."""
    return sorted({digest for path in blobs.glob("*/*") if (digest := _digest_of_name(path))})


def foreign(blobs: Path) -> Iterator[Path]:
    """What lies below blobs/ and belongs to no entry, whatever put it there."""
    for path in sorted(blobs.rglob("*")):
        ours = path.parent == blobs and path.name in ALGORITHMS
        if not ours and not (path.parent.parent == blobs and _digest_of_name(path)):
            yield path


def look(blobs: Path, digest: str) -> Found:
    """What the files of an entry say, at this moment. EngineError if there is nothing left to look at them with."""
    path = path_of(blobs, digest)
    nothing = Found(digest, 0, 0, allocated(blobs, digest), verified=False)
    try:
        with open(open_own(map_of(path)), "rb") as file:
            head = _parse(file.read(presence.HEAD_SIZE), digest)
            _check_data(head, path.stat().st_size)
            present = _present_bytes(file.fileno(), head.size)
    except FileNotFoundError as error:
        missing = "data" if error.filename == os.fspath(path) else "map"
        return replace(nothing, flaw=f"its {missing} is missing", half_made=True)
    except FormatError as error:
        return replace(nothing, flaw=error.what, newer=isinstance(error, presence.NewerVersion))
    except OSError as error:
        if shortage(error):
            raise from_os("look at cache entry", error, str(path)) from error
        return replace(nothing, flaw=f"its map cannot be read: {error.strerror}")
    verified = head.verified and present == head.size
    return replace(nothing, size=head.size, present=present, verified=verified, repository=head.repository)


def allocated(blobs: Path, digest: str) -> int:
    """Bytes of disk space that the files of an entry take."""
    total = 0
    for file in (path_of(blobs, digest), map_of(path_of(blobs, digest))):
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_blocks * _BLOCK
    return total


def name_files(path: Path, data_fd: int, map_fd: int) -> None:
    """Give two files without names those of the blob at `path`, both or none; durably, in place of what has them."""
    names = path, map_of(path)
    with ExitStack() as undo:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, directory)
        for name in reversed(names):  # no map speaks of another's bytes
            name.unlink(missing_ok=True)
        with ExitStack() as unname:
            for fd, name in zip((data_fd, map_fd), names, strict=True):
                # With a directory given, and only then, os.link() follows the symbolic link.
                os.link(f"/proc/self/fd/{fd}", name.name, dst_dir_fd=directory, follow_symlinks=True)
                unname.callback(name.unlink)
            os.fsync(directory)
            unname.pop_all()


def repository_of(blobs: Path, digest: str) -> str:
    """As Found.repository, of the files at this moment."""
    return look(blobs, digest).repository


def remove(blobs: Path, digest: str) -> None:
    """Delete both files, the map first: what is left of an interrupted removal is empty."""
    path = path_of(blobs, digest)
    for file in (map_of(path), path):
        try:
            file.unlink(missing_ok=True)
        except IsADirectoryError:  # put there in its place
            file.rmdir()


def table_pieces(map_fd: int, size: int) -> Iterator[tuple[int, memoryview]]:
    """The table of a blob's map where the file has data, in bounded pieces: the first extent of each (a multiple
    of 64), and its entries. What is left out is absent: a hole costs nothing, whatever size a blob claims. OSError.
    """
    end = presence.TABLE_OFFSET + _ENTRY * presence.extent_count(size)
    done = presence.TABLE_OFFSET
    for start, stop in data_ranges(map_fd, end):
        at = max(done, start - start % _TABLE_ALIGN)
        while at < stop:
            read = os.pread(map_fd, min(_TABLE_PIECE, stop - at), at)
            entries = memoryview(read[: len(read) - len(read) % _ENTRY]).cast("I")
            if not entries:
                break
            yield (at - presence.TABLE_OFFSET) // _ENTRY, entries
            at += _ENTRY * len(entries)
        done = max(done, at)


def read_table(map_fd: int, size: int) -> memoryview:
    """All of the table of a blob's map: an entry for each extent, those that the file lacks as 0."""
    table = memoryview(bytearray(_ENTRY * presence.extent_count(size))).cast("I")
    for first, entries in table_pieces(map_fd, size):
        table[first : first + len(entries)] = entries
    return table


def _parse(raw: bytes, digest: str) -> presence.Head:
    head = presence.Head.parse(raw)
    if head.blob_digest != digest:
        raise FormatError(f"it is the map of {head.blob_digest}")
    return head


def _check_data(head: presence.Head, size: int) -> None:
    if head.size != size:
        raise FormatError(f"it is the map of {head.size} bytes, the data file has {size}")


def _is_half_made(path: Path) -> bool:
    """Whether an opening has got no further than files without a head, for want of room."""
    try:
        return not any(read_own(map_of(path), presence.HEAD_SIZE))
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _any_present(map_fd: int, size: int) -> bool:
    return any(any(entries) for _, entries in table_pieces(map_fd, size))


def _present_bytes(map_fd: int, size: int) -> int:
    last = presence.extent_count(size) - 1
    present = 0
    for first, entries in table_pieces(map_fd, size):
        present += (len(entries) - entries.tolist().count(0)) * presence.EXTENT_SIZE
        if first <= last < first + len(entries) and entries[last - first]:
            present -= (last + 1) * presence.EXTENT_SIZE - size
    return present


def _digest_of_name(path: Path) -> str:
    """The blob that a file below blobs/ALGORITHM belongs to; "" if it is no such file."""
    algorithm, name = path.parent.name, path.name.removesuffix(_MAP)
    ours = re.fullmatch(r"[0-9a-f]+", name) and len(name) == ALGORITHMS.get(algorithm)
    return f"{algorithm}:{name}" if ours and path.is_file() and not path.is_symlink() else ""
