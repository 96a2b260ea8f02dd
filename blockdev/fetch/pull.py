# SPDX-License-Identifier: Apache-2.0
"""Full pull: every byte of some blobs into the cache that devices read from, checked.

complete() asks for what is missing, blob after blob, at bulk priority: misses of devices go
first, and what they fetch is not asked for again. Only a window of requests waits in
the engine, however large the blobs. Threads that hash follow the part of each blob that
has arrived, so the digest is known soon after the last byte. What has arrived stays when
a pull is cut off: the next one asks for the rest.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE, Blob, Priority
from blockdev.errors import BlockdevError, DeviceError, EngineError, SourceError

WINDOW = 1024  # extents asked for and not here yet: 64 MiB, several times what all fetch threads hold
SPAN = 4096  # extents between the first that is missing and the last asked for: bounds the looks at the table
HASHERS = 2  # a blob's digest takes one core; more would starve the readers of a small machine
TICK = 0.02  # seconds between looks at what has arrived: a window lasts longer at 3 GB/s
STALL = 0.25  # seconds without an arrival until what is missing is asked for again: its fetch may have failed
PROBE = 32  # extents asked for where the disk takes nothing, to see whether it does again
UNWRITTEN_LIMIT = 5.0  # seconds without an arrival, and with a failed write; a slow line brings an extent more often


class Entry(Protocol):
    """A cached blob (blockdev/cache.py, Entry), open for this pull."""

    digest: str
    id: int
    blob: Blob

    @property
    def complete(self) -> bool: ...
    @property
    def verified(self) -> bool: ...
    def absent(self, first: int, count: int) -> list[tuple[int, int]]: ...
    def verify(self, reach: Callable[[int], None]) -> None: ...


class Supplier(Protocol):
    """Who knows why bytes do not come (blockdev/supply.py)."""

    def error(self, id: int) -> BlockdevError | None: ...


@dataclass(frozen=True)
class Pulled:
    """What there is of a blob; bytes. `fetched`: from its source since the pull began, for whomever."""

    digest: str
    size: int
    present: int
    fetched: int
    verified: bool


Progress = Callable[[int, int, int], None]  # bytes here, bytes checked, bytes in all


class _Cancelled(Exception):
    """The pull has ended: a hasher need not wait for more."""


class _Part:
    """One blob on its way. The transfer moves `local` on, a hasher waits for it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.extents = -(-entry.blob.size // EXTENT_SIZE)
        self.local = 0  # extents before this one are here
        self.asked = 0  # extents before this one are here or have been asked for
        self.missing: list[tuple[int, int]] = []  # runs in [local, asked) that are not here
        self.checked = 0  # bytes
        before = entry.blob.stat()
        self._fetched_before = before.fetched_bytes
        self._failures_before = before.write_failures  # until the last arrival
        self._cancelled = False
        self._moved = threading.Condition()

    @property
    def unwritten(self) -> int:
        """The errno with which the disk has not taken what came since the last arrival; 0 if nothing did."""
        stat = self.entry.blob.stat()
        return stat.write_error if stat.write_failures > self._failures_before else 0

    @property
    def outstanding(self) -> int:
        """Extents asked for and not here."""
        return sum(count for _, count in self.missing)

    def look(self) -> bool:
        """See what has arrived; whether anything has."""
        before = self.outstanding
        self.missing = self.entry.absent(self.local, self.asked - self.local)
        local = self.missing[0][0] if self.missing else self.asked
        if local != self.local:
            with self._moved:
                self.local = local
                self._moved.notify()
        arrived = self.outstanding < before
        if arrived:
            self._failures_before = self.entry.blob.stat().write_failures
        return arrived

    def ask(self, room: int) -> None:
        """Ask for up to `room` more extents."""
        while room and self.asked < self.extents and self.asked - self.local < SPAN:
            count = min(WINDOW, self.extents - self.asked, SPAN - (self.asked - self.local))
            end = self.asked + count
            for first, length in self.entry.absent(self.asked, count):
                length = min(length, room)
                room -= length
                self._request(first, length)
                self.missing.append((first, length))
                if not room:
                    end = first + length
                    break
            self.asked = end

    def ask_again(self) -> None:
        """Ask for what has not come; what is under way is not asked for twice."""
        for first, count in self.missing:
            self._request(first, count)

    def probe(self) -> None:
        """Ask for a little of it."""
        first, count = self.missing[0]
        self._request(first, min(count, PROBE))

    def _request(self, first: int, count: int) -> None:
        offset = first * EXTENT_SIZE
        length = min(count * EXTENT_SIZE, self.entry.blob.size - offset)
        self.entry.blob.prefetch(offset, length, Priority.BULK)

    def reach(self, end: int) -> None:
        """Wait, in a hasher, until the first `end` bytes are here."""
        with self._moved:
            self._moved.wait_for(lambda: self._cancelled or self.local * EXTENT_SIZE >= end)
            if self._cancelled:
                raise _Cancelled
            self.checked = end

    def cancel(self) -> None:
        with self._moved:
            self._cancelled = True
            self._moved.notify()

    def result(self) -> Pulled:
        self.entry.blob.settle()
        stat = self.entry.blob.stat()
        fetched = stat.fetched_bytes - self._fetched_before
        return Pulled(self.entry.digest, stat.size, stat.present_bytes, fetched, self.entry.verified)


class Pull:
    """The blobs of one image on their way. For one thread."""

    def __init__(self, name: str, entries: Sequence[Entry], supplier: Supplier, policy: Policy) -> None:
        """`policy` says how long a source that fails is waited for; messages call the image `name`."""
        self._name = name
        self._supplier = supplier
        self._policy = policy
        self._parts = [_Part(entry) for entry in entries]
        self._total = sum(part.entry.blob.size for part in self._parts)
        self._arrived_at = time.monotonic()
        self._asked_at = self._arrived_at

    def complete(self, progress: Progress, stopping: threading.Event) -> None:
        """Return once all is here and every digest is right.

        CorruptImage: a digest is wrong, and its blob has been dropped. What progress() raises
        ends the pull; so does `stopping`, which is set when the owner leaves.
        """
        hashers = ThreadPoolExecutor(HASHERS, "hash")
        try:
            hashed = [hashers.submit(self._verify, part) for part in self._parts]
            while not all(future.done() for future in hashed):
                self._step()
                self._report(progress)
                _raise_first(hashed)
                if stopping.wait(TICK):
                    raise DeviceError(f"pulling failed: {self._name}: the owner was stopped")
            _raise_first(hashed)
        finally:
            for part in self._parts:
                part.cancel()
            hashers.shutdown(cancel_futures=True)

    def result(self) -> list[Pulled]:
        """How far each blob is."""
        return [part.result() for part in self._parts]

    def _verify(self, part: _Part) -> None:
        if not (part.entry.verified and part.entry.complete):
            part.entry.verify(part.reach)
        part.checked = part.entry.blob.size

    # ---- the transfer ----

    def _step(self) -> None:
        """See what has arrived, and ask for more of it."""
        idle = self._outstanding() == 0
        arrived = [part for part in self._parts if part.look()]
        now = time.monotonic()
        if arrived or idle:
            self._arrived_at = self._asked_at = now
        elif now - self._asked_at >= STALL:
            self._asked_at = now
            for part in self._parts:
                if part.missing:
                    self._push(part, now - self._arrived_at)
        for part in self._parts:
            room = WINDOW - self._outstanding()
            if room > 0:
                part.ask(room)

    def _outstanding(self) -> int:
        return sum(part.outstanding for part in self._parts)

    def _push(self, part: _Part, idle: float) -> None:
        """Nothing has arrived for `idle` seconds: ask again, or raise if nothing will come."""
        digest, id = part.entry.digest, part.entry.id
        failing = part.entry.blob.stat().failing_seconds
        if failing:
            error = self._supplier.error(id) or self._any_error()
            waited = idle if self._policy.mode == "retry" else failing
            if not error.retriable or (self._policy.mode != "hang" and waited >= self._policy.seconds):
                raise copy.copy(error)
        unwritten = part.unwritten
        if unwritten and idle >= UNWRITTEN_LIMIT:
            raise EngineError(f"pulling failed: {digest}: it cannot be kept: {os.strerror(unwritten)}")
        if unwritten:
            part.probe()
        else:
            part.ask_again()

    def _any_error(self) -> BlockdevError:
        """Why others of these blobs fail: one whose host is to be left alone has no error of its own."""
        errors = [self._supplier.error(part.entry.id) for part in self._parts]
        retriable = [error for error in errors if error and error.retriable]
        return retriable[0] if retriable else SourceError(f"pulling failed: {self._name}: its source does not deliver")

    def _report(self, progress: Progress) -> None:
        here = sum(part.entry.blob.stat().present_bytes for part in self._parts)
        progress(here, sum(part.checked for part in self._parts), self._total)


def _raise_first(hashed: Sequence[Future[None]]) -> None:
    for future in hashed:
        if future.done():
            future.result()
