# SPDX-License-Identifier: Apache-2.0
"""What is mounted, and through which loop device, whatever names there are and whatever is mounted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockdev import syscalls
from tests.requires import requires_mount


def test_no_name_of_a_mount_point_disturbs_the_table(tmp_path: Path) -> None:
    """Any user can have such mounts (fusermount3)."""
    requires_mount()
    for name in ("a\rb", "a\r\nb", "a\v\f\x1c\x1d\x1e\x85\u2028b", "a\udcffb", "a b\\040#"):
        (tmp_path / name).mkdir()
    code = (
        "import sys; from pathlib import Path; from blockdev import mountpoint, syscalls\n"
        "syscalls.keep_mounts_private()\n"
        "for point in Path(sys.argv[1]).iterdir():\n"
        "    syscalls.mount('a\\rb', point, 'tmpfs', flags=0, options='')\n"
        "    assert syscalls.mounted_at(point).source == 'a\\rb'\n"
        "mountpoint.ours()\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_a_loop_device_is_found_by_its_minor_number(tmp_path: Path) -> None:
    requires_mount()
    (tmp_path / "disk").write_bytes(bytes(4096))
    with syscalls.attach_loop(tmp_path / "disk") as loop:
        assert loop.direct == syscalls.loop_status(loop.number).direct
        assert syscalls.loop_number(os.minor(Path(loop.path).stat().st_rdev)) == loop.number
        assert syscalls.loop_file(loop.number) == str(tmp_path / "disk")


def test_a_minor_number_need_not_be_that_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with loop.max_part=15, which is set when the kernel starts."""
    (tmp_path / "dev/block").mkdir(parents=True)
    for minor, name in ((16, "loop1"), (17, "loop1/loop1p1"), (32, "loop2")):
        (tmp_path / f"dev/block/7:{minor}").symlink_to(f"../../devices/virtual/block/{name}")
    monkeypatch.setattr(syscalls, "_SYS", tmp_path)
    assert [syscalls.loop_number(minor) for minor in (0, 1, 16, 17, 32)] == [None, None, 1, None, 2]
