# SPDX-License-Identifier: Apache-2.0
"""The cache of a root: what is kept of which blob.

The engine fills and checks extents of an entry's files (blockdev/entryfiles.py); here
entries are shared between images, counted and removed; what may be believed of one is
openentry.py's matter. Assumes one process and one Cache a root. Any thread may call; the
lock is held for local file operations only.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blockdev import entryfiles, staging
from blockdev.config import Policy
from blockdev.engine import Blob, Engine
from blockdev.entryfiles import EntryFiles, Found, OfAnother
from blockdev.errors import CorruptImage, DeviceError, EngineError, from_os
from blockdev.openentry import DROP_ROUNDS, OpenEntry, User, Word
from blockdev.scan import is_bad
from blockdev.units import UNIT_EXTENTS, Units
from formats import presence
from formats.digests import Place, Table

log = logging.getLogger(__name__)


class Entry:
    """One use of a cached blob. `id` names the blob in fetches and events; `word`: on which its parts are taken."""

    def __init__(self, cache: Cache, shared: OpenEntry, user: User) -> None:
        self._cache = cache
        self._shared: OpenEntry | None = shared
        self._user = user
        self.word = user.word or Word()
        self.units = user.units  # what parts are held against that enter the cache on his word; None: checksums alone
        self.digest = shared.files.head.blob_digest
        self.id = shared.id
        self.blob = shared.blob

    @property
    def verified(self) -> bool:
        """Whether the whole blob is here, and its digest matched."""
        return self._state.verified

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return self.blob.stat().present_bytes == self.blob.size

    def absent(self, first: int, count: int) -> list[tuple[int, int]]:
        """Runs (first, count) of those of `count` extents from `first` that are not on disk."""
        try:
            written = os.pread(self._state.files.map_fd, 4 * count, presence.TABLE_OFFSET + 4 * first)
        except OSError as error:
            raise from_os("read presence map", error, self.digest) from error
        return presence.absent_runs(written, first, count)

    def verify(self, reach: Callable[[int], None] | None = None) -> None:
        """Read the whole blob, fetching what is missing, and compare its digest.

        reach(n) is called before bytes up to n are read, and may wait for them. A match is
        remembered durably. On a mismatch all of the entry is dropped: CorruptImage. If another
        thread is at it, its finding is taken.
        """
        self._state.check(reach, fetching=True)
        self._cache.settle(self._state)

    @property
    def repository(self) -> str:
        """Key of the one that what is not verified came from; "" if that is not known."""
        return self._state.files.head.repository

    @property
    def table(self) -> str:
        """The sha256 of the digest table that all parts were held against when they came; "" if they were not."""
        return self._state.files.head.table

    @property
    def words(self) -> list[Word]:
        """On which its users take its parts. Where there are several, parts come through their sources only."""
        return self._state.words

    @property
    def claim(self) -> Callable[[Sequence[Word]], None]:
        """To be called with the words on which parts come from now on, and which say the same of them."""
        return self._state.claim

    def trust(self, load: Callable[[Units], Table]) -> None:
        """Before its first use: have all that is here checked, if it was not held against the table when it came.

        load() gets the table, if it takes that. What does not match, and parts of units, are taken away.
        """
        self._state.trust(load)

    def verify_here(self) -> bool:
        """As verify(), but only if all of the blob is here now: False if not."""
        done = self._state.check(None, fetching=False)
        if done:
            self._cache.settle(self._state)
        return done

    def drop_rotten(self, offset: int, length: int) -> None:
        """Take an extent away if it is not what its checksum says, whoever reads it meanwhile."""
        files = self._state.files
        for _ in range(DROP_ROUNDS):
            if not is_bad(files.data_fd, files.map_fd, offset, length) or self.blob.drop(offset, length):
                return
        raise DeviceError(f"drop extent: {self.digest}: offset {offset}: it stays in use")

    def give_up(self) -> None:
        """Wait for nothing any more: reads of the blob fail now, unless another user waits for longer."""
        self._cache._give_up(self._state, self._user)

    def close(self) -> bool:
        """Give it back; True if nobody else uses the blob, which is then closed. Idempotent."""
        shared, self._shared = self._shared, None
        return shared is not None and self._cache._leave(shared, self._user)

    @property
    def _state(self) -> OpenEntry:
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
        self._open: dict[str, OpenEntry] = {}  # those whose files have names
        self._apart: list[OpenEntry] = []  # those that live only as long as they are open
        self._last_id = 0
        self._lock = threading.Lock()

    def open(self, digest: str, size: int, policy: Policy, place: Place | None = None, repository: str = "") -> Entry:
        """Use a blob, making its entry if there is none. Of several users, the most patient one's policy rules.

        place: of its digest table; then trust() comes before anything else. repository: the key of the image's
        own. Parts that no digest has confirmed are shared by those of one repository only, and by those of one
        table. If the entry is in use by others, this use has one of its own, which ends with its last user.

        CorruptImage if the blob is known to have another size; DeviceError if a later version of this
        program wrote the entry; AccessDenied or EngineError if it cannot be written.
        """
        wanted = entryfiles.wanted(digest, size, place.digest if place else "", repository)
        with self._lock:
            shared = self._suiting(wanted, place) or self._make(wanted, place)
            return self._join(shared, shared.user(place, repository, policy))

    def use(self, digest: str, size: int) -> Entry:
        """The entry as it is, beside other users: their policy stays. Who stores something in it answers for it."""
        with self._lock:
            shared = self._open.get(digest)
            if shared:
                entryfiles.check_size(shared.files.head, size)
            else:
                repository = entryfiles.repository_of(self._blobs, digest)
                shared = self._make(entryfiles.wanted(digest, size, repository=repository), None)
            return self._join(shared, User())

    def in_use(self, blob: Blob) -> Entry | None:
        """Another use of an open blob, if it is one of the cache."""
        with self._lock:
            return self._find(lambda shared: shared.blob is blob)

    def by_id(self, id: int) -> Entry | None:
        """Another use of the open blob that fetches and events call `id`."""
        with self._lock:
            return self._find(lambda shared: shared.id == id)

    def _find(self, wanted: Callable[[OpenEntry], bool]) -> Entry | None:
        found = next(filter(wanted, [*self._open.values(), *self._apart]), None)
        return self._join(found, User()) if found else None

    def _join(self, shared: OpenEntry, user: User) -> Entry:
        shared.join(user)
        return Entry(self, shared, user)

    def adopt(self, fd: int, digest: str = "") -> str:
        """Take a local file in as a whole blob, verified; its digest ("": to be found out).

        Devices that wait for parts of it get them at once. A blob that is here already is left as it
        is. CorruptImage if the file is not `digest`; it may be read more than once, and must not change.
        """
        try:
            size = os.fstat(fd).st_size
            wanted = entryfiles.wanted(digest or staging.digest_of(fd, "sha256"), size)
        except OSError as error:
            raise from_os("adopt blob", error, digest) from error
        digest = wanted.blob_digest
        found = self._stat(digest)
        if found.verified and found.size == size:
            return digest
        if not found.in_use:
            with staging.Copy(self._blobs, fd, digest) as copy, self._lock:
                if digest not in self._open:
                    copy.put()
                    return digest
        elif found.size != size:
            with staging.Copy(self._blobs, fd, digest) as copy, self._lock:
                copy.put()
                self._part(digest)
                return digest
        self._store(fd, digest, size)
        return digest

    def settle(self, shared: OpenEntry) -> None:
        """An entry apart that has been verified is what is kept from now on, whatever has the blob's names."""
        with self._lock:
            if not (shared.nameless and shared.verified):
                return
            digest = shared.files.head.blob_digest
            named = self._open.get(digest)
            if not (named or entryfiles.look(self._blobs, digest)).verified:
                shared.files.put()
                self._part(digest)
                self._apart.remove(shared)
                self._open[digest] = shared
            shared.nameless = False

    def _part(self, digest: str) -> None:
        """Whoever has the files open that had the blob's names keeps them, now that another's have the names."""
        shared = self._open.pop(digest, None)
        if shared:
            self._apart.append(shared)

    def _store(self, fd: int, digest: str, size: int) -> None:
        """Give a blob in use what it lacks."""
        found = staging.digest_of(fd, digest.partition(":")[0])
        if found != digest:
            raise CorruptImage(f"adopt blob: {digest}: offset 0: the file's digest is {found}")
        entry = self.use(digest, size)
        try:
            try:
                self._fill(entry, fd)
            except CorruptImage:  # by what was there before, and is gone now
                self._fill(entry, fd)
        except OSError as error:
            raise from_os("adopt blob", error, digest) from error
        finally:
            entry.close()

    def _fill(self, entry: Entry, fd: int) -> None:
        for offset in range(0, entry.blob.size, staging.PIECE):
            entry.blob.store(offset, os.pread(fd, staging.PIECE, offset))
        if not entry.complete:
            raise EngineError(f"adopt blob: {entry.digest}: not all of it could be written")
        entry.verify()

    def stat(self) -> list[EntryStat]:
        """Every entry, by digest."""
        return [self._stat(digest) for digest in entryfiles.digests(self._blobs)]

    def prune(self) -> Pruned:
        """Remove every entry that is not in use."""
        removed, kept, freed = [], [], 0
        for digest in entryfiles.digests(self._blobs):
            with self._lock:
                if digest in self._open:
                    kept.append(digest)
                    continue
                try:
                    allocated = entryfiles.allocated(self._blobs, digest)
                    entryfiles.remove(self._blobs, digest)
                except OSError as error:
                    raise from_os("prune cache", error) from error
            removed.append(digest)
            freed += allocated
        return Pruned(tuple(removed), tuple(kept), freed)

    def look(self, digest: str) -> Found:
        """What is on disk of a blob."""
        found = entryfiles.look(self._blobs, digest)  # not under the lock: the table of a whole blob takes its time
        if found.flaw:  # or so it looks in the middle of an opening or a removal
            with self._lock:
                found = entryfiles.look(self._blobs, digest)
        return found

    def discard(self, digest: str) -> None:
        """Remove an entry if its files make none now. DeviceError if it is in use, or a later version's."""
        with self._lock:
            if digest in self._open:
                raise DeviceError(f"remove cache entry: {digest}: it is in use")
            found = entryfiles.look(self._blobs, digest)
            if found.newer:
                raise DeviceError(f"remove cache entry: {digest}: {found.flaw}")
            if not found.flaw:
                return
            try:
                entryfiles.remove(self._blobs, digest)
            except OSError as error:
                raise from_os("remove cache entry", error) from error

    def size_of(self, digest: str, repository: str) -> int | None:
        """Bytes of a blob that has a usable entry, if that is known, or this repository has said so."""
        found = self.look(digest)
        return None if found.flaw or not (found.verified or found.repository == repository) else found.size

    def digests(self) -> list[str]:
        """Every entry."""
        return entryfiles.digests(self._blobs)

    def verified(self, blob: Blob) -> bool:
        """Whether an open blob of the cache is known to be whole and right."""
        with self._lock:
            return any(one.verified for one in [*self._open.values(), *self._apart] if one.blob is blob)

    def _stat(self, digest: str) -> EntryStat:
        found = self.look(digest)
        with self._lock:
            shared = self._open.get(digest)
            if shared:
                size, present = shared.blob.size, shared.blob.stat().present_bytes
                return EntryStat(digest, size, present, found.allocated, shared.verified, in_use=True)
        return EntryStat(digest, found.size, found.present, found.allocated, found.verified, in_use=False)

    # ---- open entries ----

    def _suiting(self, wanted: presence.Head, place: Place | None) -> OpenEntry | None:
        """An open entry that one more may use; none if nobody has the blob's names, and they are to be had."""
        named = self._open.get(wanted.blob_digest)
        return self._fitting([named, *self._apart], wanted, place) if named else None

    def _fitting(
        self, among: Iterable[OpenEntry | None], wanted: presence.Head, place: Place | None
    ) -> OpenEntry | None:
        same = (one for one in among if one and one.files.head.blob_digest == wanted.blob_digest)
        return next((one for one in same if one.suits(wanted.size, place, wanted.repository)), None)

    def _make(self, wanted: presence.Head, place: Place | None) -> OpenEntry:
        if wanted.blob_digest not in self._open:
            try:
                shared = self._open_files(EntryFiles.open(self._blobs, wanted), wanted, place, nameless=False)
                self._open[wanted.blob_digest] = shared
                return shared
            except OfAnother as error:
                log.warning("blob kept apart digest=%s: %s", wanted.blob_digest, error)
            fitting = self._fitting(self._apart, wanted, place)
            if fitting:
                return fitting
        shared = self._open_files(EntryFiles.open_nameless(self._blobs, wanted), wanted, place, nameless=True)
        self._apart.append(shared)
        return shared

    def _open_files(
        self, files: EntryFiles, wanted: presence.Head, place: Place | None, *, nameless: bool
    ) -> OpenEntry:
        with ExitStack() as undo:
            undo.callback(files.close)
            if not nameless:
                undo.callback(self._remove_empty, files)
            self._last_id += 1
            blob = self._engine.open_cached(
                files.data_fd,
                files.map_fd,
                id=self._last_id,
                size=wanted.size,
                table_offset=presence.TABLE_OFFSET,
                seal_offset=presence.SEAL_OFFSET,
                policy=Policy("eio"),  # until it has a user who waits for something
                unit=UNIT_EXTENTS if place else 1,
            )
            undo.callback(blob.close)
            sealed = files.head.verified
            if sealed and blob.stat().present_bytes != wanted.size:
                log.warning("blob no longer verified digest=%s: its map has lost extents", wanted.blob_digest)
                files.break_seal()
                sealed = False
            undo.pop_all()
        return OpenEntry(
            files, blob, self._last_id, place, sealed=sealed, repository=wanted.repository, nameless=nameless
        )

    def _give_up(self, shared: OpenEntry, user: User) -> None:
        with self._lock:
            shared.give_up(user)

    def _leave(self, shared: OpenEntry, user: User) -> bool:
        with self._lock:
            shared.leave(user)
            if shared.users:
                return False
            try:
                if shared in self._apart:
                    self._apart.remove(shared)
                else:
                    del self._open[shared.files.head.blob_digest]
                    self._remove_empty(shared.files)
            finally:
                shared.close()
            return True

    def _remove_empty(self, files: EntryFiles) -> None:
        """Of an image that could not be opened, most likely: what is left with nothing in it is no entry."""
        try:
            if files.head.size and files.empty():
                entryfiles.remove(self._blobs, files.head.blob_digest)
        except OSError as error:
            raise from_os("remove cache entry", error) from error
