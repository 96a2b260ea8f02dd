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
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from blockdev.build.archivestream import ArchiveStream
from blockdev.build.depot import Depot, Read
from blockdev.build.disk import all_cores
from blockdev.build.erofsdisk import ErofsDisk
from blockdev.build.layerfile import Wrapping
from blockdev.build.result import Kind, put_image, put_index
from blockdev.build.sending import Finished, Meter, Progress, Sending
from blockdev.build.sourceimage import Archived, SourceImage, choose
from blockdev.build.workshop import Made, Workshop, Written
from blockdev.errors import CorruptImage, UsageError, from_os
from blockdev.registry.client import Document
from formats import oci
from formats.errors import FormatError
from formats.lsmt import NULL_UUID, Head

_GENERATION = 3  # of what comes out of a layer: another one, and layers of earlier runs are not taken for the same


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

    strict: the platform has to be that of an only image, too. file_system: the kernel's name of what `disk` makes.
    """

    platform: oci.Platform | None
    file_system: str = "erofs"
    disk: MakeDisk = ErofsDisk
    wrapping: Wrapping = field(default_factory=lambda: Wrapping(tar=True, digests=True))
    jobs: int = field(default_factory=all_cores)
    referrer: bool = False
    strict: bool = False

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
    if options.referrer and source.name != target.name:
        raise UsageError(f"converting failed: {target.name}: a referrer has to be where its subject is, {source.name}")
    top = source.document("")
    displaces = target.displaces(source)
    if displaces and not options.referrer:
        raise UsageError(f"converting failed: {target.place}: it would take its source's place")
    images = choose(source, top, options.platform, strict=options.strict)
    target.check()
    with Sending(source, target, workshop, Meter(progress, images)) as sending:
        pending = [_convert_image(source, image, sending, workshop, options) for image in images]
        finished = [[future.result() for future in layers] for layers in pending]
        kind = Kind(options.file_system, options.referrer)
        documents = [put_image(target, image, layers, kind) for image, layers in zip(images, finished, strict=True)]
        result = documents[0]
        if options.platform is None and images[0].entry:
            result = put_index(target, top, images, documents, kind)
        if not displaces:
            target.tag(result)
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
    # What was made before has to be read all the same, if a layer above it is to be made.
    reads = max((number + 1 for number, known in enumerate(found) if known is None), default=0)
    for layer in image.layers[reads:]:
        sending.meter.skip(layer)
    futures = []
    parent = NULL_UUID
    with closing(_archives(source, image.layers[:reads], sending.meter)) as archives:
        for key, layer, known in zip(keys, image.layers, found, strict=True):
            sending.check()
            archive = next(archives, None)
            if known is None:
                assert archive
                file = workshop.scratch()
                head = Head(0, 0, uuid=layer.uuid, parent_uuid=parent)
                written = _write(disk, archive, _while_sent(archive, sending), head, file)
                futures.append(sending.send(key, layer, written, file))
            else:
                if archive:
                    with _naming(archive):
                        disk.follow(_while_sent(archive, sending), known[0].written, known[1], archive.name)
                        archive.finish()
                futures.append(sending.resend(key, layer, *known))
            parent = layer.uuid
    return futures


def _usable(found: list[_Known], disk: Disk) -> list[_Known]:
    """Without those that were made to lie over another layer than the one below them is now."""
    usable: list[_Known] = []
    for known in found:
        below = usable[-1][0].written if usable and usable[-1] else None
        usable.append(known if known and disk.fits(below, known[0].written) else None)
    return usable


def _archives(source: Depot, layers: Sequence[Archived], meter: Meter) -> Generator[ArchiveStream, None, None]:
    """Each layer's archive; the next one is on its way already. All are closed in the end."""
    waiting: deque[ArchiveStream] = deque()
    try:
        for layer in (*layers, None):
            if layer:
                waiting.append(ArchiveStream(source, layer, meter.counting))
            if len(waiting) > 1 or (waiting and layer is None):
                yield waiting[0]
                waiting.popleft().close()
    finally:
        for archive in waiting:
            archive.close()


def _while_sent(archive: ArchiveStream, sending: Sending) -> Read:
    """The archive's bytes, unless a layer below has failed to reach the target: a long one is not read for nothing."""

    def read(length: int) -> bytes:
        sending.check()
        return archive.read(length)

    return read


def _write(disk: Disk, archive: ArchiveStream, read: Read, head: Head, file: BinaryIO) -> Written:
    try:
        with _naming(archive):
            written = disk.write(read, head, file, archive.name)
            archive.finish()
            return written
    except OSError as error:
        raise from_os("converting a layer failed", error, "its scratch file") from error


@contextmanager
def _naming(archive: ArchiveStream) -> Iterator[None]:
    """What cannot be made of an archive is the archive's fault."""
    try:
        yield
    except FormatError as error:
        raise CorruptImage(f"converting a layer failed: {archive.name}: {error}") from None


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
