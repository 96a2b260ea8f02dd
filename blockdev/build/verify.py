# SPDX-License-Identifier: Apache-2.0
"""Reading all of a layer, to know that all of it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockdev.engine import Blob, Engine, File
from blockdev.errors import CorruptImage
from blockdev.image import open_image
from blockdev.layer import NamedBlob

_PIECE = 4 << 20  # bytes read at a time

Progress = Callable[[int, int], None]  # bytes checked, and to be checked in all


@dataclass(frozen=True)
class Verified:
    """A layer whose every byte was read. `checksums`: its blocks carry CRCs, so more than its structure was checked."""

    name: str
    digest: str
    size: int
    plain_size: int
    checksums: bool


def verify_layer(
    engine: Engine, layer: NamedBlob, digest: str | None = None, progress: Progress | None = None
) -> Verified:
    """Check heads, tables and every block of a layer, then the blob's digest against `digest` if one is given.

    CorruptImage names the first thing that is wrong. What is not in the cache is fetched.
    """
    name, blob = layer.name, layer.blob
    algorithm, _, _ = (digest or "sha256:").partition(":")
    hashed = hashlib.new(algorithm)
    with open_image(engine, [layer]) as image:
        opened = image.layers[0]
        plain = opened.table.file
        total = plain.size + blob.size
        try:
            for done, _ in _pieces(plain):
                (progress or _silent)(done, total)
            for done, piece in _pieces(blob):
                hashed.update(piece)
                (progress or _silent)(plain.size + done, total)
        except CorruptImage as error:
            raise CorruptImage(f"verify layer: {name}: {error}") from error
        found = f"{algorithm}:{hashed.hexdigest()}"
        if digest and found != digest:
            raise CorruptImage(f"verify layer: {name}: offset 0: the content's digest is {found}, not {digest}")
        return Verified(name, found, blob.size, plain.size, bool(opened.zfile and opened.zfile.verify))


def _pieces(source: Blob | File) -> Iterator[tuple[int, memoryview]]:
    """All of it in order, with where each piece ends. A piece is valid until the next one."""
    buffer = memoryview(bytearray(min(_PIECE, source.size)))
    for start in range(0, source.size, _PIECE):
        piece = buffer[: min(_PIECE, source.size - start)]
        source.read_into(start, piece)
        yield start + len(piece), piece


def _silent(done: int, total: int) -> None:
    pass
