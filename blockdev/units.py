# SPDX-License-Identifier: Apache-2.0
"""Blobs whose every part is checked before anybody sees it: a digest table between source and cache.

Units    what is known of the parts of one blob: its table, once it is there, and what came wrong
Checked  a Source that fills whole units, and lets on only those whose sha256 is the table's

The table comes first, in one request together with the end of the blob; where that brings the
whole blob, it waits for the table aside. Whoever delivers, a registry, a mirror or a peer, is held
against it. formats/digests.py says what it is.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blockdev.early import Early
from blockdev.engine import Fetch
from blockdev.errors import BlockdevError, CorruptImage, SourceError
from blockdev.source import PROGRESS_SIZE, Altered, Offer, Source, Spilled
from formats import presence
from formats.digests import UNIT, Place, Table
from formats.errors import FormatError

log = logging.getLogger(__name__)

UNIT_EXTENTS = UNIT // presence.EXTENT_SIZE  # of a unit
REFUSED_DELAY = 5.0  # seconds; a unit that came wrong twice is not asked for by each of its readers anew
_AT_ONCE = 0.001  # seconds; a pause of 0 would mean that nobody asks again
_TABLE = -1  # among the wrong units: the table itself

ReadHere = Callable[[int, int], bytes]  # what the cache's file holds at an offset, believed by nobody


class Units:
    """The parts of one blob that its table speaks of. Thread-safe."""

    def __init__(self, digest: str, place: Place, offer: Offer, here: ReadHere, folder: Path) -> None:
        """offer() takes what is right and was not asked for. `folder`: where there is room for what comes before the
        table."""
        self.place = place
        self.mismatches = 0  # units that came wrong
        self._digest = digest
        self._keep = offer
        self._here = here
        self._folder = folder
        self._early: Early | None = None  # while the table is fetched
        self._came_from = place.blob_size  # what lies behind that came with the table
        self._table: Table | None = None
        self._turn = threading.Lock()  # held while the table is fetched
        self._attempts = 0
        self._error: BlockdevError | None = None  # of the last attempt
        self._wrong: dict[int, float] = {}  # unit: monotonic time until which nobody asks for it

    # ---- the table ----

    def load(self, source: Source, deadline: float) -> Table:
        """The table: as it is known, as the cache has it, or from its place in the blob.

        What failed for one has failed for all that waited for it. The errors of
        Source.read_into(); Altered or CorruptImage if it is not the table that was promised.
        """
        seen = self._attempts
        if self._table:
            return self._table
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise SourceError(f"reading a blob failed: {source.name}: no time left while its digest table is fetched")
        try:
            if self._table is None and self._attempts != seen and self._error:
                raise copy.copy(self._error)
            if self._table is None:
                self._attempts += 1
                self._error = None
                self._table = self._of_cache() or self._fetch(source, deadline)
            return self._table
        except BlockdevError as error:
            self._error = error
            raise
        finally:
            self._turn.release()

    def ready(self, source: Source, offset: int, length: int, deadline: float) -> Table:
        """As load(), for who wants a range. Spilled if it is worth looking whether that came with the table."""
        first = self._table is None
        table = self.load(source, deadline)
        if first and offset + length > self._came_from:
            text = f"reading a blob failed: {source.name} at {offset}: it may have come with the digest table"
            raise Spilled(text, delay=_AT_ONCE)
        return table

    @property
    def _end_start(self) -> int:
        """Where the unit starts that has the last covered byte."""
        return (self.place.covered - 1) // UNIT * UNIT

    def _of_cache(self) -> Table | None:
        return self._parse(self._here(self.place.offset, self.place.length))

    def _fetch(self, source: Source, deadline: float) -> Table:
        start = self._end_start
        if self._wrong.get(_TABLE, 0.0) > time.monotonic():
            raise CorruptImage(f"read blob: {self._digest}: offset {self.place.offset}: the table came wrong twice")
        end = memoryview(bytearray(self.place.blob_size - start))
        with Early(self._folder, self.place.blob_size) as early:
            self._early = early
            try:
                source.read_into(start, end, deadline=deadline, progress=lambda filled: None)
            except Spilled:  # who opens an image does not ask again
                if here := self._of_cache():
                    return here
                raise
            finally:
                self._early = None
            table = self._parse(bytes(end[self.place.offset - start :][: self.place.length]))
            if table is None:
                raise self._complain(_TABLE, self.place.offset, "digest table")
            self._wrong.pop(_TABLE, None)
            self._came_from = 0 if early.whole else start
            for offset, piece in early.taken() if early.whole else [(start, end)]:
                self._offer(table, offset, piece)
        return table

    def _parse(self, body: bytes) -> Table | None:
        """None: it is another one than was promised."""
        if f"sha256:{hashlib.sha256(body).hexdigest()}" != self.place.digest:
            return None
        try:
            table = Table.parse(body)
        except FormatError as error:
            raise CorruptImage(f"read blob: {self._digest}: offset {self.place.offset}: {error.what}") from error
        if table.place != self.place:
            raise CorruptImage(f"read blob: {self._digest}: offset {self.place.offset}: the table of other bytes")
        return table

    # ---- units ----

    def offer(self, offset: int, content: memoryview) -> int:
        """An Offer: what is no whole and right unit is not kept. Before there is a table, all is kept for it."""
        if self._table:
            return self._offer(self._table, offset, content)
        if early := self._early:
            early.put(offset, content)
        return 0

    def _offer(self, table: Table, offset: int, content: memoryview) -> int:
        stored = 0
        for unit in range(offset // UNIT, -(-(offset + len(content)) // UNIT)):
            start, length = table.span(unit)
            piece = content[max(0, start - offset) :][:length]
            if start >= offset and table.matches(unit, piece):
                stored += self._keep(start, piece)
            elif start >= offset and len(piece) == length:
                self.wrong(unit)
        return stored

    def keep(self, unit: int, content: memoryview) -> None:
        """A unit that has been found right, and that the fetch it came with cannot hand over."""
        self._keep(unit * UNIT, content)

    def right(self, unit: int) -> None:
        """A unit came as it should."""
        if self._wrong:
            self._wrong.pop(unit, None)

    def wrong(self, unit: int) -> BlockdevError:
        """A unit came otherwise: Altered, and the second time in a row CorruptImage."""
        return self._complain(unit, unit * UNIT, f"extent of {min(UNIT, self.place.blob_size - unit * UNIT)} bytes")

    def _complain(self, unit: int, offset: int, what: str) -> BlockdevError:
        again = unit not in self._wrong
        self._wrong[unit] = 0.0 if again else time.monotonic() + REFUSED_DELAY
        self.mismatches += 1
        text = f"read blob: {self._digest}: offset {offset}: {what} is not what the image's manifest says"
        log.error("%s", text)
        return Altered(text) if again else CorruptImage(text)

    def check_refused(self, offset: int, length: int) -> None:
        """CorruptImage if all that is asked for came wrong twice a moment ago."""
        now = time.monotonic()
        asked = range(offset // UNIT, -(-(offset + length) // UNIT))
        if self._wrong and all(self._wrong.get(unit, 0.0) > now for unit in asked):
            raise CorruptImage(
                f"read blob: {self._digest}: offset {offset}: what came for it twice is not what the manifest says"
            )

    def bad_spans(self, table: Table, entries: memoryview) -> Iterator[tuple[int, int]]:
        """Offset and length of the units that the cache has part of (`entries`: its presence table), or has wrong."""
        for unit in range(-(-len(entries) // UNIT_EXTENTS)):
            present = entries[unit * UNIT_EXTENTS : (unit + 1) * UNIT_EXTENTS].tolist()
            start, length = table.span(unit)
            if any(present) and not (all(present) and table.matches(unit, self._here(start, length))):
                yield start, length


class Checked:
    """A source of one blob behind its table. Thread-safe as the source it wraps."""

    def __init__(self, source: Source, units: Units) -> None:
        self.name = source.name
        self.host = source.host
        self.size = source.size
        self._source = source
        self._units = units

    def read_into(self, offset: int, buffer: memoryview, *, deadline: float, progress: Callable[[int], None]) -> None:
        """As Source.read_into(); bytes around the range are read too, where it is not whole units."""
        self._units.check_refused(offset, len(buffer))
        table = self._units.ready(self._source, offset, len(buffer), deadline)
        start = offset // UNIT * UNIT
        end = min(-(-(offset + len(buffer)) // UNIT) * UNIT, self.size)
        if (start, end) == (offset, offset + len(buffer)):
            reading = _Reading(self._units, table, offset, buffer, progress)
        else:
            cut = _Cut(offset - start, end - start, buffer, progress)
            reading = _Reading(self._units, table, start, cut.target, cut.reach)
        self._source.read_into(start, reading.target, deadline=deadline, progress=reading.reach)
        reading.finish()

    def fill(self, fetch: Fetch, deadline: float) -> bool:
        """As Source.fill(), of whole units: what has come when it fails is not lost."""
        if fetch.offset % UNIT or (fetch.length % UNIT and fetch.offset + fetch.length != self.size):
            return False
        self._units.check_refused(fetch.offset, fetch.length)
        table = self._units.ready(self._source, fetch.offset, fetch.length, deadline)
        reading = _Reading(self._units, table, fetch.offset, fetch.buffer, fetch.advance)
        fetch.held = True
        try:
            done = self._source.fill(fetch, deadline)
        except SourceError:
            reading.reach(fetch.filled)
            raise
        if done:
            reading.reach(fetch.length)
            reading.finish()
        return done

    def probe(self, deadline: float) -> None:
        """As Source.probe()."""
        self._source.probe(deadline)


class _Reading:
    """Whole units on their way into a buffer: each is looked at when it is there."""

    def __init__(
        self, units: Units, table: Table, offset: int, target: memoryview, advance: Callable[[int], None]
    ) -> None:
        self.target = target
        self._units = units
        self._table = table
        self._offset = offset
        self._advance = advance
        self._looked = 0
        self._error: BlockdevError | None = None

    def reach(self, filled: int) -> None:
        """The first `filled` bytes are there."""
        while self._looked < len(self.target):
            unit = (self._offset + self._looked) // UNIT
            piece = self.target[self._looked :][:UNIT]
            if self._looked + len(piece) > filled:
                return
            self._looked += len(piece)
            self._look(unit, piece)

    def _look(self, unit: int, piece: memoryview) -> None:
        if not self._table.matches(unit, piece):
            error = self._units.wrong(unit)
            self._error = self._error or error
            return
        self._units.right(unit)
        if self._error is None:
            self._advance(self._looked)
        else:
            self._units.keep(unit, piece)

    def finish(self) -> None:
        """All is there. The error of the first unit that was wrong."""
        if self._error:
            raise self._error


class _Cut:
    """A range inside of units: copied out of them as they are found right."""

    def __init__(self, skip: int, length: int, buffer: memoryview, progress: Callable[[int], None]) -> None:
        """The units have `length` bytes, and `skip` of them come before the range."""
        self.target = memoryview(bytearray(length))
        self._skip = skip
        self._buffer = buffer
        self._progress = progress
        self._told = 0

    def reach(self, filled: int) -> None:
        """The first `filled` bytes of the units are right."""
        done = min(filled - self._skip, len(self._buffer))
        if done - self._told >= PROGRESS_SIZE or self._told < done == len(self._buffer):
            self._buffer[self._told : done] = self.target[self._skip + self._told : self._skip + done]
            self._told = done
            self._progress(done)
