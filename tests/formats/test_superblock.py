# SPDX-License-Identifier: Apache-2.0
"""File systems are told apart by what mkfs writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from formats.superblock import HEAD_SIZE, file_system
from tests.requires import requires_command


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("ext4", ["mke2fs", "-q", "-t", "ext4", "DISK", "1M"]),
        ("ext4", ["mke2fs", "-q", "-t", "ext2", "DISK", "1M"]),
        ("erofs", ["mkfs.erofs", "--quiet", "DISK", "TREE"]),
    ],
    ids=["ext4", "ext2", "erofs"],
)
def test_a_fresh_file_system_is_recognised(tmp_path: Path, kind: str, command: list[str]) -> None:
    requires_command(command[0])
    (tmp_path / "TREE").mkdir()
    (tmp_path / "TREE/file").write_text("x")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with open(tmp_path / "DISK", "rb") as disk:
        assert file_system(disk.read(HEAD_SIZE)) == kind


def test_anything_else_is_none() -> None:
    assert file_system(bytes(HEAD_SIZE)) is None
    assert file_system(b"") is None
    assert file_system(b"XFS") is None
    assert file_system(b"XFSB") == "xfs"
