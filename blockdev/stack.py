# SPDX-License-Identifier: Apache-2.0
"""An image together with the blobs it is made of: what a device serves and closes.

open_local() is for images whose every byte is in open files: no owner, no cache, no network.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

from blockdev.build.verify import Progress, Verified, verify_layer
from blockdev.engine import BlobStat, Engine
from blockdev.image import OpenImage, open_image
from blockdev.layer import CRC_ONLY, SHA256, NamedBlob
from blockdev.origin import Origin, Part


class Stack:
    """An opened image and its blobs, bottom first. Owns both."""

    def __init__(
        self, origin: Origin, image: OpenImage, blobs: Sequence[NamedBlob], undo: ExitStack, *, remark: str = ""
    ) -> None:
        """blobs: of origin's layers, then of its upper. undo closes them; the image is closed before.
        remark: what its user should know of how it was found."""
        self.name = origin.name
        self.writable = origin.write
        self.remark = remark
        self.image = image
        self.blobs = tuple(blobs)
        self._lowers = self.blobs[: len(self.blobs) - len(origin.upper)]
        # A registry's blobs are named by their digests.
        self._digests = [part.digest for part in origin.layers] or [named.name for named in self._lowers]
        self._undo = undo
        self._lock = threading.Lock()
        self._closed = False

    def describe(self) -> dict[str, Any]:
        """The image and its layers as JSON values; sizes in bytes."""
        checked = [named.checked for named in self._lowers]
        layers = [layer.describe() for layer in self.image.layers]
        for layer, how in zip(layers, checked, strict=False):  # one more is of the upper
            layer["checked"] = how
        return {"image": self.name, "size": self.image.size, "layers": layers}

    def verify(self, engine: Engine, progress: Progress) -> list[Verified]:
        """Read every byte of the lower layers and check every checksum there is. CorruptImage, SourceError."""
        verified: list[Verified] = []
        for named, digest in zip(self._lowers, self._digests, strict=True):
            verified.append(verify_layer(engine, named, digest or None, progress))
        return verified

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def checked(self) -> str:
        """By what the parts of its lower layers are checked, all of them."""
        return SHA256 if all(named.checked == SHA256 for named in self._lowers) else CRC_ONLY

    def stats(self) -> list[BlobStat]:
        """The numbers of each blob, in the order of blobs; none once it is closed."""
        with self._lock:
            return [] if self._closed else [named.blob.stat() for named in self.blobs]

    def damage(self) -> list[tuple[str, int]]:
        """The blobs that have a block which is wrong for good, and the offset of the last one found."""
        stats = zip(self.blobs, self.stats(), strict=False)  # none of a closed one
        return [(named.name, stat.damaged_offset) for named, stat in stats if stat.damaged]

    def close(self) -> None:
        """Idempotent. All is closed even if what was written cannot be flushed, which is the error then."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            with self._undo:
                self.image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_local(engine: Engine, origin: Origin) -> Stack:
    """Open an image that is all in local files. CorruptImage, UsageError."""
    with ExitStack() as undo:
        blobs = [open_part(engine, part, undo) for part in origin.layers]
        upper = [open_part(engine, part, undo) for part in origin.upper]
        image = open_image(engine, blobs, (upper[0], upper[1]) if upper else None, writable=origin.writable)
        return Stack(origin, image, [*blobs, *upper], undo.pop_all())


def open_part(engine: Engine, part: Part, undo: ExitStack) -> NamedBlob:
    """The blob of a part that is an open file."""
    blob = engine.open_local(part.fd, part.size)
    undo.callback(blob.close)
    return NamedBlob(part.name, blob)
