# SPDX-License-Identifier: Apache-2.0
"""What a path finally lies on: its file system, that one's loop device, the file behind that, and so on.

Told from the mount table and sysfs alone: no call waits for whoever serves a file system. Device
mappers and partitions are followed; what is behind an NBD device or in another machine is not seen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from blockdev import syscalls
from blockdev.syscalls import MountEntry

_SWAPS = Path("/proc/swaps")
_SWAP = re.compile(r"^([^ \t\n]+)[ \t]+(partition|file)[ \t]", re.MULTILINE)  # a line of it; containers may see others


def mounts_beneath(path: Path) -> list[MountEntry]:
    """Every mount that reading `path` may need, its own first. The path must be absolute and resolved."""
    table = syscalls.mounts()
    found: list[MountEntry] = []
    wanted = [str(path)]
    while wanted:
        entry = _covering(table, wanted.pop())
        if entry and entry not in found:
            found.append(entry)
            wanted += _files_of(_device_of(entry))
    return found


def swap_beneath() -> list[list[MountEntry]]:
    """The same for each file that this machine swaps to, through whatever device."""
    found: list[list[MountEntry]] = []
    try:
        table = syscalls.kernel_text(_SWAPS)
    except FileNotFoundError:  # a kernel that swaps to nothing
        return []
    for name, kind in _SWAP.findall(table):
        path = syscalls.unescape(name)
        files = [path] if kind == "file" else _files_of(_number_of(path))
        found += [mounts_beneath(Path(file)) for file in files]
    return found


def _covering(table: list[MountEntry], path: str) -> MountEntry | None:
    """The mount that a path is on: the longest mount point, and of mounts on one point the last."""
    over = [entry for entry in table if path == entry.point or path.startswith(entry.point.rstrip("/") + "/")]
    return max(enumerate(over), key=lambda place: (len(place[1].point), place[0]))[1] if over else None


def _device_of(entry: MountEntry) -> int:
    """The block device a file system is on; 0 if it is on none, or none that can be told."""
    if entry.major:
        return os.makedev(entry.major, entry.minor)
    return _number_of(entry.source) if entry.source.startswith("/dev/") else 0  # btrfs: its own is no device's


def _number_of(path: str) -> int:
    try:
        return Path(path).stat().st_rdev
    except OSError:  # a container sees names that only its host has
        return 0


def _files_of(device: int) -> Iterator[str]:
    """The files that loop devices below a block device are attached to."""
    if device:
        with syscalls.sysfs() as tree:
            yield from _files_behind(tree / f"dev/block/{os.major(device)}:{os.minor(device)}")


def _files_behind(device: Path) -> Iterator[str]:
    if (device / "partition").exists():
        device = device / ".."
    for slave in device.glob("slaves/*"):
        yield from _files_behind(slave)
    file = syscalls.file_behind(device)
    if file not in (None, syscalls.NOWHERE):
        yield file
