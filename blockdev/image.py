# SPDX-License-Identifier: Apache-2.0
"""A stack of layers as one disk.

Promises: layers open in parallel, with what they need asked of their sources at once; an
image that cannot be opened leaves nothing open; a checksum failure names the layer it
is in; a layer lies on the parent that it names, or nothing is opened. Blobs stay their
opener's: close the image first, which flushes what was written to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from types import TracebackType
from typing import Self

from blockdev.engine import LAYERS_MAX, Engine, Image, LayerTable, Run, RunKind
from blockdev.errors import BlockdevError, CorruptImage, UsageError
from blockdev.layer import Layer, NamedBlob, ask_ahead, open_layer, open_pair
from formats.lsmt import NULL_UUID

_OPEN_THREADS = 8  # as many as fetches at a time; a layer's opening mostly waits for one
_SEARCH_PIECE = 1 << 20  # bytes read at a time when looking for the layer that failed


class OpenImage:
    """An opened image. `image` is what transports serve; `layers` describe it, bottom first."""

    def __init__(self, image: Image, layers: Sequence[Layer]) -> None:
        self.image = image
        self.layers = tuple(layers)
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.image.size

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer from offset. CorruptImage names the layer; SourceError, EngineStopped."""
        try:
            self.image.read_into(offset, buffer)
        except CorruptImage as error:
            raise self._named(error, offset, len(buffer)) from error

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly length bytes."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def runs(self, offset: int, length: int) -> list[Run]:
        """The map of the range from its start (engine.Image.runs)."""
        return self.image.runs(offset, length)

    def close(self) -> None:
        """Flush what was written, close image and layers. Idempotent. If the flush fails all is closed
        nevertheless, what was not flushed is lost, and that is the error."""
        writing, self._closed = self.image.writable and not self._closed, True
        try:
            if writing:
                self.flush()
        except BlockdevError as error:
            raise type(error)(f"{error}: what was not flushed is lost") from error
        finally:
            self.image.close()
            for layer in self.layers:
                layer.close()

    def flush(self) -> None:
        """What was written so far outlasts a power cut once this returns."""
        try:
            self.image.flush()
        except BlockdevError as error:
            raise type(error)(f"flushing failed: {self.layers[-1].name}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _named(self, error: CorruptImage, offset: int, length: int) -> CorruptImage:
        """Read the range again, run by run, to learn whose bytes are bad."""
        at, end = offset, offset + length
        while at < end:
            for run in self.runs(at, end - at):
                at = run.offset + run.length
                for start in range(run.offset, at, _SEARCH_PIECE):
                    found = self._failure(run, start)
                    if found:
                        return CorruptImage(f"read layer: {self.layers[run.layer].name}: {found}")
        return CorruptImage(f"read image: offset {offset}: {error}")

    def _failure(self, run: Run, start: int) -> CorruptImage | None:
        if run.kind is not RunKind.DATA:
            return None
        try:
            self.image.read_at(start, min(_SEARCH_PIECE, run.offset + run.length - start))
        except CorruptImage as error:
            return error
        return None


def open_image(
    engine: Engine,
    blobs: Sequence[NamedBlob],
    upper: tuple[NamedBlob, NamedBlob] | None = None,
    *,
    writable: tuple[int, int] | None = None,
) -> OpenImage:
    """Stack layers, bottom first, with a read-write pair (data, index) on top if there is one.

    writable: descriptors of that pair, locked by whoever opened them, to which writes shall go.
    """
    count = len(blobs) + (upper is not None)
    if not 0 < count <= LAYERS_MAX:
        raise UsageError(f"open image: {count} layers: 1 to {LAYERS_MAX} can be stacked")
    with ExitStack() as undo:
        layers = _open_layers(blobs, undo)
        if upper:
            layers.append(open_pair(*upper))
            undo.callback(layers[-1].close)
        flat = next((layer for layer in layers if layer.flat), None)
        if flat and len(layers) > 1:
            raise CorruptImage(f"open image: {flat.name}: offset 0 of the decoded content: no LSMT magic in a stack")
        _check_parents(layers)
        image = _stack_writable(engine, layers, writable) if writable else _stack(engine, layers)
        undo.pop_all()
    return OpenImage(image, layers)


def _check_parents(layers: Sequence[Layer]) -> None:
    """Each layer's parent is the one below it. What has no UUID, or names no parent, is not asked."""
    for below, above in pairwise(layers):
        parent = above.lsmt.parent_uuid.upper() if above.lsmt else ""
        uuid = below.lsmt.uuid.upper() if below.lsmt else ""
        if parent != uuid and not {parent, uuid} & {"", NULL_UUID}:
            raise CorruptImage(
                f"open layer: {above.name}: offset 93: its parent is {parent}, and below it is {uuid} ({below.name})"
            )


def _open_layers(blobs: Sequence[NamedBlob], undo: ExitStack) -> list[Layer]:
    """All of them, whose closing is left to `undo`, or the first error in order of the stack."""
    for source in blobs:
        ask_ahead(source.blob)
    if len(blobs) == 1:
        layers = [open_layer(blobs[0])]
        undo.callback(layers[0].close)
        return layers

    def open_one(source: NamedBlob) -> Layer:
        layer = open_layer(source)
        undo.callback(layer.close)  # by whoever opens it: asking for one may fail, and it be opened all the same
        return layer

    with ThreadPoolExecutor(min(_OPEN_THREADS, len(blobs) or 1), "open") as pool:
        return list(pool.map(open_one, blobs))


def _size_of(layers: Sequence[Layer]) -> int:
    # The topmost layer that has a size says it: converters give one to the bottom layer only.
    return next((layer.virtual_size for layer in reversed(layers) if layer.virtual_size), 0)


def _stack_writable(engine: Engine, layers: Sequence[Layer], descriptors: tuple[int, int]) -> Image:
    *lowers, upper = layers
    image = _stack(engine, lowers, _size_of(layers))
    try:
        image.open_upper(*descriptors)
    except BlockdevError as error:
        image.close()
        raise type(error)(f"open layer: {upper.name}: offset {upper.table.index_offset}: {error}") from error
    return image


def _stack(engine: Engine, layers: Sequence[Layer], size: int = -1) -> Image:
    """size: -1 = what the layers say."""
    size = _size_of(layers) if size < 0 else size
    try:
        return engine.open_image([layer.table for layer in layers], size)
    except CorruptImage as error:
        bad = next((layer for layer in layers if _refused(engine, layer.table)), None)
        if bad is None:
            raise CorruptImage(f"open image: {layers[-1].name} and what is below: offset 0: {error}") from error
        raise CorruptImage(f"open layer: {bad.name}: {bad.place(bad.table.index_offset)}: {error}") from error


def _refused(engine: Engine, table: LayerTable) -> bool:
    try:
        engine.open_image([table], 0).close()
    except CorruptImage:
        return True
    return False
