# SPDX-License-Identifier: Apache-2.0
"""A local file becomes an entry at once and whole, its blocks shared or copied, or leaves nothing."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from blockdev import entryfiles
from blockdev.errors import CorruptImage
from blockdev.staging import Copy, copy_content, digest_of
from formats import presence

CONTENT = random.Random(5).randbytes(5_000_001)
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
EXTENT = presence.EXTENT_SIZE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def test_a_copy_put_in_place_is_a_sealed_entry(tmp_path: Path, source: Path) -> None:
    blobs = tmp_path / "blobs"
    with open(source, "rb") as file, Copy(blobs, file.fileno(), DIGEST) as copy:
        assert list((blobs / "sha256").iterdir()) == []
        copy.put()
    found = entryfiles.look(blobs, DIGEST)
    assert (found.size, found.present, found.verified, found.flaw) == (len(CONTENT), len(CONTENT), True, "")
    path = entryfiles.path_of(blobs, DIGEST)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o600
    table = entryfiles.map_of(path).read_bytes()[presence.TABLE_OFFSET :]
    last = len(CONTENT) // EXTENT
    for extent in (0, 1, last):  # the slow checksum
        entry = int.from_bytes(table[4 * extent : 4 * extent + 4], "little")
        assert entry == presence.extent_entry(CONTENT[extent * EXTENT :][:EXTENT])
    assert len(table) == 4 * (last + 1)


def test_a_copy_takes_the_place_of_what_was_there(tmp_path: Path, source: Path) -> None:
    path = entryfiles.path_of(tmp_path, DIGEST)
    path.parent.mkdir()
    path.write_bytes(b"older")
    entryfiles.map_of(path).write_bytes(b"older")
    with open(source, "rb") as file, Copy(tmp_path, file.fileno(), DIGEST) as copy:
        copy.put()
    assert path.read_bytes() == CONTENT
    assert entryfiles.look(tmp_path, DIGEST).verified


def test_another_file_leaves_nothing(tmp_path: Path, source: Path) -> None:
    other = f"sha256:{hashlib.sha256(b'other').hexdigest()}"
    with open(source, "rb") as file, pytest.raises(CorruptImage, match=DIGEST):
        Copy(tmp_path / "blobs", file.fileno(), other)
    assert list((tmp_path / "blobs" / "sha256").iterdir()) == []


def test_content_is_copied_from_another_file_system_too(tmp_path: Path) -> None:
    memory = os.memfd_create("source")
    os.write(memory, CONTENT)
    with open(tmp_path / "target", "w+b") as target:
        copy_content(memory, target.fileno(), len(CONTENT))
        assert digest_of(target.fileno(), "sha256") == DIGEST
    os.close(memory)
