# SPDX-License-Identifier: Apache-2.0
"""Where whole images are: a repository of a registry, or an image layout. What the two have in common."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from blockdev.errors import CorruptImage
from blockdev.registry.client import Document
from formats.oci import Descriptor, Index, Manifest, digest_of, parse_digest

Read = Callable[[int], bytes]  # the next bytes, at most so many; nothing at the end
Tell = Callable[[int], None]  # bytes that have arrived so far


@dataclass(frozen=True)
class BlobFile:
    """A blob that can be put somewhere: a file that is open for reading."""

    digest: str
    size: int
    fd: int


class Depot(Protocol):
    """A place for images. Thread-safe. Errors are those of registry.client.Client, or what from_os() says."""

    name: str  # of the depot, without tag or digest
    place: str  # with the tag or digest of the image that is meant

    def document(self, identifier: str) -> Document:
        """A manifest or index by digest or tag, checked; "" stands for the tag, or the only image, of the place."""

    def opened(self, blob: Descriptor) -> AbstractContextManager[Read]:
        """A blob to be read from its start. CorruptImage at its end if it was another one."""

    def check(self) -> None:
        """Raise what is known to forbid to put anything there, before much is made for it."""

    def put_blob(self, blob: BlobFile, tell: Tell, others: tuple[str, ...] = ()) -> bool:
        """Bring a blob there; whether it was sent. `others`: names of depots that may have it, too."""

    def put_document(self, document: Document) -> None:
        """Bring a manifest or index there, to be found by its digest."""

    def tag(self, document: Document) -> None:
        """Let the place's tag stand for a document."""

    def displaces(self, source: Depot) -> bool:
        """Whether tag() would take the tag of the image that the source's place means, which is there."""

    def refer(self, subject: str, document: Document, referrer: Descriptor) -> None:
        """Bring a document there that refers to `subject` (a digest), to be found from that."""


def document_of(value: Manifest | Index) -> Document:
    """As it will lie there."""
    body = value.build()
    return Document(value.media_type, digest_of(body), body)


def put_bytes(depot: Depot, media_type: str, content: bytes) -> Descriptor:
    """Bring a small blob, such as a config, to a depot."""
    digest = digest_of(content)
    with os.fdopen(os.memfd_create("blob", os.MFD_CLOEXEC), "w+b", buffering=0) as file:
        file.write(content)
        depot.put_blob(BlobFile(digest, len(content), file.fileno()), lambda arrived: None)
    return Descriptor(media_type, digest, len(content))


def checked(read: Read, blob: Descriptor, name: str) -> Read:
    """The same bytes. CorruptImage where it turns out that they are not the blob's."""
    algorithm, wanted = parse_digest(blob.digest)
    hasher = hashlib.new(algorithm)
    size = 0

    def read_checked(length: int) -> bytes:
        nonlocal size
        piece = read(length)
        size += len(piece)
        hasher.update(piece)
        if size > blob.size or (not piece and (size, hasher.hexdigest()) != (blob.size, wanted)):
            found = f"{size} bytes" if size != blob.size else f"the digest {algorithm}:{hasher.hexdigest()}"
            raise CorruptImage(f"reading a blob failed: {name}: what came has {found}")
        return piece

    return read_checked
