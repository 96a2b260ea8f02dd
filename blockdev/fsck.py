# SPDX-License-Identifier: Apache-2.0
"""Checking the cache of a root, under whatever runs on it, and fetching again what is bad.

Promises: a check alone changes nothing; a repair takes away what is bad, asks the repository it
came from for exactly that, and has the blob verified again if it is whole then.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blockdev import entryfiles
from blockdev.cache import Cache, Entry
from blockdev.caller import Caller
from blockdev.catalog import Catalog, Place
from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE
from blockdev.entryfiles import Found
from blockdev.errors import BlockdevError, CorruptImage, EngineError, NotFound, UsageError
from blockdev.layer import NamedBlob
from blockdev.registry.backoff import Backoff
from blockdev.scan import Bad, scan
from blockdev.source import Source, Spilled
from blockdev.source.retrying import Retrying
from blockdev.whose import Word
from formats import oci
from formats.errors import FormatError

log = logging.getLogger(__name__)

_FOR_EVER = 86400.0  # seconds: what "hang" comes to for one range
_RANGE = 4 << 20  # bytes asked for at a time
_ROUNDS = 3  # a reader that has seen the bad bytes may take away the first ones that come in their place

Progress = Callable[[int, int], None]  # bytes looked at, and to be looked at in all
SourceOf = Callable[[Place, NamedBlob, ExitStack], Source]


@dataclass(frozen=True)
class Check:
    """What to look at: blobs by digest, images by name; nothing named is everything. digests: compare those of
    verified blobs too."""

    names: Sequence[str]
    digests: bool


@dataclass(frozen=True)
class Repair:
    """A caller's way to registries (blockdev/remote.py, Access.from_wire), and its patience with them."""

    access: Mapping[str, Any]
    policy: Policy


@dataclass(frozen=True)
class Refetch:
    """How bytes are had again: from where, how patiently, for whom."""

    source_of: SourceOf
    backoff: Backoff
    policy: Policy
    caller: Caller


@dataclass(frozen=True)
class Finding:
    """Something bad. state: "bad" (still there), "repaired", or "dropped": no longer there, and for the
    reason in `error` not fetched again. kind: of that error, by the name of its class."""

    digest: str
    offset: int
    length: int
    why: str
    whole: bool = False
    state: str = "bad"
    error: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Report:
    """What a check found. leftovers: files that are no part of the cache or were left half made, below the root."""

    blobs: int
    bytes: int
    hashed: int
    bad: tuple[Finding, ...]
    leftovers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class Fsck:
    """One check of one root."""

    def __init__(self, blobs: Path, cache: Cache, catalog: Catalog) -> None:
        self._blobs = blobs
        self._cache = cache
        self._catalog = catalog

    def check(self, wanted: Check, progress: Progress) -> tuple[Report, list[Found]]:
        """Look, and report. Also: the blobs that have something bad."""
        found = [self._cache.look(digest) for digest in self._chosen(wanted.names)]
        usable = [blob for blob in found if not blob.flaw]
        total, done = sum(blob.present for blob in usable), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(min(done, total), total)

        flawed = [blob for blob in found if blob.flaw and not blob.half_made]
        bad = [Finding(blob.digest, 0, blob.size, blob.flaw, whole=True) for blob in flawed]
        hashed = [blob for blob in usable if blob.present == blob.size and (wanted.digests or not blob.verified)]
        for blob in usable:
            bad += [Finding(**asdict(one)) for one in self._scan(blob, advance, hashed=blob in hashed)]
        progress(total, total)
        names_of_bad = {one.digest for one in bad}
        left = () if wanted.names else self._leftovers(found)
        report = Report(len(found), total, len(hashed), tuple(bad), tuple(left))
        return report, [blob for blob in found if blob.digest in names_of_bad]

    def _scan(self, blob: Found, advance: Callable[[int], None], *, hashed: bool) -> list[Bad]:
        bad = scan(self._blobs, blob, advance, hashed=hashed)
        if any(one.whole for one in bad):  # an extent may have changed under our hands
            bad = scan(self._blobs, blob, lambda count: None, hashed=True)
        return bad

    def _chosen(self, names: Sequence[str]) -> list[str]:
        cached = self._cache.digests()
        if not names:
            return cached
        chosen = [digest for name in names for digest in self._blobs_of(name)]
        return [digest for digest in cached if digest in chosen]

    def _blobs_of(self, name: str) -> list[str]:
        """The blobs that a digest or the name of an image stands for, as the root knows it."""
        try:
            if name.partition(":")[0] in entryfiles.ALGORITHMS:
                oci.parse_digest(name)
                if name not in self._cache.digests():
                    raise NotFound(f"checking the cache failed: {name}: there is no such blob in it")
                return [name]
            reference = oci.Reference.parse(name)
        except FormatError as error:
            raise UsageError(f"checking the cache failed: {name}: {error}") from None
        seen = self._catalog.seen(str(reference))
        digest = reference.digest or (seen.digest if seen else "")
        manifests = self._manifests(digest) if digest else []
        if not manifests:
            raise NotFound(f"checking the cache failed: {name}: this root has seen no such image")
        return [oci.layer_digest(layer) for manifest in manifests for layer in manifest.layers]

    def _manifests(self, digest: str) -> list[oci.Manifest]:
        """Those that are kept of an image, on whatever platform."""
        top = self._catalog.manifest(digest)
        digests = [image.digest for image in top.manifests] if isinstance(top, oci.Index) else [digest]
        found = map(self._catalog.manifest, digests)
        return [manifest for manifest in found if isinstance(manifest, oci.Manifest)]

    def _leftovers(self, found: Iterable[Found]) -> list[str]:
        root = self._blobs.parent
        half = [f"{entryfiles.path_of(self._blobs, blob.digest)}: {blob.flaw}" for blob in found if blob.half_made]
        paths = [*half, *map(str, entryfiles.foreign(self._blobs)), *map(str, self._catalog.foreign())]
        return [path.removeprefix(f"{root}/") for path in paths]

    # ---- repair ----

    def repair(self, blob: Found, bad: Sequence[Finding], refetch: Refetch) -> list[Finding]:
        """Take what is bad of a blob away and fetch it again. ConnectionError if the caller goes meanwhile."""
        if blob.flaw:
            return [self._discard(one) for one in bad]
        states = ["bad"] * len(bad)
        try:
            with ExitStack() as undo:
                entry = self._cache.use(blob.digest, blob.size)
                undo.callback(entry.close)
                place = None if self._fed(entry) else self._place_for(entry)
                for number, one in enumerate(bad):
                    _drop(entry, one)
                    states[number] = "dropped"
                self._refetch(entry, bad, place, refetch, undo)
        except BlockdevError as error:
            log.warning("blob not repaired digest=%s: %s", blob.digest, error)
            return [
                replace(one, state=state, error=str(error), kind=type(error).__name__)
                for one, state in zip(bad, states, strict=True)
            ]
        log.info("blob repaired digest=%s parts=%d", blob.digest, len(bad))
        return [replace(one, state="repaired") for one in bad]

    def _discard(self, one: Finding) -> Finding:
        """Files that are no entry: the blob starts empty when it is next used."""
        try:
            self._cache.discard(one.digest)
        except BlockdevError as error:
            return replace(one, error=str(error), kind=type(error).__name__)
        return replace(one, state="repaired")

    def _fed(self, entry: Entry) -> bool:
        """Whether those who have it open check what comes: it comes through their sources then."""
        return bool(entry.table) or any(word.table for word in entry.words) or len(entry.words) > 1

    def _place_for(self, entry: Entry) -> Place | None:
        """Where parts of it are to be had again: where its users have them from, or else those came from that are here
        and not verified. What is verified may be had from anywhere, and from then on only there."""
        word = next(iter(entry.words), None) or Word(repository=entry.repository)
        place = self._catalog.place(entry.digest, word.repository)
        if place is None and entry.verified and not entry.words:
            place = self._catalog.place(entry.digest)
        if place:
            entry.claim([Word(repository=place.key)])
        return place

    def _refetch(
        self, entry: Entry, bad: Sequence[Finding], place: Place | None, refetch: Refetch, undo: ExitStack
    ) -> None:
        ranges = [
            (offset, min(_RANGE, one.offset + one.length - offset))
            for one in bad
            for offset in range(one.offset, one.offset + one.length, _RANGE)
        ]
        if self._fed(entry):
            for offset, length in ranges:
                refetch.caller.look()
                _have_fetched(entry, offset, length)
        else:
            self._store(entry, ranges, place, refetch, undo)
        if entry.complete:
            entry.verify()

    def _store(
        self,
        entry: Entry,
        ranges: Sequence[tuple[int, int]],
        place: Place | None,
        refetch: Refetch,
        undo: ExitStack,
    ) -> None:
        if place is None:
            raise NotFound(f"fetching a blob again failed: {entry.digest}: where it came from is not known")
        origin = refetch.source_of(place, NamedBlob(entry.digest, entry.blob), undo)
        source = Retrying(origin, refetch.backoff, refetch.caller.sleep)
        for offset, length in ranges:
            refetch.caller.look()
            buffer = memoryview(bytearray(length))
            deadline = time.monotonic() + (refetch.policy.seconds or _FOR_EVER)
            try:
                source.read_into(offset, buffer, deadline=deadline, progress=lambda filled: refetch.caller.look())
                entry.blob.store(offset, buffer)
            except Spilled:  # all of the blob came, and went where it belongs
                continue


def _have_fetched(entry: Entry, offset: int, length: int) -> None:
    """By those who have the blob open, and into the cache."""
    for _ in range(_ROUNDS):
        entry.blob.read_into(offset, bytearray(length))
        entry.blob.settle()
        if not entry.absent(offset // EXTENT_SIZE, -(-length // EXTENT_SIZE)):
            return
    raise EngineError(f"fetching a blob again failed: {entry.digest}: offset {offset}: it cannot be written")


def _drop(entry: Entry, bad: Finding) -> None:
    if not bad.whole:
        end = bad.offset + bad.length
        for offset in range(bad.offset, end, EXTENT_SIZE):
            entry.drop_rotten(offset, min(EXTENT_SIZE, end - offset))
        return
    with contextlib.suppress(CorruptImage):  # it empties the entry
        entry.verify()
