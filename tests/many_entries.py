# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.many_entries COUNT`: what a tree of so many entries takes, in a process of its own.

Two layers of the same names, the second over the first, in bytes made as they are read: long names in
directories of a few and of very many, no two times equal, hard links, an xattr of its own for every
tenth file. Prints {"entries", "peak_rss", "cpu_seconds", "estimate"}; bytes and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blockdev.build.tree import Tree
from formats.archive import Archive
from tests.tars import END, file, folder, hardlink, pax

PER_DIRECTORY = 20
LINKS = 50  # every so many files, one is a link to the one before
XATTRS = 10


def layer(count: int) -> Iterator[bytes]:
    """`count` entries, half of them in one directory."""
    for i in range(0, count, 2):
        place = b"usr/lib/node_modules/package-%06d/dist" % (i // PER_DIRECTORY)
        if i % PER_DIRECTORY == 0:
            yield folder(place, mtime=i)
        else:
            yield pax(_records(i)) + file(place + b"/a-module-with-a-name-%07d.js" % i, b"x", uid=i % 70_000)
        name = b"var/cache/%039d-%d"
        if i and i % LINKS == 0:
            yield hardlink(name % (i, i), name % (i - 2, i - 2))
        else:
            yield pax(_records(i + 1)) + file(name % (i, i), b"x")
    yield END


def _records(i: int) -> dict[bytes, bytes]:
    records = {b"mtime": b"%d.%09d" % (1_700_000_000 + i, i)}
    return records | ({b"SCHILY.xattr.user.own": b"%032d" % i} if i % XATTRS == 1 else {})


def streamed(pieces: Iterator[bytes]) -> Callable[[int], bytes]:
    """A reader of bytes that are made as it goes."""

    def read(wanted: int) -> bytes:
        found, have = [], 0
        while have < wanted and (piece := next(pieces, b"")):
            found.append(piece)
            have += len(piece)
        return b"".join(found)

    return read


def _peak() -> int:
    """The most that was resident; rusage would count what the process was before exec, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def main(count: int) -> None:
    tree = Tree()
    for _ in range(2):
        tree.apply(Archive(streamed(layer(count))), lambda _, content: sum(len(piece) for _, piece in content))
    found = {"peak_rss": _peak(), "cpu_seconds": round(time.process_time(), 1), "estimate": tree.memory}
    print(json.dumps({"entries": count, **found}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
