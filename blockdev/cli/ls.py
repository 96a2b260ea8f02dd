# SPDX-License-Identifier: Apache-2.0
"""ociblk ls: what is in an image, without a mount.

Lines are those of `ls -l` with numbers for owners and times in UTC. A name never breaks
its line, and cannot speak to a terminal: what does not print is escaped as in C.
"""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from blockdev.cli import add_image_options, stdio, text
from blockdev.cli.disk import opened_disk
from blockdev.files import File, Files
from blockdev.origin import locate

_SECOND = 1_000_000_000  # nanoseconds
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("path", metavar="PATH", nargs="?", default="/", help="in the image (default: its root)")
    parser.add_argument("-R", "--recursive", action="store_true", help="what is below too")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print a directory's entries, or the one file that the path leads to."""
    with locate(args.image) as origin, opened_disk(args, origin) as disk:
        files = Files(disk, args.image)
        top = files.find(os.fsencode(args.path))
        if not stat.S_ISDIR(top.inode.mode):
            found: Iterator[tuple[str, Iterable[File]]] = iter([("", [top])])
        elif args.recursive:
            found = ((_printable(b"/" + directory.path), entries) for directory, entries in files.walk(top))
        else:
            found = iter([("", files.below(top))])
        if args.json:
            entries = [_json(file) for _, below in found for file in below]
            text.print_json({"image": args.image, "path": args.path, "entries": entries})
        else:
            _print(found)


def _print(found: Iterator[tuple[str, Iterable[File]]]) -> None:
    for place, (heading, entries) in enumerate(found):
        if heading:
            print(("\n" if place else "") + f"{heading}:")
        for file in entries:
            print(_line(file))


def _line(file: File) -> str:
    inode = file.inode
    device = inode.kind in (stat.S_IFCHR, stat.S_IFBLK)
    size = "{}, {}".format(*inode.device) if device else str(inode.size)
    arrow = f" -> {_printable(file.target)}" if file.target else ""
    owners = f"{inode.links:>3} {inode.uid:>5} {inode.gid:>5}"
    return f"{stat.filemode(inode.mode)} {owners} {size:>10} {_time(inode.mtime_ns)} {_printable(file.name)}{arrow}"


def _time(mtime_ns: int) -> str:
    """To the second; as seconds since 1970 if no calendar has it."""
    seconds = mtime_ns // _SECOND
    try:
        return f"{_EPOCH + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S}"
    except OverflowError:
        return f"{f'@{seconds}':>19}"


def _printable(raw: bytes) -> str:
    """A name on one line, so that no two look the same."""
    return stdio.printable(os.fsdecode(raw).replace("\\", "\\\\"))


def _json(file: File) -> dict[str, Any]:
    """Bytes that are no UTF-8 are as Python's surrogateescape has them; values of attributes are in hexadecimal."""
    inode = file.inode
    out: dict[str, Any] = {
        "path": "/" + os.fsdecode(file.path),
        "type": _TYPES[inode.kind],
        "mode": f"{stat.S_IMODE(inode.mode):04o}",
        "links": inode.links,
        "uid": inode.uid,
        "gid": inode.gid,
        "size": inode.size,
        "mtime_ns": inode.mtime_ns,
        "inode": inode.nid,
    }
    if file.target:
        out["target"] = os.fsdecode(file.target)
    if inode.kind in (stat.S_IFCHR, stat.S_IFBLK):
        out["device"] = list(inode.device)
    if file.xattrs:
        out["xattrs"] = {os.fsdecode(name): value.hex() for name, value in file.xattrs}
    return out
