# SPDX-License-Identifier: Apache-2.0
"""Reading an image's disk by offset, for commands that look into its file system without a mount.

A local image is opened here. Of any other the owner reads, which has its blobs: it puts each
range into a memory file that we share with it, and its errors are ours.
"""

from __future__ import annotations

import argparse
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from blockdev import client
from blockdev.cli import text
from blockdev.cli.ask import image_request
from blockdev.client import Connection
from blockdev.control import Body
from blockdev.origin import Origin
from blockdev.root import Root
from formats.readat import ReadAt, Window, check_range

_PIECE = 1 << 20  # bytes asked of the owner at a time: an answer takes far longer than the asking
_KEPT = 16  # pieces: metadata is read in small ranges that lie close to each other


@contextmanager
def opened_disk(args: argparse.Namespace, origin: Origin) -> Iterator[ReadAt]:
    """The disk, until the block ends. Errors of reading are BlockdevErrors. Not for several threads at a time."""
    with ExitStack() as undo:
        if origin.local:
            from blockdev.engine import Engine
            from blockdev.stack import open_local

            engine = undo.enter_context(Engine())
            image = undo.enter_context(open_local(engine, origin)).image
            yield Window(image, 0, image.size)
        else:
            owner = undo.enter_context(client.connect(Root(args.root), text.print_notice))
            body, descriptors = image_request(args, origin)
            disk = _OwnersDisk(owner, undo)
            disk.open(body, descriptors)
            yield disk
            owner.call("end")


class _OwnersDisk:
    """ReadAt through the owner."""

    def __init__(self, owner: Connection, undo: ExitStack) -> None:
        self._owner = owner
        self._fd = os.memfd_create("ociblk-disk", os.MFD_CLOEXEC)
        undo.callback(os.close, self._fd)
        os.ftruncate(self._fd, _PIECE)
        self._window = undo.enter_context(mmap.mmap(self._fd, _PIECE, access=mmap.ACCESS_READ))
        self._pieces: OrderedDict[int, bytes] = OrderedDict()
        self.size = 0

    def open(self, body: Body, descriptors: list[int]) -> None:
        self.size = self._owner.call("disk", body, [*descriptors, self._fd])["size"]

    def read_at(self, offset: int, length: int) -> bytes:
        """As ReadAt."""
        check_range(offset, length, self.size)
        found = bytearray()
        while len(found) < length:
            at = offset + len(found)
            start = at // _PIECE * _PIECE
            piece = self._piece(start)
            found += piece[at - start : at - start + length - len(found)]
        return bytes(found)

    def _piece(self, start: int) -> bytes:
        if start in self._pieces:
            self._pieces.move_to_end(start)
            return self._pieces[start]
        length = min(_PIECE, self.size - start)
        self._owner.call("read", {"offset": start, "length": length})
        if len(self._pieces) == _KEPT:
            self._pieces.popitem(last=False)
        self._pieces[start] = self._window[:length]
        return self._pieces[start]
