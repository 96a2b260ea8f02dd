# SPDX-License-Identifier: Apache-2.0
"""Checking and repairing with a source in memory: what cannot be repaired is said, and what is not ours is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import entryfiles
from blockdev.caller import Caller
from blockdev.catalog import Catalog, Place
from blockdev.config import Policy
from blockdev.errors import AccessDenied, BlockdevError, NotFound, SourceError
from blockdev.fsck import Check, Finding, Fsck, Refetch
from blockdev.registry.backoff import Backoff
from formats import oci, presence
from formats.oci import BLOB_DIGEST, digest_of
from tests.filling import CONTENT, DIGEST, EXTENT, WAITING, Filling, flip

ALL = Check([], digests=False)
PATIENT = Policy("eio", 5.0)
PLACE = Place("registry.example", "app", plain_http=False)


class Bench:
    """A verified blob that nobody has open, and a way to check it."""

    def __init__(self, folder: Path) -> None:
        self.filling = Filling(folder)
        self.catalog = Catalog(folder / "catalog")
        self.catalog.note_place(PLACE, [DIGEST])
        self.fsck = Fsck(self.filling.blobs, self.filling.cache, self.catalog)
        entry = self.filling.open()
        entry.verify()
        entry.close()
        self.filling.source.reads.clear()
        self.path = entryfiles.path_of(self.filling.blobs, DIGEST)

    def check(self) -> tuple[Finding, ...]:
        return self.fsck.check(ALL, lambda done, total: None)[0].bad

    def repair(self, policy: Policy = PATIENT, caller: Caller = WAITING) -> list[Finding]:
        report, (blob,) = self.fsck.check(ALL, lambda done, total: None)
        refetch = Refetch(lambda place, blob, undo: self.filling.source, Backoff(), policy, caller)
        return self.fsck.repair(blob, report.bad, refetch)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.filling.close()


def test_a_repair_asks_for_what_is_bad_and_verifies(bench: Bench) -> None:
    for extent in (1, 2, 6):
        flip(bench.path, extent * EXTENT)
    assert [one.state for one in bench.repair()] == ["repaired"] * 2
    last = len(CONTENT) - 6 * EXTENT
    assert bench.filling.source.reads == [(EXTENT, 2 * EXTENT), (6 * EXTENT, last)]
    assert bench.check() == ()
    assert bench.filling.sealed()


@pytest.mark.parametrize("failure", [SourceError("reading a blob failed: x: no"), AccessDenied("reading: x: denied")])
def test_what_is_not_had_again_is_gone_and_said(bench: Bench, failure: BlockdevError) -> None:
    flip(bench.path, 0)
    flip(bench.path, 3 * EXTENT)
    bench.filling.source.failures.extend([failure] * 100)
    found = bench.repair(Policy("eio", 0.1))
    assert [(one.state, one.kind) for one in found] == [("dropped", type(failure).__name__)] * 2
    assert all(str(failure) in one.error or "left alone" in one.error for one in found)
    assert bench.check() == ()
    assert entryfiles.look(bench.filling.blobs, DIGEST).present == len(CONTENT) - 2 * EXTENT
    assert not bench.filling.sealed()


def test_a_repair_ends_with_its_caller(bench: Bench) -> None:
    flip(bench.path, 0)
    bench.filling.source.failures.extend([SourceError("reading a blob failed: x: no")] * 100)
    with pytest.raises(ConnectionError):
        bench.repair(Policy("hang"), Caller(print, lambda: len(bench.filling.source.failures) < 100))
    assert len(bench.filling.source.failures) == 99
    assert not bench.filling.cache.stat()[0].in_use


def test_wrong_bytes_from_the_registry_do_not_repair(bench: Bench) -> None:
    flip(bench.path, 0)
    bench.filling.source.content = bytes(EXTENT) + CONTENT[EXTENT:]
    (one,) = bench.repair()
    assert (one.state, one.kind) == ("dropped", "CorruptImage")
    assert entryfiles.look(bench.filling.blobs, DIGEST).present == 0


def test_a_later_versions_entry_is_named_and_left(bench: Bench) -> None:
    head = bytearray(bench.filling.map().read_bytes()[: presence.HEAD_SIZE])
    head[8] = presence.VERSION + 1
    head[504:508] = presence.standard(bytes(head[:504])).to_bytes(4, "little")
    with open(bench.filling.map(), "r+b") as file:
        file.write(head)
    (one,) = bench.check()
    assert "version" in one.why
    (one,) = bench.repair()
    assert (one.state, one.kind) == ("bad", "DeviceError")
    assert bench.path.read_bytes() == CONTENT


def test_only_what_is_an_image_can_be_checked_as_one(bench: Bench) -> None:
    config = b'{"architecture":"amd64"}'
    strange = {BLOB_DIGEST: "no digest"}
    layer = oci.Descriptor(oci.OCI_LAYER, DIGEST, len(CONTENT), annotations=strange)
    manifest = oci.Manifest(oci.Descriptor(oci.OCI_CONFIG, digest_of(config), len(config)), (layer,)).build()
    bench.catalog.keep({digest_of(document): document for document in (config, manifest)})
    for document in (config, manifest):
        with pytest.raises(NotFound, match="no such image"):
            bench.fsck.check(Check([f"host/app@{digest_of(document)}"], digests=False), lambda done, total: None)


def test_a_damaged_entry_that_is_in_use_is_left_to_its_user(bench: Bench) -> None:
    entry = bench.filling.open()
    flip(bench.filling.map(), 100)
    (one,) = bench.repair()
    assert (one.state, one.kind) == ("bad", "DeviceError")
    assert entry.blob.read_at(0, len(CONTENT)) == CONTENT
    entry.close()
    (one,) = bench.repair()
    assert one.state == "repaired"
    assert entryfiles.digests(bench.filling.blobs) == []
