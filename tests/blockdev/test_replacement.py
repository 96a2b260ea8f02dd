# SPDX-License-Identifier: Apache-2.0
"""A file that takes another's place has its owner and mode, or nothing changes."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from blockdev.errors import AccessDenied
from blockdev.replacement import replacing
from blockdev.upper import compact_pair, create_pair, resize_pair
from tests.requires import requires_root

OTHER = 65534


def _owned(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, found.st_mode & 0o777


def test_a_file_keeps_its_owner_and_mode_from_the_first_byte_on(tmp_path: Path) -> None:
    requires_root()
    path = tmp_path / "file"
    path.write_bytes(b"before")
    path.chmod(0o600)
    os.chown(path, OTHER, OTHER)
    with replacing(path) as fd:
        assert [_owned(part) for part in tmp_path.iterdir()] == [(OTHER, OTHER, 0o600)] * 2
        os.write(fd, b"after")
    assert (_owned(path), path.read_bytes()) == ((OTHER, OTHER, 0o600), b"after")


@pytest.mark.parametrize("mode", [0o777, 0o700])
def test_somebody_elses_file_stays_if_its_owner_cannot_be_kept(mode: int) -> None:
    requires_root()
    with TemporaryDirectory(prefix="ociblk-test-") as folder:  # where others can come
        path = Path(folder, "file")
        path.write_bytes(b"before")
        os.chown(path, 1, 1)
        Path(folder).chmod(mode)
        os.seteuid(OTHER)
        try:
            with pytest.raises(AccessDenied), replacing(path):
                pytest.fail("it can be written to")
        finally:
            os.seteuid(0)
        assert [(left.read_bytes(), _owned(left)[0]) for left in Path(folder).iterdir()] == [(b"before", 1)]


def test_a_pair_stays_its_owners_through_resize_and_compact(tmp_path: Path) -> None:
    requires_root()
    pair = tmp_path / "data", tmp_path / "index"
    create_pair(*pair, 1 << 20)
    for path in pair:
        os.chown(path, OTHER, OTHER)
    resize_pair(*pair, 2 << 20)
    compact_pair(*pair)
    assert [_owned(path)[:2] for path in pair] == [(OTHER, OTHER)] * 2
