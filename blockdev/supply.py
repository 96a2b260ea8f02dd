# SPDX-License-Identifier: Apache-2.0
"""Blobs that fill as they are read: cache entries, joined to where their bytes come from.

    open()      an entry and its source, shared by all images that have the blob
    verify-0    a thread that checks the digest of each blob that has become whole

The fetch threads start with the first blob that needs them. Any thread may call.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from blockdev.cache import Cache, Entry
from blockdev.config import Policy
from blockdev.engine import Blob, Engine, EngineStopped
from blockdev.errors import BlockdevError, EngineError
from blockdev.fetch.pool import Pool
from blockdev.layer import CRC_ONLY, SHA256, NamedBlob
from blockdev.registry.backoff import Backoff
from blockdev.source import Offer, Source
from blockdev.source.retrying import Retrying
from blockdev.source.several import Several
from blockdev.units import Checked, Units
from blockdev.whose import Word
from formats.digests import Place

TABLES_MAX = 512 << 20  # bytes of the digest tables of all that is open, which are in memory: those of 4 TiB
PATIENCE = 60.0  # seconds for a digest table that must come before anything else, under the policy `hang`

log = logging.getLogger(__name__)

SourceOf = Callable[[Offer, ExitStack], Source]


@dataclass
class _Open:
    """An open blob."""

    blob: Blob
    sources: Several[Word]


class Supply:
    """The lazily filled blobs of one engine and one cache."""

    def __init__(self, engine: Engine, cache: Cache) -> None:
        self.backoff = Backoff()  # of every host that this owner talks to
        self._cache = cache
        self._pool = Pool(engine, backoff=self.backoff)
        self._open: dict[int, _Open] = {}  # by blob id
        self._tables: list[Units] = []  # for each use of a blob the one that it is held against
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
        repository: str = "",
        sleep: Callable[[float], object] = time.sleep,
    ) -> NamedBlob:
        """The blob with this digest; `undo` gives it back. source_of(offer, undo) says where its bytes
        come from, and offers what came unasked. Those who share a blob share their sources: whichever
        delivers. Of their policies, the most patient one rules.

        place: of the table that all of it is held against. If something is here already that was not, this waits
        for the table, as long as the policy does. repository: what the source is of (blockdev/catalog.py, Place.key).
        What sleep() raises ends the waiting.
        """
        with self._lock:
            entry = self._cache.open(digest, size, policy, place, repository)
            opened = self._open.get(entry.id) or _Open(entry.blob, Several(self.backoff, entry.claim))
            units = entry.units
            try:
                self._check_room(units)
                origin = source_of(units.offer if units else entry.offer, undo)
                source = Checked(origin, units) if units else origin
            except BaseException:
                entry.close()
                raise
            self._open[entry.id] = opened
            self._tables += [units] if units else []
            known_ill = origin.host in opened.sources.hosts and self.backoff.waiting(origin.host)
            undo.callback(self._leave, entry, opened.sources.add(source, entry.word))
            self._pool.attach(entry.id, entry.blob, opened.sources)
            if entry.blob.stat().down and not known_ill:
                entry.blob.healthy()  # of what the others' sources have failed at, this one's may be able
            self._start()
        patient = Retrying(origin, self.backoff, sleep)
        entry.trust(lambda units: units.load(patient, time.monotonic() + (policy.seconds or PATIENCE)))
        if entry.complete and not entry.verified:
            self._whole.put(entry.id)
        checked = SHA256 if units or entry.verified else CRC_ONLY
        return NamedBlob(digest, entry.blob, checked == CRC_ONLY, checked, units, entry.give_up)

    def _leave(self, entry: Entry, leave: Callable[[], bool]) -> None:
        with self._lock:
            if not leave():
                del self._open[entry.id]
                self._pool.detach(entry.id)
            if entry.units:
                self._tables.remove(entry.units)
        entry.close()

    def _check_room(self, units: Units | None) -> None:
        """EngineError if there is none for one more table."""
        size = sum(known.place.length for known in {*self._tables, units} if known)
        if size > TABLES_MAX:
            why = f"the digest tables of all that is open would have {size} bytes, at most {TABLES_MAX}"
            raise EngineError(f"opening a blob failed: {why}")

    def _start(self) -> None:
        self._pool.start()
        if self._verifier.ident is None:
            self._verifier.start()

    def blob_whole(self, id: int) -> None:
        """Every extent of a blob is here now."""
        self._whole.put(id)

    def blob_down(self, id: int) -> None:
        """The engine has given up on a blob's source: it is probed from now on."""
        self._pool.blob_down(id)

    def failure(self, id: int) -> tuple[Blob | None, str]:
        """An open blob, and what there is to say of its fetches; None and "" for what is not so."""
        with self._lock:
            opened = self._open.get(id)
            return opened.blob if opened else None, str(self._pool.complaint(id) or "")

    def why(self, blobs: Iterable[NamedBlob]) -> BlockdevError | None:
        """Why the last fetch of one of these failed, first what another try does not help with; None: none did."""
        wanted = {named.blob for named in blobs}
        with self._lock:
            ids = [id for id, opened in self._open.items() if opened.blob in wanted]
        errors = [error for error in map(self._pool.failure, ids) if error]
        return copy.copy(min(errors, key=lambda error: error.retriable, default=None))

    def error(self, id: int) -> BlockdevError | None:
        """Why the last fetch of a blob failed; None if it did not."""
        return self._pool.failure(id)

    def join(self, timeout: float) -> bool:
        """Wait for the threads of a stopped engine; False if some is stuck after `timeout` seconds."""
        self._whole.put(None)
        gone = self._pool.join(timeout)
        if self._verifier.ident is not None:
            self._verifier.join(timeout)
        return gone and not self._verifier.is_alive()

    def _verify_all(self) -> None:
        while (id := self._whole.get()) is not None:
            try:
                self._verify(id)
            except EngineStopped:
                return
            except Exception:  # without this thread no blob is verified any more
                log.exception("blob not verified blob=%d", id)

    def _verify(self, id: int) -> None:
        entry = self._cache.by_id(id)
        if entry is None:  # closed meanwhile: it is checked when it is next opened
            return
        try:
            if not entry.verified and entry.verify_here():
                log.info("blob verified digest=%s size=%d", entry.digest, entry.blob.size)
        except EngineStopped:
            raise
        except BlockdevError as error:
            log.warning("blob not verified digest=%s reason=%s", entry.digest, error)
        finally:
            entry.close()
