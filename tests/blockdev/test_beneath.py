# SPDX-License-Identifier: Apache-2.0
"""What a path lies on is told through loop devices, without asking whoever serves a file."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import beneath, syscalls
from tests.requires import requires_command, requires_mount

requires_command("mkfs.ext4")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system in a file of tmp_path, through a loop device."""
    requires_mount()
    file, folder = tmp_path / "disk", tmp_path / "folder"
    with file.open("wb") as disk:
        disk.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", file], check=True)
    folder.mkdir()
    with syscalls.attach_loop(file, writable=True) as loop:
        syscalls.mount(loop.path, folder, "ext4", flags=0, options="")
    yield folder
    syscalls.umount(folder, 0)


def test_a_loop_mount_lies_on_its_files_file_system(mounted: Path) -> None:
    first, *rest = beneath.mounts_beneath(mounted / "lost+found")
    assert (first.point, first.kind) == (str(mounted), "ext4")
    assert rest == beneath.mounts_beneath(mounted.parent / "disk")
    assert rest


def test_a_name_that_only_begins_alike_is_not_on_the_mount(mounted: Path) -> None:
    assert all(entry.point != str(mounted) for entry in beneath.mounts_beneath(Path(f"{mounted}-other")))


def test_every_swap_file_is_followed(mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "swaps"
    table.write_text(f"Filename Type Size Used Priority\n{mounted}/lost+found file 1 0 -2\n")
    monkeypatch.setattr(beneath, "_SWAPS", table)
    [found] = beneath.swap_beneath()
    assert found == beneath.mounts_beneath(mounted)
