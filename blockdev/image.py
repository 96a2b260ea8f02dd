# SPDX-License-Identifier: Apache-2.0
"""A stack of layers as one disk.

Promises: layers open in parallel, with what they need asked of their sources at once; an
image that cannot be opened leaves nothing open; a checksum failure names the layer it
is in. Blobs stay their opener's: close the image first.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from blockdev.engine import LAYERS_MAX, Engine, Image, LayerTable, Run, RunKind
from blockdev.errors import CorruptImage, UsageError
from blockdev.layer import Layer, NamedBlob, ask_ahead, open_layer, open_pair

_OPEN_THREADS = 8  # as many as fetches at a time; a layer's opening mostly waits for one
_SEARCH_PIECE = 1 << 20  # bytes read at a time when looking for the layer that failed


class OpenImage:
    """An opened image. `image` is what transports serve; `layers` describe it, bottom first."""

    def __init__(self, image: Image, layers: Sequence[Layer]) -> None:
        self.image = image
        self.layers = tuple(layers)

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
        """Close image and layers. Idempotent."""
        self.image.close()
        for layer in self.layers:
            layer.close()

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
    engine: Engine, blobs: Sequence[NamedBlob], upper: tuple[NamedBlob, NamedBlob] | None = None
) -> OpenImage:
    """Stack layers, bottom first, with a read-write pair (data, index) on top if there is one."""
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
        image = _stack(engine, layers)
        undo.pop_all()
    return OpenImage(image, layers)


def _open_layers(blobs: Sequence[NamedBlob], undo: ExitStack) -> list[Layer]:
    """All of them, whose closing is left to `undo`, or the first error in order of the stack."""
    for source in blobs:
        ask_ahead(source.blob)
    if len(blobs) == 1:
        layers = [open_layer(blobs[0])]
        undo.callback(layers[0].close)
        return layers
    with ThreadPoolExecutor(min(_OPEN_THREADS, len(blobs) or 1), "open") as pool:
        opening = [pool.submit(open_layer, source) for source in blobs]
    for future in opening:
        if future.exception() is None:
            undo.callback(future.result().close)
    return [future.result() for future in opening]


def _stack(engine: Engine, layers: Sequence[Layer]) -> Image:
    # The topmost layer that has a size says it: converters give one to the bottom layer only.
    size = next((layer.virtual_size for layer in reversed(layers) if layer.virtual_size), 0)
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
