# SPDX-License-Identifier: Apache-2.0
"""An image layout directory as a depot of images (blockdev/build/depot.py).

Every file appears whole or not at all, and `index.json` last. Writers of one directory take
turns at its index, so none loses what another one has just tagged.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from blockdev.build.depot import BlobFile, Depot, Read, Tell, checked
from blockdev.errors import CorruptImage, NotFound, UsageError, from_os
from blockdev.registry.client import Document
from blockdev.regular import open_regular
from blockdev.replacement import replacing
from blockdev.staging import copy_content, digest_of
from formats import layout, oci
from formats.errors import FormatError

_MARKER = b'{"imageLayoutVersion":"1.0.0"}'


class Layout:
    """A depot. Without a tag, it reads the only image and writes `latest`."""

    def __init__(self, folder: Path, tag: str | None) -> None:
        self.name = f"oci:{os.path.realpath(folder)}"  # one for all paths to the directory
        self.place = f"oci:{folder}:{tag or 'latest'}"
        self.folder = folder
        self._tag = tag

    @classmethod
    def parse(cls, place: str) -> Layout:
        """DIR[:TAG]. What follows the last colon is no tag where the whole is a directory, or it has a slash in it.

        UsageError if there is no DIR.
        """
        if not place or place.startswith(":"):
            raise UsageError(f"reading the image name failed: oci:{place}: want oci:DIR[:TAG]")
        folder, colon, tag = place.rpartition(":")
        if not colon or not folder or "/" in tag or Path(place).is_dir():
            return cls(Path(place), None)
        return cls(Path(folder), tag)

    def document(self, identifier: str) -> Document:
        """As Depot.document()."""
        try:
            layout.check_marker(self._read(layout.MARKER))
            digest = identifier if ":" in identifier else self._find(identifier).digest
            body = self._read(layout.blob_path(digest))
            if not oci.matches(digest, body):
                raise FormatError(f"{digest}: its content has another digest")
            media_type = oci.parse_manifest(body).media_type
        except FormatError as error:
            raise CorruptImage(f"reading an image layout failed: {self.folder}: {error}") from None
        return Document(media_type, digest, body)

    @contextmanager
    def opened(self, blob: oci.Descriptor) -> Iterator[Read]:
        """As Depot.opened()."""
        path = self._path(blob.digest)
        with _open(path) as file:
            yield checked(file.read, blob, str(path))

    def check(self) -> None:
        """As Depot.check()."""
        try:
            if (self.folder / layout.MARKER).exists():
                layout.check_marker(self._read(layout.MARKER))
        except FormatError as error:
            raise CorruptImage(f"write image layout: {self.folder}: {error}") from None

    def put_blob(self, blob: BlobFile, tell: Tell, others: tuple[str, ...] = ()) -> bool:
        """As Depot.put_blob()."""
        path = self._path(blob.digest)
        try:
            self._prepare(path)
            if _holds(path, blob):
                return False
            with replacing(path) as fd:
                copy_content(blob.fd, fd, blob.size)
        except OSError as error:
            raise from_os("write image layout", error, str(path)) from error
        tell(blob.size)
        return True

    def put_document(self, document: Document) -> None:
        """As Depot.put_document()."""
        path = self._path(document.digest)
        try:
            self._prepare(path)
            with replacing(path) as fd, open(os.dup(fd), "wb") as file:
                file.write(document.body)
        except OSError as error:
            raise from_os("write image layout", error, str(path)) from error

    def tag(self, document: Document) -> None:
        """As Depot.tag()."""
        name = {layout.REF_NAME: self._tag or "latest"}
        self._enter(document, oci.Descriptor(document.media_type, document.digest, len(document.body), name))

    def displaces(self, source: Depot) -> bool:
        """As Depot.displaces(). Without a tag, the source's is that of the only image it has."""
        if not isinstance(source, Layout) or source.name != self.name:
            return False
        return (self._tag or "latest") in (source._tag or "latest", source._find("").annotations.get(layout.REF_NAME))

    def refer(self, subject: str, document: Document, referrer: oci.Descriptor) -> None:
        """As Depot.refer(): a layout has its referrers in the index, without a name."""
        self._enter(document, referrer)

    # ---- files ----------------------------------------------------------------------------

    def _find(self, tag: str) -> oci.Descriptor:
        index = layout.parse_index(self._read(layout.INDEX))
        try:
            return layout.choose_tag(index, tag or self._tag)
        except FormatError as error:
            raise NotFound(f"opening the image failed: {self.name}: {error}") from None

    def _enter(self, document: Document, entry: oci.Descriptor) -> None:
        """Bring a document, and put its entry into the index, in place of one with the same name and digest or tag."""
        self.put_document(document)
        try:
            with self._turn():
                try:
                    index = layout.parse_index(self._read(layout.INDEX))
                except NotFound:
                    index = oci.Index(())
                except FormatError as error:
                    raise CorruptImage(f"reading an image layout failed: {self.folder}: {error}") from None
                kept = [known for known in index.manifests if not _replaces(entry, known)]
                body = replace(index, manifests=(*kept, entry)).build()
                with replacing(self.folder / layout.INDEX) as fd, open(os.dup(fd), "wb") as file:
                    file.write(body)
        except OSError as error:
            raise from_os("write image layout", error, str(self.folder)) from error

    @contextmanager
    def _turn(self) -> Iterator[None]:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _prepare(self, path: Path) -> None:
        self.check()
        marker = self.folder / layout.MARKER
        path.parent.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            with replacing(marker) as fd:
                os.write(fd, _MARKER)

    def _path(self, digest: str) -> Path:
        return self.folder / layout.blob_path(digest)

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        try:
            with _open(path) as file:
                return file.read(oci.DOCUMENT_SIZE_MAX + 1)
        except OSError as error:
            raise from_os("read image layout", error, str(path)) from None


def _open(path: Path) -> BinaryIO:
    return os.fdopen(open_regular(path, "read image layout"), "rb")


def _holds(path: Path, blob: BlobFile) -> bool:
    """Whether the blob is there, every byte of it."""
    if not path.exists() or path.stat().st_size != blob.size:
        return False
    with _open(path) as file:
        return digest_of(file.fileno(), blob.digest.partition(":")[0]) == blob.digest


def _replaces(entry: oci.Descriptor, known: oci.Descriptor) -> bool:
    names = entry.annotations.get(layout.REF_NAME), known.annotations.get(layout.REF_NAME)
    return names[0] == names[1] and (names[0] is not None or entry.digest == known.digest)
