# SPDX-License-Identifier: Apache-2.0
"""What an IMAGE argument stands for: opened local layers, or blobs a registry has.

locate() runs in the caller's process, with the caller's rights: it opens every local
file it names. An Origin crosses the control socket as JSON and descriptors, so that
the owner resolves no path of a caller.

What the text means, in this order: `oci:DIR[:TAG]` is an image layout; the path of what
exists and is no directory (or any text that begins with `/`, `./` or `../`) is a layer or,
if it begins with `{`, a config.v1.json; everything else is a registry reference. Below a
writable layer `scratch` is nothing at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from blockdev.control import member
from blockdev.errors import CorruptImage, NotFound, UsageError
from blockdev.regular import open_regular
from blockdev.upper import claim, lock
from formats import imagespec, layout, oci
from formats.digests import Place
from formats.errors import FormatError

LAYOUT_PREFIX = "oci:"
NOTHING = "scratch"  # as in a Dockerfile: no image has that name
TABLES_MAX = 64 << 20  # bytes of an image's digest tables, which come into memory: those of 512 GiB
_SIZE_LIMIT = 1 << 63  # file offsets are signed
_PATH_STARTS = ("/", "./", "../")


@dataclass(frozen=True)
class Part:
    """One blob of an image: an open local file (fd >= 0), or in a registry at url."""

    name: str  # path or digest, for messages
    size: int = 0  # bytes; 0 = the registry has to say
    digest: str = ""  # "" = unknown
    url: str = ""
    fd: int = -1


@dataclass
class Origin:
    """An image as its user named it. Owns the descriptors of its parts."""

    name: str
    reference: str = ""  # set: the layers are what the registry says they are
    layers: Sequence[Part] = ()  # bottom first
    upper: Sequence[Part] = ()  # nothing, or the data and index files of a writable layer
    write: bool = False  # ... which are open for writing, and locked
    _open: list[int] = field(default_factory=list)

    @property
    def local(self) -> bool:
        """Whether every byte is in files that are open here."""
        return not self.reference and all(part.fd >= 0 for part in self.layers)

    @property
    def writable(self) -> tuple[int, int] | None:
        """Descriptors of the files that writes go to."""
        return (self.upper[0].fd, self.upper[1].fd) if self.write else None

    @property
    def files(self) -> list[tuple[str, int]]:
        """Name and descriptor of each file that is open here."""
        names = {part.fd: part.name for part in (*self.layers, *self.upper)}
        return [(names.get(fd, self.name), fd) for fd in self._open]

    def to_wire(self) -> tuple[dict[str, Any], list[int]]:
        """The JSON object and the descriptors that from_wire() makes an Origin of."""
        parts = [*self.layers, *self.upper]
        fields = [{"name": p.name, "size": p.size, "digest": p.digest, "url": p.url, "local": p.fd >= 0} for p in parts]
        body = {
            "name": self.name, "reference": self.reference, "parts": fields,
            "upper": bool(self.upper), "write": self.write,
        }  # fmt: skip
        return body, [part.fd for part in parts if part.fd >= 0]

    @classmethod
    def from_wire(cls, body: dict[str, Any], descriptors: Sequence[int]) -> Origin:
        """The Origin that to_wire() described. The descriptors stay the caller's."""
        parts = member(body, "parts", list)
        local = iter(descriptors)
        found = [_part(part, local) for part in parts]
        above = 2 if member(body, "upper", bool) else 0
        if len(found) < above:
            raise UsageError("asking the owner failed: parts: an upper layer has two")
        split = len(found) - above
        layers, upper, write = found[:split], found[split:], member(body, "write", bool)
        if write and not (upper and all(part.fd >= 0 for part in upper)):
            raise UsageError("asking the owner failed: parts: no files to write to")
        return cls(member(body, "name", str), member(body, "reference", str), layers, upper, write)

    def close(self) -> None:
        """Close what locate() opened."""
        while self._open:
            os.close(self._open.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _part(body: object, local: Iterator[int]) -> Part:
    """One part as to_wire() describes it, with the next descriptor if it is a file of the caller's."""
    fd = next(local, -1) if member(body, "local", bool) else -1
    size = member(body, "size", int)
    if (member(body, "local", bool) and fd < 0) or not 0 <= size < _SIZE_LIMIT:
        raise UsageError("asking the owner failed: parts: a descriptor is missing, or a size is none")
    return Part(member(body, "name", str), size, member(body, "digest", str), member(body, "url", str), fd)


def locate(image: str, upper: Sequence[str] = (), *, write: bool = False) -> Origin:
    """Find out what `image` is and open what of it is local. UsageError, NotFound, AccessDenied, CorruptImage.

    upper: data and index file of a writable layer that lies over it, instead of any the image has
    itself; only with one, `image` may be NOTHING. write: have that layer locked for writing.
    """
    origin = Origin(image, write=write)
    with contextlib.ExitStack() as undo:
        undo.callback(origin.close)
        if image == NOTHING and upper:
            origin.name = upper[0]
        elif image.startswith(LAYOUT_PREFIX):
            _locate_layout(origin, image.removeprefix(LAYOUT_PREFIX))
        elif image.startswith(_PATH_STARTS) or (image and _exists(image) and not Path(image).is_dir()):
            _locate_file(origin, image)
        else:
            origin.reference = _reference(image)
        files = upper or [part.name for part in origin.upper]
        if write and not files:
            raise UsageError(f"opening the image failed: {image}: it has no writable layer (ociblk create makes one)")
        if files:
            _lay_over(origin, files)
        undo.pop_all()
    return origin


def _lay_over(origin: Origin, files: Sequence[str]) -> None:
    """Open the data and index file of the writable layer, as the origin is to be opened, and lock it."""
    data = _open_part(origin, files[0], write=origin.write)
    if origin.write:
        claim(data.fd, data.name)
    else:
        lock(data.fd, data.name, exclusive=False)
    data = replace(data, size=os.lseek(data.fd, 0, os.SEEK_END))  # it may have grown until we had the lock
    origin.upper = [data, _open_part(origin, files[1], write=origin.write)]


def open_file(path: str, *, write: bool = False) -> Part:
    """A Part of a regular file or block device, opened for reading (or writing too). The caller closes its fd."""
    fd = open_regular(path, "opening a file failed", write=write)
    return Part(path, os.lseek(fd, 0, os.SEEK_END), fd=fd)


def _open_part(origin: Origin, path: str, digest: str = "", size: int = -1, *, write: bool = False) -> Part:
    part = open_file(path, write=write)
    origin._open.append(part.fd)
    if size not in (-1, part.size):
        raise CorruptImage(f"opening a layer failed: {path}: {part.size} bytes, {size} were promised")
    return Part(path, part.size, digest, fd=part.fd)


def _locate_file(origin: Origin, path: str) -> None:
    part = _open_part(origin, path)
    if os.pread(part.fd, 1, 0) == b"{":
        _locate_config(origin, path, part)
    else:
        origin.layers = [part]


def _locate_config(origin: Origin, path: str, file: Part) -> None:
    document = os.pread(file.fd, imagespec.CONFIG_SIZE_MAX + 1, 0)
    try:
        config = imagespec.parse(document)
        layers = []
        for lower in config.block_lowers:
            if lower.target_file or lower.target_digest:
                raise UsageError(f"opening the image failed: {path}: TurboOCI layers are not supported")
            local = next((name for name in lower.candidates() if _exists(name)), None)
            if local is not None:
                layers.append(_open_part(origin, local, lower.digest))
            elif lower.candidates() and not (config.repo_blob_url and lower.digest):
                raise NotFound(f"opening the image failed: {lower.candidates()[0]}: no such file (named in {path})")
            else:
                layers.append(Part(lower.digest, lower.size, lower.digest, config.blob_url(lower)))
    except FormatError as error:
        raise CorruptImage(f"reading the config failed: {path}: {error}") from None
    origin.layers = layers
    if config.upper:
        origin.upper = [Part(config.upper.data), Part(config.upper.index)]


def _locate_layout(origin: Origin, place: str) -> None:
    directory, tag = place, None
    if not place:
        raise UsageError(f"reading the image name failed: {origin.name}: want {LAYOUT_PREFIX}DIR[:TAG]")
    if not Path(directory).is_dir():
        directory, _, tag = place.rpartition(":")
        if not (directory and tag):
            raise NotFound(f"opening an image layout failed: {place}: no such directory")
    try:
        layout.check_marker(_read_document(f"{directory}/{layout.MARKER}"))
        index = layout.parse_index(_read_document(f"{directory}/{layout.INDEX}"))
        chosen = _choose(origin.name, lambda: layout.choose_tag(index, tag))
        manifest = oci.parse_manifest(_read_blob(directory, chosen))
        if isinstance(manifest, oci.Index):
            platforms = manifest
            chosen = _choose(origin.name, lambda: platforms.choose(own_platform()))
            manifest = oci.parse_manifest(_read_blob(directory, chosen))
        if isinstance(manifest, oci.Index):
            raise FormatError("an index of indexes of indexes")
        origin.layers = [
            _open_part(origin, f"{directory}/{layout.blob_path(layer.digest)}", layer.digest, layer.size)
            for layer in block_layers(origin.name, manifest)
        ]
    except FormatError as error:
        raise CorruptImage(f"reading an image layout failed: {directory}: {error}") from None


def _choose(name: str, choice: Callable[[], oci.Descriptor]) -> oci.Descriptor:
    try:
        return choice()
    except FormatError as error:
        raise NotFound(f"opening the image failed: {name}: {error}") from None


def own_platform() -> oci.Platform:
    """What this machine runs."""
    return oci.Platform.of_machine(os.uname().machine)


class BlockLayer(NamedTuple):
    """A blob that holds blocks. place: of its digest table, if it has one."""

    digest: str
    size: int
    place: Place | None = None


def block_layers(name: str, manifest: oci.Manifest) -> list[BlockLayer]:
    """The blobs that hold an image's blocks, bottom first.

    UsageError for images of another kind; `name` is what the user called this one. FormatError if what the layers
    say cannot be.
    """
    layers = [layer for layer in manifest.layers if not oci.is_acceleration(layer)]
    if any(oci.turbo_target(layer) for layer in layers):
        raise UsageError(f"opening the image failed: {name}: TurboOCI layers are not supported")
    if layers and all(layer.media_type.endswith(("gzip", "zstd")) and not oci.is_overlaybd(layer) for layer in layers):
        why = "an ordinary image, its layers are archives, not blocks (ociblk convert makes a block image of it)"
        raise UsageError(f"opening the image failed: {name}: {why}")
    found = [_block_layer(layer) for layer in layers]
    tables = sum(place.length for place in {layer.place for layer in found} if place)
    if tables > TABLES_MAX:
        raise FormatError(f"the digest tables of its layers have {tables} bytes, at most {TABLES_MAX}")
    return found


def _block_layer(layer: oci.Descriptor) -> BlockLayer:
    size = oci.layer_size(layer)
    return BlockLayer(oci.layer_digest(layer), size, Place.of(layer.annotations, size))


def _read_document(path: str) -> bytes:
    part = open_file(path)
    try:
        return os.pread(part.fd, oci.DOCUMENT_SIZE_MAX + 1, 0)
    finally:
        os.close(part.fd)


def _read_blob(directory: str, blob: oci.Descriptor) -> bytes:
    content = _read_document(f"{directory}/{layout.blob_path(blob.digest)}")
    if not oci.matches(blob.digest, content):
        raise FormatError(f"{blob.digest}: its content has another digest")
    return content


def _exists(path: str) -> bool:
    try:
        Path(path).stat()
    except (OSError, ValueError):  # ValueError: a NUL, which no path can hold
        return False
    return True


def _reference(text: str) -> str:
    try:
        return str(oci.Reference.parse(text))
    except FormatError as error:
        hint = "" if "/" not in text else f", and there is no file {text}"
        raise UsageError(f"reading the image name failed: {text}: {error}{hint}") from None
