# SPDX-License-Identifier: Apache-2.0
"""The cache of a root: what is kept of which blob, and what may be believed of it.

    blobs/sha256/HEX       the blob's bytes, sparse where they are missing
    blobs/sha256/HEX.map   its presence map (docs/formats/presence-map.md)

The engine fills and checks extents; here entries are made, shared between images,
verified as a whole, counted and removed. Assumes one process and one Cache a root.
Any thread may call; the lock is held for local file operations only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blockdev.config import Policy
from blockdev.engine import Blob, Engine
from blockdev.errors import CorruptImage, DeviceError, EngineError, UsageError, from_os
from formats import presence
from formats.errors import FormatError

log = logging.getLogger(__name__)

_MAP = ".map"
_ALGORITHMS = ("sha256", "sha512")
_PIECE = 4 << 20  # bytes hashed or adopted at a time; a multiple of the extent
_DROP_ROUNDS = 100  # a reader pins an extent for one pread: one more round finds it free
_BLOCK = 512  # st_blocks' unit, whatever the file system


@dataclass
class _Open:
    """What all users of an open entry share."""

    head: presence.Head
    blob: Blob
    id: int
    data_fd: int
    map_fd: int
    users: int = 1
    checking: threading.Lock = field(default_factory=threading.Lock)


class Entry:
    """One use of a cached blob. `id` names the blob in fetches and events."""

    def __init__(self, cache: Cache, shared: _Open) -> None:
        self._cache = cache
        self._shared: _Open | None = shared
        self.digest = shared.head.blob_digest
        self.id = shared.id
        self.blob = shared.blob

    @property
    def verified(self) -> bool:
        """Whether the whole blob was here once, and its digest matched."""
        return self._state.head.verified

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return self.blob.stat().present_bytes == self.blob.size

    def verify(self) -> None:
        """Read the whole blob, fetching what is missing, and compare its digest.

        A match is remembered durably. On a mismatch all of the entry is dropped: CorruptImage.
        """
        self._cache._verify(self._state)

    def close(self) -> bool:
        """Give it back; True if nobody else uses the blob, which is then closed. Idempotent."""
        shared, self._shared = self._shared, None
        return shared is not None and self._cache._leave(shared)

    @property
    def _state(self) -> _Open:
        if self._shared is None:
            raise ValueError(f"cache entry {self.digest}: used after close")
        return self._shared


@dataclass(frozen=True)
class EntryStat:
    """What is on disk of a blob; bytes. `allocated` counts disk space, map included."""

    digest: str
    size: int
    present: int
    allocated: int
    verified: bool
    in_use: bool


@dataclass(frozen=True)
class Pruned:
    """What prune() did: digests, and bytes of disk space."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    freed: int


class Cache:
    """The blobs below one directory."""

    def __init__(self, blobs: Path, engine: Engine) -> None:
        self._blobs = blobs
        self._engine = engine
        self._open: dict[str, _Open] = {}
        self._last_id = 0
        self._lock = threading.Lock()

    def open(self, digest: str, size: int, policy: Policy) -> Entry:
        """Use a blob, making its entry if there is none. Of several users, the last one's policy rules.

        CorruptImage if the blob is known to have another size; DeviceError if a later version
        of this program wrote the entry; AccessDenied or EngineError if it cannot be written.
        """
        entry = self._use(digest, size, policy)
        entry.blob.set_policy(policy)
        return entry

    def _use(self, digest: str, size: int, first_policy: Policy) -> Entry:
        wanted = _wanted(digest, size)
        with self._lock:
            shared = self._open.get(digest)
            if shared:
                _check_size(shared.head, size)
                shared.users += 1
            else:
                shared = self._open[digest] = self._open_files(wanted, first_policy)
            return Entry(self, shared)

    def by_id(self, id: int) -> Entry | None:
        """Another use of the open blob that fetches and events call `id`."""
        with self._lock:
            for shared in self._open.values():
                if shared.id == id:
                    shared.users += 1
                    return Entry(self, shared)
        return None

    def adopt(self, fd: int, digest: str) -> None:
        """Take a local file in as the whole blob `digest`, verified.

        CorruptImage if it is another blob; the file may be read more than once, and must not change.
        """
        try:
            size = os.fstat(fd).st_size
            found = _digest_of(fd, digest)
        except OSError as error:
            raise from_os("adopt blob", error, digest) from error
        if found != digest:
            raise CorruptImage(f"adopt blob: {digest}: offset 0: the file's digest is {found}")
        entry = self._use(digest, size, Policy("eio"))
        try:
            if not (entry.verified and entry.complete):
                for offset, piece in _pieces(fd):
                    entry.blob.store(offset, piece)
                if not entry.complete:
                    raise EngineError(f"adopt blob: {digest}: not all of it could be written")
                entry.verify()
        finally:
            entry.close()

    def stat(self) -> list[EntryStat]:
        """Every entry, by digest."""
        with self._lock:
            return [self._stat(path) for path in self._entries()]

    def prune(self) -> Pruned:
        """Remove every entry that is not in use."""
        removed, kept, freed = [], [], 0
        with self._lock:
            for path in self._entries():
                found = self._stat(path)
                if found.in_use:
                    kept.append(found.digest)
                    continue
                try:
                    _map_of(path).unlink(missing_ok=True)
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise from_os("prune cache", error) from error
                removed.append(found.digest)
                freed += found.allocated
        return Pruned(tuple(removed), tuple(kept), freed)

    # ---- entries on disk ----

    def _entries(self) -> list[Path]:
        """Data files, also of maps that have lost theirs."""
        found = {
            path.with_suffix("") if path.suffix == _MAP else path
            for algorithm in _ALGORITHMS
            for path in (self._blobs / algorithm).glob("*")
        }
        return sorted(found)

    def _stat(self, path: Path) -> EntryStat:
        digest = f"{path.parent.name}:{path.name}"
        allocated = sum(file.stat().st_blocks * _BLOCK for file in (path, _map_of(path)) if file.exists())
        shared = self._open.get(digest)
        if shared:
            present = shared.blob.stat().present_bytes
            return EntryStat(digest, shared.head.size, present, allocated, shared.head.verified, in_use=True)
        try:
            written = _map_of(path).read_bytes()
            head = presence.Head.parse(written[: presence.HEAD_SIZE])
        except (FileNotFoundError, FormatError):
            return EntryStat(digest, 0, 0, allocated, verified=False, in_use=False)
        return EntryStat(digest, head.size, _present_bytes(written, head.size), allocated, head.verified, in_use=False)

    def _open_files(self, wanted: presence.Head, policy: Policy) -> _Open:
        algorithm, _, name = wanted.blob_digest.partition(":")
        path = self._blobs / algorithm / name
        fds: list[int] = []
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in (path, _map_of(path)):
                fds.append(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            data_fd, map_fd = fds
            head = _claim(wanted, data_fd, map_fd)
            self._last_id += 1
            blob = self._engine.open_cached(
                data_fd,
                map_fd,
                id=self._last_id,
                size=wanted.size,
                table_offset=presence.TABLE_OFFSET,
                policy=policy,
            )
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, OSError):
                raise from_os("open cache entry", error, str(path)) from error
            raise
        return _Open(head, blob, self._last_id, data_fd, map_fd)

    # ---- open entries ----

    def _leave(self, shared: _Open) -> bool:
        with self._lock:
            shared.users -= 1
            if shared.users:
                return False
            del self._open[shared.head.blob_digest]
            shared.blob.close()
            os.close(shared.data_fd)
            os.close(shared.map_fd)
            return True

    def _verify(self, shared: _Open) -> None:
        digest = shared.head.blob_digest
        with shared.checking:
            found = _digest_of_blob(shared.blob, digest)
            if found == digest:
                _write_verified(shared)
                return
            dropped = _drop_all(shared.blob)
        log.error("blob dropped digest=%s extents=%d: its content has digest %s", digest, dropped, found)
        raise CorruptImage(f"verify blob: {digest}: offset 0: the content's digest is {found}")


def _wanted(digest: str, size: int) -> presence.Head:
    head = presence.Head(digest, size, verified=False)
    try:
        head.build()
    except FormatError as error:
        raise UsageError(f"open cache entry: {digest}: {error}") from error
    if digest.partition(":")[0] not in _ALGORITHMS:
        raise UsageError(f"open cache entry: {digest}: only {' and '.join(_ALGORITHMS)} are known")
    return head


def _map_of(path: Path) -> Path:
    return path.with_name(path.name + _MAP)


def _check_size(head: presence.Head, size: int) -> None:
    if head.size != size:
        raise CorruptImage(f"open blob: {head.blob_digest}: offset {size}: said to end here, but has {head.size} bytes")


def _claim(wanted: presence.Head, data_fd: int, map_fd: int) -> presence.Head:
    """The entry's head if the files hold a usable entry of this blob; else make them an empty one."""
    raw = os.pread(map_fd, presence.HEAD_SIZE, 0)
    try:
        head = presence.Head.parse(raw)
        if head.blob_digest != wanted.blob_digest:
            raise FormatError(f"it is the map of {head.blob_digest}")
        if head.verified:
            _check_size(head, wanted.size)
        if head.size != wanted.size or os.fstat(data_fd).st_size != wanted.size:
            raise FormatError(f"it is the map of {head.size} bytes, {wanted.size} are expected")
        return head
    except presence.NewerVersion as error:
        raise DeviceError(f"open cache entry: {wanted.blob_digest}: {error.what}") from error
    except FormatError as error:
        if raw:
            log.warning("cache entry starts empty digest=%s: %s", wanted.blob_digest, error.what)
    os.ftruncate(map_fd, 0)
    os.ftruncate(data_fd, 0)
    os.ftruncate(data_fd, wanted.size)
    os.ftruncate(map_fd, presence.map_size(wanted.size))
    os.pwrite(map_fd, wanted.build(), 0)
    return wanted


def _present_bytes(written: bytes, size: int) -> int:
    """What a presence map in a file says is there."""
    count = presence.extent_count(size)
    table = written[presence.TABLE_OFFSET :][: 4 * count].ljust(4 * count, b"\0")
    entries = memoryview(table).cast("I").tolist()
    present = (count - entries.count(0)) * presence.EXTENT_SIZE
    return present - (count * presence.EXTENT_SIZE - size if entries and entries[-1] else 0)


def _write_verified(shared: _Open) -> None:
    """First the bytes, then the claim."""
    head = presence.Head(shared.head.blob_digest, shared.head.size, verified=True)
    try:
        os.fsync(shared.data_fd)
        os.fsync(shared.map_fd)
        os.pwrite(shared.map_fd, head.build(), 0)
        os.fsync(shared.map_fd)
    except OSError as error:
        raise from_os("mark blob as verified", error, head.blob_digest) from error
    shared.head = head


def _drop_all(blob: Blob) -> int:
    """Empty the entry; extents that somebody reads at this moment in a later round."""
    dropped = 0
    for _ in range(_DROP_ROUNDS):
        dropped += blob.drop(0, blob.size)
        if not blob.stat().present_bytes:
            return dropped
    raise DeviceError(f"drop blob: {blob.size} bytes: some stay in use")


def _digest_of_blob(blob: Blob, like: str) -> str:
    algorithm = like.partition(":")[0]
    digest = hashlib.new(algorithm)
    buffer = memoryview(bytearray(_PIECE))
    for offset in range(0, blob.size, _PIECE):
        piece = buffer[: min(_PIECE, blob.size - offset)]
        blob.read_into(offset, piece)
        digest.update(piece)
    return f"{algorithm}:{digest.hexdigest()}"


def _digest_of(fd: int, like: str) -> str:
    algorithm = like.partition(":")[0]
    if algorithm not in _ALGORITHMS:
        raise UsageError(f"adopt blob: {like}: only {' and '.join(_ALGORITHMS)} are known")
    digest = hashlib.new(algorithm)
    for _, piece in _pieces(fd):
        digest.update(piece)
    return f"{algorithm}:{digest.hexdigest()}"


def _pieces(fd: int) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while piece := os.pread(fd, _PIECE, offset):
        yield offset, piece
        offset += len(piece)
