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


DISK = "a disk\r\v\n"  # the kernel says it as it is


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system in a file of tmp_path, through a loop device."""
    requires_mount()
    file, folder = tmp_path / DISK, tmp_path / "folder"
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
    assert rest == beneath.mounts_beneath(mounted.parent / DISK)
    assert rest


def test_a_name_that_only_begins_alike_is_not_on_the_mount(mounted: Path) -> None:
    assert all(entry.point != str(mounted) for entry in beneath.mounts_beneath(Path(f"{mounted}-other")))


def test_every_swap_file_is_followed(mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [entry] = [entry for entry in syscalls.mounts() if entry.point == str(mounted)]
    write_swaps(tmp_path, monkeypatch, f"{mounted}/lost+found file 1 0 -2\n{entry.source} partition 1 0 -2\n")
    on_it, below_it = beneath.swap_beneath()
    assert on_it == beneath.mounts_beneath(mounted)
    assert below_it == on_it[1:]


def write_swaps(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    (folder / "swaps").write_text("Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n" + lines)
    monkeypatch.setattr(beneath, "_SWAPS", folder / "swaps")


def test_swap_of_the_host_is_not_looked_for_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "/no/swap.img file 4 0 -2\n/dev/of-the-host partition 4 0 -3\nnone  virtual\t\t8\t0\t0\n"
    write_swaps(tmp_path, monkeypatch, lines)
    assert beneath.swap_beneath() == [beneath.mounts_beneath(Path("/no"))]
    (tmp_path / "swaps").unlink()  # a kernel without swap
    assert beneath.swap_beneath() == []
