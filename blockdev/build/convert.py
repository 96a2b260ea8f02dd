# SPDX-License-Identifier: Apache-2.0
"""An ordinary OCI image as a block image: convert.

For each layer, bottom first: its blob is fetched and unpacked by one thread, its files go into the
tree and their content into a layer file by another, which is compressed by `jobs` more; the
finished file is hashed, kept and sent by the last one, while the next layer is under way.
What comes out does not depend on how many there are. Manifest and tag come last, so that
nothing half-made is ever to be had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Protocol

from blockdev.build.ahead import Ahead
from blockdev.build.depot import Depot, Read
from blockdev.build.disk import all_cores
from blockdev.build.erofsdisk import ErofsDisk
from blockdev.build.layerfile import Wrapping
from blockdev.build.plain import plain
from blockdev.build.result import Kind, put_image, put_index
from blockdev.build.sending import Finished, Meter, Progress, Sending
from blockdev.build.sourceimage import Archived, SourceImage, choose
from blockdev.build.workshop import Made, Workshop, Written
from blockdev.errors import CorruptImage, UsageError, from_os
from blockdev.registry.client import Document
from formats import oci
from formats.errors import FormatError
from formats.lsmt import NULL_UUID, Head

_GENERATION = 1  # of what comes out of a layer: another one, and layers of earlier runs are not taken for the same
_REST = 1 << 20  # bytes read at a time of what follows an archive's end


class Disk(Protocol):
    """A disk in the making, with no layer yet: ErofsDisk, Ext4Disk."""

    def write(self, read: Read, head: Head, file: BinaryIO, name: str) -> Written: ...
    def follow(self, read: Read, written: Written, file: BinaryIO, name: str) -> None: ...
    def fits(self, below: Written | None, written: Written) -> bool:
        """Whether a layer that was written before goes over this one; None: over nothing."""


_Known = tuple[Made, BinaryIO] | None  # a layer that an earlier run has made, if one has
MakeDisk = Callable[[Wrapping, int], Disk]  # how layers are stored, and threads that compress


@dataclass(frozen=True)
class Options:
    """How to convert. platform: None stands for all that the image has; jobs: threads that compress.

    file_system: the kernel's name of what `disk` makes.
    """

    platform: oci.Platform | None
    file_system: str = "erofs"
    disk: MakeDisk = ErofsDisk
    wrapping: Wrapping = field(default_factory=lambda: Wrapping(tar=True, digests=True))
    jobs: int = field(default_factory=all_cores)
    referrer: bool = False

    def check(self) -> None:
        """UsageError if nothing can be made so."""
        if self.jobs < 1:
            raise UsageError(f"converting failed: {self.jobs} jobs: want 1 or more")
        self.wrapping.check()


@dataclass(frozen=True)
class ConvertedLayer:
    """Source and result. reused: it was made by an earlier run; sent: it was not there before."""

    source: str
    digest: str
    size: int
    reused: bool
    sent: bool


@dataclass(frozen=True)
class ConvertedImage:
    """One image of one platform."""

    platform: str
    source: str
    digest: str
    layers: tuple[ConvertedLayer, ...]


@dataclass(frozen=True)
class Converted:
    """What is under the tag now: an image, or an index of images."""

    digest: str
    images: tuple[ConvertedImage, ...]


def convert(
    source: Depot, target: Depot, workshop: Workshop, options: Options, progress: Progress | None = None
) -> Converted:
    """Convert what the source's reference names, and put it where the target's says.

    CorruptImage, UsageError, and what the depots raise. Unless it returns, the target's tag is what it was.
    """
    options.check()
    if source.place == target.place and not options.referrer:
        raise UsageError(f"converting failed: {target.place}: it would take its source's place")
    if options.referrer and source.name != target.name:
        raise UsageError(f"converting failed: {target.name}: a referrer has to be where its subject is, {source.name}")
    top = source.document("")
    images = choose(source, top, options.platform)
    with Sending(source, target, workshop, Meter(progress, images)) as sending:
        pending = [_convert_image(source, image, sending, workshop, options) for image in images]
        finished = [[future.result() for future in layers] for layers in pending]
        kind = Kind(options.file_system, options.referrer)
        documents = [put_image(target, image, layers, kind) for image, layers in zip(images, finished, strict=True)]
        result = documents[0]
        if options.platform is None and images[0].entry:
            result = put_index(target, top, images, documents, kind)
        if not options.referrer or source.place != target.place:
            target.tag(result)
        for layer in (layer for layers in finished for layer in layers):
            workshop.note(layer.key, replace(layer.made, places=(*layer.made.places, target.name)))
    made = zip(images, documents, finished, strict=True)
    return Converted(result.digest, tuple(_described(image, document, layers) for image, document, layers in made))


# ---- layers ---------------------------------------------------------------------------------


def _convert_image(
    source: Depot, image: SourceImage, sending: Sending, workshop: Workshop, options: Options
) -> list[Future[Finished]]:
    """The main flow: every layer of an image, bottom first, each handed on to be sent."""
    keys = [_key(image.layers[: count + 1], options) for count in range(len(image.layers))]
    disk = options.disk(options.wrapping, options.jobs)
    found = _usable([workshop.find(key) for key in keys], disk)
    missing = [number for number, known in enumerate(found) if known is None]
    futures = []
    parent = NULL_UUID
    for number, layer in enumerate(image.layers):
        sending.check()
        known = found[number]
        if known is None:
            file = workshop.scratch()
            head = Head(0, 0, uuid=layer.uuid, parent_uuid=parent)
            with _archive(source, layer, sending.meter) as read:
                written = _write(disk, read, head, file, f"{source.name}@{layer.blob.digest}")
            futures.append(sending.send(keys[number], layer, written, file))
        else:
            if missing and number < missing[-1]:
                with _archive(source, layer, sending.meter) as read:
                    disk.follow(read, known[0].written, known[1], f"{source.name}@{layer.blob.digest}")
            futures.append(sending.resend(keys[number], layer, *known))
        sending.meter.passed(layer)
        parent = layer.uuid
    return futures


def _usable(found: list[_Known], disk: Disk) -> list[_Known]:
    """Without those that were made to lie over another layer than the one below them is now."""
    usable: list[_Known] = []
    for known in found:
        below = usable[-1][0].written if usable and usable[-1] else None
        usable.append(known if known and disk.fits(below, known[0].written) else None)
    return usable


def _write(disk: Disk, read: Read, head: Head, file: BinaryIO, name: str) -> Written:
    try:
        return disk.write(read, head, file, name)
    except OSError as error:
        raise from_os("converting a layer failed", error, "its scratch file") from error


@contextmanager
def _archive(source: Depot, layer: Archived, meter: Meter) -> Iterator[Read]:
    """The archive of a layer, unpacked. All of it is read and checked in the end, whatever follows the archive."""
    checksum = hashlib.new(oci.parse_digest(layer.diff_id)[0])

    @contextmanager
    def opened() -> Iterator[Read]:
        with source.opened(layer.blob) as read:
            unpacked = plain(meter.counting(read))

            def read_hashed(length: int) -> bytes:
                piece = unpacked(length)
                checksum.update(piece)
                return piece

            yield read_hashed
            while read(_REST):  # what is behind the compressed archive is the blob's, too
                pass

    failed = f"converting a layer failed: {source.name}@{layer.blob.digest}"
    with Ahead(opened, "unpack") as ahead:
        try:
            yield ahead.read
            while ahead.read(_REST):
                pass
        except FormatError as error:
            raise CorruptImage(f"{failed}: {error}") from None
    if checksum.hexdigest() != oci.parse_digest(layer.diff_id)[1]:
        raise CorruptImage(f"{failed}: unpacked it has another digest than the config says, {layer.diff_id}")


def _key(layers: Sequence[Archived], options: Options) -> str:
    """What a converted layer depends on: the archives up to it, and how they are converted."""
    wrapping = options.wrapping
    how = [_GENERATION, options.file_system, wrapping.codec, wrapping.block_size, wrapping.digests]
    what = [[layer.blob.digest, layer.diff_id] for layer in layers]
    return hashlib.sha256(oci.canonical({"how": how, "layers": what})).hexdigest()


def _described(image: SourceImage, document: Document, layers: list[Finished]) -> ConvertedImage:
    return ConvertedImage(
        str(image.platform),
        image.document.digest,
        document.digest,
        tuple(
            ConvertedLayer(layer.source, layer.made.digest, layer.made.written.size, layer.reused, layer.sent)
            for layer in layers
        ),
    )
