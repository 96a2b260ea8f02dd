# SPDX-License-Identifier: Apache-2.0
"""The judge: a slow, obvious reader of layer stacks over formats/.

flatten() answers what a stack of blobs reads as, byte for byte; the engine must agree.
Nothing here is shared with the engine, and nothing is clever: a stack is one long log
of entries, bottom layer first, replayed into a live map.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from formats import lsmt, tar, zfile
from formats.errors import FormatError
from formats.imagespec import ImageConfig
from formats.lsmt import SECTOR, Segment
from formats.pair import replay
from formats.readat import BytesAt, ReadAt, Window, check_range

LAYERS_MAX = 255
HOLE, ZERO, DATA = 0, 1, 2  # the engine's OB_RUN_*
NO_LAYER = -1
_PIECE = 1 << 20


class Run(NamedTuple):
    """A piece of the disk in bytes. `layer`: place in the stack, 0 = bottom; NO_LAYER for holes."""

    offset: int
    length: int
    kind: int
    layer: int


@dataclass(frozen=True)
class Layer:
    """An opened layer. `size`: its virtual size in bytes; 0 = takes the size of what is below."""

    size: int
    segments: list[Segment]
    file: ReadAt


class Disk:
    """A flattened stack; a ReadAt. `live` is its map in sectors, each entry's tag the layer it comes from."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        if len(layers) > LAYERS_MAX:
            raise FormatError(f"{len(layers)} layers, at most {LAYERS_MAX}")
        self._layers = layers
        self._size = next((layer.size for layer in reversed(layers) if layer.size), 0)
        self.live = replay(
            segment._replace(tag=place) for place, layer in enumerate(layers) for segment in layer.segments
        )
        self._starts = [segment.offset for segment in self.live]

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(offset, length, self.size)
        return b"".join(self._content(run, segment) for run, segment in self._pieces(offset, length))

    def runs(self, offset: int = 0, length: int | None = None) -> list[Run]:
        """The range as runs without gaps, neighbours of one kind and layer joined."""
        length = self.size - offset if length is None else length
        check_range(offset, length, self.size)
        joined: list[Run] = []
        for run, _ in self._pieces(offset, length):
            if joined and joined[-1][2:] == run[2:]:
                joined[-1] = joined[-1]._replace(length=joined[-1].length + run.length)
            else:
                joined.append(run)
        return joined

    def chunks(self) -> Iterator[bytes]:
        """The whole disk in order, at most 1 MiB at a time."""
        zeros = bytes(_PIECE)
        for run in self.runs():
            for start in range(0, run.length, _PIECE):
                part = min(_PIECE, run.length - start)
                yield self.read_at(run.offset + start, part) if run.kind == DATA else zeros[:part]

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[Run, Segment | None]]:
        """The range cut at every border of the live map."""
        end = offset + length
        first = max(bisect_right(self._starts, offset // SECTOR) - 1, 0)
        for place in range(first, len(self.live)):
            segment = self.live[place]
            start, stop = segment.offset * SECTOR, segment.end * SECTOR
            if start >= end or offset >= end:
                break
            if stop <= offset:
                continue
            if start > offset:
                yield Run(offset, start - offset, HOLE, NO_LAYER), None
                offset = start
            part = min(stop, end) - offset
            yield Run(offset, part, ZERO if segment.zeroed else DATA, segment.tag), segment
            offset += part
        if offset < end:
            yield Run(offset, end - offset, HOLE, NO_LAYER), None

    def _content(self, run: Run, segment: Segment | None) -> bytes:
        if segment is None or segment.zeroed:
            return bytes(run.length)
        place = segment.moffset * SECTOR + run.offset - segment.offset * SECTOR
        return self._layers[segment.tag].file.read_at(place, run.length)


class _Padded:
    """A file that goes on with zeros to the end of its last sector."""

    def __init__(self, file: ReadAt) -> None:
        self._file = file

    @property
    def size(self) -> int:
        return -(-self._file.size // SECTOR) * SECTOR

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(offset, length, self.size)
        there = max(0, min(length, self._file.size - offset))
        return (self._file.read_at(offset, there) if there else b"").ljust(length, b"\0")


def plain(blob: ReadAt) -> tuple[ReadAt, bool]:
    """A blob's content out of tar and ZFile, and whether there was a ZFile."""
    payload = tar.find_payload(blob)
    if payload:
        blob = Window(blob, payload.base, payload.length)
    head = zfile.open_zfile(blob)
    return (zfile.Decoder(blob, head), True) if head else (blob, False)


def open_layer(blob: ReadAt) -> Layer:
    """A layer by its content: LSMT in any wrapping, or a ZFile whose content is the disk itself."""
    file, compressed = plain(blob)
    head = min(file.size, lsmt.HEAD_SIZE)
    if compressed and not lsmt.is_lsmt(file.read_at(0, head)):
        if lsmt.is_lsmt(file.read_at(file.size - head, head)):
            raise FormatError("LSMT at its end but not at its start", 0)
        padded = _Padded(file)
        return Layer(file.size, [Segment(0, padded.size // SECTOR, 0, False, 0)], padded)
    sealed = lsmt.open_sealed(file)
    return Layer(sealed.head.virtual_size, lsmt.read_segments(file, sealed), file)


def open_pair(data: ReadAt, index: ReadAt) -> Layer:
    """A read-write pair as a layer."""
    log = lsmt.open_log(index, data)
    return Layer(log.head.virtual_size, replay(lsmt.read_log(index, log)), data)


def flatten(blobs: Iterable[ReadAt], upper: tuple[ReadAt, ReadAt] | None = None) -> Disk:
    """The disk that `blobs` (bottom first) make, with a pair (data, index) on top if there is one."""
    layers = [open_layer(blob) for blob in blobs]
    return Disk([*layers, open_pair(*upper)] if upper else layers)


def flatten_files(*paths: Path) -> Disk:
    return flatten(map(read_file, paths))


def flatten_config(config: ImageConfig) -> Disk:
    """The disk of a config whose layers are all local."""
    blobs = []
    for lower in config.block_lowers:
        if lower.target_file or lower.target_digest:
            raise ValueError("the oracle does not read TurboOCI layers")
        blobs.append(read_file(next(path for path in map(Path, lower.candidates()) if path.exists())))
    upper = config.upper
    return flatten(blobs, (read_file(Path(upper.data)), read_file(Path(upper.index))) if upper else None)


def read_file(path: Path) -> BytesAt:
    return BytesAt(path.read_bytes())
