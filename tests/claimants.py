# SPDX-License-Identifier: Apache-2.0
"""Images of several repositories that name one digest, of which not all have the blob that it stands for."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from blockdev import entryfiles
from blockdev.cache import Cache
from blockdev.catalog import Catalog
from blockdev.catalog import Place as Repository
from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE, Engine
from blockdev.fsck import Check, Finding, Fsck, Refetch
from blockdev.layer import NamedBlob
from blockdev.supply import Supply
from formats import oci, presence
from formats.digests import UNIT, Place
from tests.checked import await_written
from tests.fakes.memory_source import MemorySource
from tests.filling import WAITING
from tests.tabled import tabled

WAIT = 20.0
GOOD, TABLE = tabled(random.Random(5).randbytes(3 * UNIT + 1000))
SIZE = len(GOOD)
DIGEST = oci.digest_of(GOOD)
EVIL_PAYLOAD, EVIL_TABLE = tabled(random.Random(6).randbytes(3 * UNIT + 1000))
HERE = Repository("registry.example", "app", plain_http=False)
THERE = Repository("elsewhere.example", "app", plain_http=False)


class Bench:
    """An owner's engine, cache and supply; open() is what an image does that names DIGEST."""

    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.catalog = Catalog(folder / "catalog")
        self.good = MemorySource(GOOD, "good")
        self.evil = MemorySource(EVIL_PAYLOAD, "evil")
        self.start()

    def start(self) -> None:
        self.engine = Engine(work_threads=1, readahead_extents=0)
        self.cache = Cache(self.blobs, self.engine)
        self.supply = Supply(self.engine, self.cache)

    def open(
        self,
        undo: ExitStack,
        source: MemorySource,
        place: Place | None = None,
        *,
        of: Repository | None = None,
        policy: Policy | None = None,
        size: int = SIZE,
    ) -> NamedBlob:
        of = of or (THERE if source is self.evil else HERE)
        policy = policy or Policy("eio", WAIT)
        self.catalog.note_place(of, [DIGEST])
        return self.supply.open(DIGEST, size, policy, lambda offer, undo: source, undo, place, of.key)

    def read(self, source: MemorySource, place: Place | None = None, length: int = SIZE) -> bytes:
        """What an image of the source's repository reads that is mounted for it."""
        with ExitStack() as undo:
            blob = self.open(undo, source, place).blob
            try:
                return blob.read_at(0, length)
            finally:
                await_written(blob, length)

    def fill(self, *extents: int) -> None:
        """Some of it, from where it belongs."""
        with ExitStack() as undo:
            blob = self.open(undo, self.good).blob
            for extent in extents:
                blob.read_at(extent * EXTENT_SIZE, EXTENT_SIZE)
            await_written(blob, len(extents) * EXTENT_SIZE)
        self.good.reads.clear()

    def adopt(self, folder: Path) -> None:
        (folder / "file").write_bytes(GOOD)
        with open(folder / "file", "rb") as file:
            assert self.cache.adopt(file.fileno(), DIGEST) == DIGEST

    @property
    def data(self) -> Path:
        return entryfiles.path_of(self.blobs, DIGEST)

    def head(self) -> presence.Head:
        return presence.Head.parse(entryfiles.map_of(self.data).read_bytes()[: presence.HEAD_SIZE])

    def repair(
        self, sources: dict[Repository, MemorySource], meanwhile: Callable[[], None] = lambda: None
    ) -> list[Finding]:
        """meanwhile(): between looking and repairing."""
        fsck = Fsck(self.blobs, self.cache, self.catalog)
        report, damaged = fsck.check(Check((), digests=False), lambda done, total: None)
        meanwhile()
        policy = Policy("eio", 0.2)
        refetch = Refetch(lambda place, blob, undo: sources[place], self.supply.backoff, policy, WAITING)
        return [one for blob in damaged for one in fsck.repair(blob, report.bad, refetch)]

    def close(self) -> None:
        self.engine.stop()
        assert self.supply.join(WAIT)
        self.engine.close()
