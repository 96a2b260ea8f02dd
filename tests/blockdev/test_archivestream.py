# SPDX-License-Identifier: Apache-2.0
"""An archive is read to its blob's end, and no further once nobody wants it."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockdev.build.ahead import DEPTH
from blockdev.build.archivestream import ArchiveStream
from blockdev.build.depot import BlobFile, Read
from blockdev.build.layout import Layout
from blockdev.build.sourceimage import Archived
from formats import oci

ARCHIVE = b"x" * (4 * DEPTH)
DIGEST = oci.digest_of(ARCHIVE)
LAYER = Archived(oci.Descriptor(oci.OCI_LAYER, DIGEST, len(ARCHIVE)), DIGEST, DIGEST)


class Counter:
    """How much of the blob was read."""

    def __init__(self) -> None:
        self.bytes = 0

    def counting(self, read: Read) -> Read:
        def read_counted(length: int) -> bytes:
            piece = read(length)
            self.bytes += len(piece)
            return piece

        return read_counted


@pytest.fixture
def source(tmp_path: Path) -> Layout:
    depot = Layout(tmp_path / "source", "1")
    (tmp_path / "blob").write_bytes(ARCHIVE)
    with open(tmp_path / "blob", "rb") as file:
        depot.put_blob(BlobFile(DIGEST, len(ARCHIVE), file.fileno()), lambda arrived: None)
    return depot


def test_all_of_the_blob_is_read(source: Layout) -> None:
    counter = Counter()
    with ArchiveStream(source, LAYER, counter.counting) as archive:
        assert archive.read(1) == b"x"
        archive.finish()
    assert counter.bytes == len(ARCHIVE)


def test_nothing_is_read_of_a_blob_that_nobody_wants_any_more(source: Layout) -> None:
    counter = Counter()
    with ArchiveStream(source, LAYER, counter.counting) as archive:
        archive.read(1)
    assert counter.bytes < 2 * DEPTH
