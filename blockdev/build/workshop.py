# SPDX-License-Identifier: Apache-2.0
"""What a conversion has locally: scratch files, and the layers that earlier conversions have made.

A finished layer goes into the cache of the root, and a record of it into `converted/`: of
what it was made, and how. So a conversion that was interrupted goes on after its last
finished layer, and images with layers in common pay for them once. A record is believed only
as far as the cache has the layer with its digest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import BinaryIO

from blockdev import entryfiles
from blockdev.errors import from_os
from blockdev.ownfile import open_nameless
from blockdev.replacement import replacing
from blockdev.root import Root
from blockdev.staging import digest_of
from formats.oci import canonical

_RECORD_MAX = 64 << 10  # bytes; a record has a few hundred
_PLACES_MAX = 16  # remembered of a layer: each may be asked for it

Adopt = Callable[[int, str], None]  # a descriptor that reads the blob, and its digest


@dataclass(frozen=True)
class Written:
    """A layer file that is finished. start and end are blocks of the disk, its own; `state` is the disk's after it.

    annotations: for its descriptor, besides overlaybd's.
    """

    size: int
    start: int
    end: int
    state: str
    annotations: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A converted layer; places: names of depots that have it."""

    digest: str
    written: Written
    places: tuple[str, ...] = ()


class Workshop:
    """One conversion's; close() lets go of its files."""

    def __init__(self, root: Root, adopt: Adopt) -> None:
        self._root = root
        self._adopt = adopt
        self._open = ExitStack()

    def scratch(self) -> BinaryIO:
        """A file without a name for a layer in the making; it ends with the workshop, or when it is closed."""
        try:
            fd = open_nameless(self._root.path)
        except OSError as error:
            raise from_os("making a scratch file failed", error, str(self._root.path)) from None
        return self._open.enter_context(os.fdopen(fd, "r+b", buffering=0))

    def find(self, key: str) -> tuple[Made, BinaryIO] | None:
        """A layer that was made before, and a file that holds it."""
        try:
            made = _parse((self._root.converted / key).read_bytes()[:_RECORD_MAX])
            path = entryfiles.path_of(self._root.blobs, made.digest)
            file = self._open.enter_context(path.open("rb", buffering=0))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # then it is made again
        whole = (
            os.fstat(file.fileno()).st_size == made.written.size and digest_of(file.fileno(), "sha256") == made.digest
        )
        return (made, file) if whole else None

    def keep(self, key: str, made: Made, file: BinaryIO) -> None:
        """The layer into the cache, and the record."""
        self._adopt(file.fileno(), made.digest)
        self.note(key, made)

    def note(self, key: str, made: Made) -> None:
        """Write a record anew."""
        kept = replace(made, places=tuple(dict.fromkeys(made.places))[-_PLACES_MAX:])
        try:
            self._root.converted.mkdir(mode=0o700, exist_ok=True)
            with replacing(self._root.converted / key) as file:
                os.write(file, canonical(asdict(kept)))
        except OSError as error:
            raise from_os("keeping a record failed", error, str(self._root.converted)) from None

    def close(self) -> None:
        """Idempotent."""
        self._open.close()


def _parse(content: bytes) -> Made:
    fields = json.loads(content)
    written = Written(**fields["written"])
    numbers = (written.size, written.start, written.end)
    if not all(type(number) is int and number > 0 for number in numbers) or not isinstance(written.annotations, dict):
        raise ValueError("no record")
    return Made(fields["digest"], written, tuple(map(str, fields["places"])))
