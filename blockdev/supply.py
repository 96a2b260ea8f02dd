# SPDX-License-Identifier: Apache-2.0
"""Blobs that fill as they are read: cache entries, joined to where their bytes come from.

    open()      an entry and its source, shared by all images that have the blob
    verify-0    a thread that checks the digest of each blob that has become whole

The fetch threads start with the first blob that needs them. Any thread may call.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Protocol

from blockdev.cache import Cache, Entry
from blockdev.config import Policy
from blockdev.engine import Engine, EngineStopped
from blockdev.errors import BlockdevError, CorruptImage
from blockdev.fetch.pool import Pool
from blockdev.layer import CRC_ONLY, SHA256, NamedBlob
from blockdev.registry.backoff import Backoff
from blockdev.source import Source
from blockdev.source.retrying import Retrying
from blockdev.units import Checked
from formats.digests import Place

PATIENCE = 60.0  # seconds for a digest table that must come before anything else, under the policy `hang`

log = logging.getLogger(__name__)


class Into(Protocol):
    """Who takes bytes of a blob that nobody asked for: the blob, or its units."""

    def store(self, offset: int, content: memoryview) -> int: ...


SourceOf = Callable[[Into, ExitStack], Source]


class Supply:
    """The lazily filled blobs of one engine and one cache."""

    def __init__(self, engine: Engine, cache: Cache) -> None:
        self.backoff = Backoff()  # of every host that this owner talks to
        self._cache = cache
        self._pool = Pool(engine, backoff=self.backoff)
        self._started = False
        self._sources: defaultdict[int, list[Source]] = defaultdict(list)  # by blob id, the one in use last
        self._digests: dict[int, str] = {}
        self._unwritten: dict[int, int] = {}  # blob id: errno
        self._lock = threading.Lock()  # of the above; held for local file operations only
        self._whole: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._verifier = threading.Thread(target=self._verify_all, name="verify-0", daemon=True)

    def open(
        self,
        digest: str,
        size: int,
        policy: Policy,
        source_of: SourceOf,
        undo: ExitStack,
        place: Place | None = None,
    ) -> NamedBlob:
        """The blob with this digest; `undo` gives it back. source_of(into, undo) says where its bytes
        come from, and puts what came unasked into `into`: of several users of a blob, the last one's
        source and policy rule.

        place: of the table that all of it is held against. If something is here already that was not, this waits
        for the table, as long as the policy does.
        """
        with self._lock:
            entry = self._cache.open(digest, size, policy, place)
            units = entry.units
            try:
                origin = source_of(units or entry.blob, undo)
                source = Checked(origin, units) if units else origin
            except BaseException:
                entry.close()
                raise
            undo.callback(self._leave, entry, source)
            self._sources[entry.id].append(source)
            self._digests[entry.id] = digest
            self._pool.attach(entry.id, entry.blob, source)
            self._start()
        patient = Retrying(origin, self.backoff)
        entry.trust(lambda units: units.load(patient, time.monotonic() + (policy.seconds or PATIENCE)))
        if entry.complete and not entry.verified:
            self._whole.put(entry.id)
        checked = SHA256 if units or entry.verified else CRC_ONLY
        return NamedBlob(digest, entry.blob, doubtful=checked == CRC_ONLY, checked=checked, units=units)

    def _leave(self, entry: Entry, source: Source) -> None:
        with self._lock:
            others = self._sources[entry.id]
            others.remove(source)
            if others:
                self._pool.attach(entry.id, entry.blob, others[-1])
            else:
                del self._sources[entry.id], self._digests[entry.id]
                self._unwritten.pop(entry.id, None)
                self._pool.detach(entry.id)
        entry.close()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._pool.start()
            self._verifier.start()

    def blob_whole(self, id: int) -> None:
        """Every extent of a blob is here now."""
        self._whole.put(id)

    def blob_down(self, id: int) -> None:
        """The engine has given up on a blob's source: it is probed from now on."""
        self._pool.blob_down(id)

    def failure(self, id: int) -> tuple[str, str]:
        """Digest of an open blob, and why its last fetch failed; "" for what is not so."""
        with self._lock:
            return self._digests.get(id, ""), str(self._pool.failure(id) or "")

    def corrupt(self, blobs: Iterable[NamedBlob]) -> CorruptImage | None:
        """Why the last fetch of one of these failed, if what came was not what the image's manifest says."""
        names = {named.name for named in blobs}
        with self._lock:
            ids = [id for id, digest in self._digests.items() if digest in names]
        errors = (self._pool.failure(id) for id in ids)
        return next((error for error in errors if isinstance(error, CorruptImage)), None)

    def error(self, id: int) -> BlockdevError | None:
        """Why the last fetch of a blob failed; None if it did not."""
        return self._pool.failure(id)

    def note_unwritten(self, id: int, error: int) -> None:
        """The cache of a blob could not be written, for this errno."""
        with self._lock:
            if id in self._digests:
                self._unwritten[id] = error

    def unwritten(self, id: int) -> int:
        """The errno with which the cache of a blob was last not written; 0 if it always was."""
        return self._unwritten.get(id, 0)

    def join(self, timeout: float) -> bool:
        """Wait for the threads of a stopped engine; False if some is stuck after `timeout` seconds."""
        self._whole.put(None)
        gone = self._pool.join(timeout)
        if self._started:
            self._verifier.join(timeout)
        return gone and not self._verifier.is_alive()

    def _verify_all(self) -> None:
        while (id := self._whole.get()) is not None:
            entry = self._cache.by_id(id)
            if entry is None:  # closed meanwhile: it is checked when it is next opened
                continue
            try:
                if not entry.verified and entry.verify_here():
                    log.info("blob verified digest=%s size=%d", entry.digest, entry.blob.size)
            except EngineStopped:
                return
            except BlockdevError as error:
                log.warning("blob not verified digest=%s reason=%s", entry.digest, error)
            finally:
                entry.close()
