# SPDX-License-Identifier: Apache-2.0
"""A blob with a digest table, and a registry that lies about it: what tests of checked blobs stand on."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from pathlib import Path

from blockdev import entryfiles
from blockdev.cache import Cache
from blockdev.catalog import Catalog
from blockdev.catalog import Place as Origin
from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE, Blob, Engine
from blockdev.fsck import Check, Finding, Fsck, Refetch
from blockdev.layer import NamedBlob
from blockdev.registry.client import Client
from blockdev.source.blob import RegistryBlob
from blockdev.supply import Supply
from formats import oci, presence
from formats.digests import UNIT, Place
from tests.fakes.http_server import Answer, HttpServer, Seen, ranged
from tests.filling import WAITING
from tests.small_image import NOBODY
from tests.tabled import tabled

WAIT = 20.0
BLOB, PLACE = tabled(random.Random(11).randbytes(9 * UNIT + 70_000))
DIGEST = oci.digest_of(BLOB)
END = PLACE.covered // UNIT * UNIT  # of the whole units


class Liar:
    """Serves a blob; the byte at `place` is wrong the next `lies` times that it is asked for."""

    def __init__(self) -> None:
        self.place = self.lies = self.asked = 0
        self.ranges = True
        self.cut: int | None = None  # of the next answer, where it breaks off
        self.requests: list[tuple[int, int]] = []  # first and last byte
        self.server = HttpServer(self._answer)

    def _answer(self, seen: Seen) -> Answer:
        assert seen.range
        if seen.range[0] != seen.range[1]:  # a probe asks for one byte
            self.requests.append(seen.range)
        answer = ranged(seen, BLOB) if self.ranges else Answer(200, {}, BLOB)
        answer.cut, self.cut = self.cut, None
        at = self.place - (seen.range[0] if self.ranges else 0)
        if 0 <= at < len(answer.body):
            self.asked += 1
            if self.lies:
                self.lies -= 1
                answer.body = altered(answer.body, at)
        return answer


def altered(content: bytes, at: int) -> bytes:
    wrong = bytearray(content)
    wrong[at] ^= 0x40
    return bytes(wrong)


class Bench:
    """An owner's engine, cache and supply, and a blob of a liar's."""

    def __init__(self, folder: Path, liar: Liar) -> None:
        self.blobs = folder
        self.liar = liar
        self.engine = Engine(work_threads=1, readahead_extents=32)
        self.cache = Cache(folder, self.engine)
        self.supply = Supply(self.engine, self.cache)
        self.client = Client(liar.server.host, NOBODY)

    def open(self, undo: ExitStack, place: Place | None = PLACE) -> NamedBlob:
        return self.supply.open(
            DIGEST,
            len(BLOB),
            Policy("eio", WAIT),
            lambda offer, undo: RegistryBlob(self.client, "app", DIGEST, len(BLOB), offer),
            undo,
            place,
        )

    def repair(self) -> list[Finding]:
        """Check the cache, and fetch again what is bad."""
        catalog = Catalog(self.blobs.parent / "catalog")
        catalog.note_place(Origin("registry", "app", plain_http=True), [DIGEST])
        fsck = Fsck(self.blobs, self.cache, catalog)
        report, damaged = fsck.check(Check((), digests=False), lambda done, total: None)
        refetch = Refetch(
            lambda place, blob, undo: RegistryBlob(self.client, "app", DIGEST, len(BLOB), blob.blob.store),
            self.supply.backoff,
            Policy("eio", WAIT),
            WAITING,
        )
        bad = {blob.digest: [one for one in report.bad if one.digest == blob.digest] for blob in damaged}
        return [one for blob in damaged for one in fsck.repair(blob, bad[blob.digest], refetch)]

    @property
    def data(self) -> Path:
        """The file of the blob's bytes."""
        return entryfiles.path_of(self.blobs, DIGEST)

    def head(self) -> presence.Head:
        """What the disk says."""
        return presence.Head.parse(entryfiles.map_of(self.data).read_bytes()[: presence.HEAD_SIZE])

    def cached(self) -> set[int]:
        """The extents of the cache's files; none is other than the blob's."""
        with open(entryfiles.map_of(self.data), "rb") as file:
            table = entryfiles.read_table(file.fileno(), len(BLOB))
        here = {extent for extent, entry in enumerate(table) if entry}
        content = self.data.read_bytes()
        for extent in here:
            part = slice(extent * EXTENT_SIZE, (extent + 1) * EXTENT_SIZE)
            assert content[part] == BLOB[part], f"extent {extent}"
        return here

    def close(self) -> None:
        self.engine.stop()
        assert self.supply.join(WAIT)
        self.engine.close()
        self.client.close()


def same(found: bytes | bytearray, offset: int) -> bool:
    return found == BLOB[offset : offset + len(found)]


def await_written(blob: Blob, size: int) -> None:
    """What has been read may be on its way to the disk still."""
    deadline = time.monotonic() + WAIT
    while blob.stat().present_bytes < size:
        assert time.monotonic() < deadline
        time.sleep(0.005)
