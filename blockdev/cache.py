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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blockdev import entryfiles, staging
from blockdev.config import Policy
from blockdev.engine import Blob, Engine
from blockdev.entryfiles import EntryFiles, Found
from blockdev.errors import CorruptImage, DeviceError, EngineError, from_os
from blockdev.openentry import DROP_ROUNDS, OpenEntry, User
from blockdev.scan import is_bad
from blockdev.source import Offer
from blockdev.units import UNIT_EXTENTS, Units
from blockdev.whose import OfAnother, Word, check_size
from formats import presence
from formats.digests import Place, Table
from formats.presence import Head

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

    @property
    def offer(self) -> Offer:
        """For bytes that came unasked, on its word."""
        return partial(self._state.offer, self.word)

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
        self._open: list[OpenEntry] = []  # one at most of a blob is named; what the others have goes with them
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
            admitted = ((one, one.admit(wanted, place, policy)) for one in self._candidates(wanted, place))
            return next(Entry(self, shared, user) for shared, user in admitted if user)

    def use(self, digest: str, size: int) -> Entry:
        """The entry as it is, beside other users: their policy stays. Who stores something in it answers for it."""
        with self._lock:
            shared = self._named(digest)
            if shared:
                check_size(shared.files.head, size)
            else:
                repository = entryfiles.repository_of(self._blobs, digest)
                shared = self._open_named(entryfiles.wanted(digest, size, repository=repository), None)
            return Entry(self, shared, shared.join())

    def in_use(self, blob: Blob) -> Entry | None:
        """Another use of an open blob, if it is one of the cache."""
        with self._lock:
            return self._find(lambda shared: shared.blob is blob)

    def by_id(self, id: int) -> Entry | None:
        """Another use of the open blob that fetches and events call `id`."""
        with self._lock:
            return self._find(lambda shared: shared.id == id)

    def _find(self, wanted: Callable[[OpenEntry], bool]) -> Entry | None:
        found = next(filter(wanted, self._open), None)
        return Entry(self, found, found.join()) if found else None

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
        if not found.in_use or found.size != size:
            with staging.Copy(self._blobs, fd, digest) as copy, self._lock:
                named = self._named(digest)
                if named is None or named.blob.size != size:
                    self._take_names(digest, copy.put)
                    return digest
        self._store(fd, digest, size)
        return digest

    def settle(self, shared: OpenEntry) -> None:
        """An entry apart that has been verified is what is kept from now on, whatever has the blob's names."""
        with self._lock:
            if shared.named or shared.files.had_names or not shared.verified:
                return
            digest = shared.digest
            if not (self._named(digest) or entryfiles.look(self._blobs, digest)).verified:
                self._take_names(digest, shared.files.put)
                shared.named = True

    def _take_names(self, digest: str, put: Callable[[], None]) -> None:
        """put() gives the blob's names to files; whoever has those open that had them keeps them, without."""
        named = self._named(digest)
        put()
        if named:
            named.named = False

    def _named(self, digest: str) -> OpenEntry | None:
        return next((one for one in self._open if one.named and one.digest == digest), None)

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
        entry.blob.settle()  # what a fetch has brought, and is writing still
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
                if self._named(digest):
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
            if self._named(digest):
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
            return any(one.verified for one in self._open if one.blob is blob)

    def _stat(self, digest: str) -> EntryStat:
        found = self.look(digest)
        with self._lock:
            shared = self._named(digest)
            if shared:
                size, present = shared.blob.size, shared.blob.stat().present_bytes
                return EntryStat(digest, size, present, found.allocated, shared.verified, in_use=True)
        return EntryStat(digest, found.size, found.present, found.allocated, found.verified, in_use=False)

    # ---- open entries ----

    def _candidates(self, wanted: Head, place: Place | None) -> Iterator[OpenEntry]:
        """Entries of a blob, those first whose files are kept. The last one suits in any case."""
        if not self._named(wanted.blob_digest):
            try:
                yield self._open_named(wanted, place)
            except OfAnother as error:
                log.warning("blob kept apart digest=%s: %s", wanted.blob_digest, error)
        same = [one for one in self._open if one.digest == wanted.blob_digest]
        yield from sorted(same, key=lambda one: not one.named)
        yield self._open_files(EntryFiles.open_nameless(self._blobs, wanted), wanted, place, named=False)

    def _open_named(self, wanted: Head, place: Place | None) -> OpenEntry:
        return self._open_files(EntryFiles.open(self._blobs, wanted), wanted, place, named=True)

    def _open_files(self, files: EntryFiles, wanted: Head, place: Place | None, *, named: bool) -> OpenEntry:
        with ExitStack() as undo:
            undo.callback(files.close)
            if named:
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
            undo.pop_all()
        shared = OpenEntry(files, blob, self._last_id, place, repository=wanted.repository, named=named)
        self._open.append(shared)
        return shared

    def _give_up(self, shared: OpenEntry, user: User) -> None:
        with self._lock:
            shared.give_up(user)

    def _leave(self, shared: OpenEntry, user: User) -> bool:
        with self._lock:
            shared.leave(user)
            if shared.users:
                return False
            self._open.remove(shared)
            try:
                if shared.named:
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
