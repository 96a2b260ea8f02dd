# SPDX-License-Identifier: Apache-2.0
"""A repository of a registry as a depot of images (blockdev/build/depot.py).

A blob's stream goes on where its connection broke, as long as each connection brings it further.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from blockdev.build.depot import BlobFile, Depot, Read, Tell, checked
from blockdev.errors import CorruptImage, NotFound, SourceError, UsageError
from blockdev.registry.client import Body, Client, Document, Part
from blockdev.registry.exchange import PIECE_SIZE
from blockdev.source.retrying import patiently
from formats import oci
from formats.errors import FormatError

PATIENCE = 60.0  # seconds with a registry that tells us to wait
STREAM_SECONDS = 24 * 3600.0  # for one connection: a sender that is too slow is noticed long before
_Answer = TypeVar("_Answer")


class Repository:
    """A depot. `reference` says which repository, and the image in it."""

    def __init__(self, client: Client, reference: oci.Reference) -> None:
        self.name = f"{reference.registry}/{reference.repository}"
        self.place = str(reference)
        self.reference = reference
        self._client = client
        self._repository = reference.repository

    def document(self, identifier: str) -> Document:
        """As Depot.document()."""
        wanted = identifier or self.reference.identifier
        return _patiently(lambda: self._client.manifest(self._repository, wanted))

    @contextmanager
    def opened(self, blob: oci.Descriptor) -> Iterator[Read]:
        """As Depot.opened()."""
        stream = _Stream(self._client, Part(self._repository, blob.digest, 0, blob.size))
        try:
            yield checked(stream.read, blob, f"{self.name}@{blob.digest}")
        finally:
            stream.close()

    def check(self) -> None:
        """As Depot.check()."""
        _patiently(lambda: self._client.check_upload(self._repository))

    def put_blob(self, blob: BlobFile, tell: Tell, others: tuple[str, ...] = ()) -> bool:
        """As Depot.put_blob(). What another repository of the registry has is taken from there."""
        prefix = f"{self.reference.registry}/"
        near = [name.removeprefix(prefix) for name in others if name.startswith(prefix)]

        with open(os.dup(blob.fd), "rb") as file:
            file.seek(0)
            return self._client.upload(self._repository, blob.digest, blob.size, file, tell, near, _patiently)

    def put_document(self, document: Document) -> None:
        """As Depot.put_document()."""
        self._put(document.digest, document)

    def tag(self, document: Document) -> None:
        """As Depot.tag()."""
        if self.reference.tag is None or self.reference.digest:
            raise UsageError(f"tagging failed: {self.reference}: want a tag, not a digest")
        self._put(self.reference.tag, document)

    def displaces(self, source: Depot) -> bool:
        """As Depot.displaces(). Beside a digest, the tag is still the image's."""
        if not isinstance(source, Repository) or source.name != self.name:
            return False
        return source.reference.tag == self.reference.tag

    def refer(self, subject: str, document: Document, referrer: oci.Descriptor) -> None:
        """As Depot.refer(). A registry without a list of referrers gets one under a tag (specification 1.1)."""
        if _patiently(lambda: self._client.put_referrer(self._repository, document.media_type, document.body)):
            return
        tag = subject.replace(":", "-")[:128]
        index = self._referrers(tag)
        others = [known for known in index.manifests if known.digest != referrer.digest]
        body = replace(index, media_type=oci.OCI_INDEX, manifests=(*others, referrer)).build()
        _patiently(lambda: self._client.put_manifest(self._repository, tag, oci.OCI_INDEX, body))

    def _referrers(self, tag: str) -> oci.Index:
        try:
            body = _patiently(lambda: self._client.manifest(self._repository, tag)).body
        except NotFound:
            return oci.Index(())
        try:
            index = oci.parse_manifest(body)
            if not isinstance(index, oci.Index):
                raise FormatError("a manifest, not an index")
        except FormatError as error:
            raise CorruptImage(f"reading referrers failed: {self.name}:{tag}: {error}") from None
        return index

    def _put(self, identifier: str, document: Document) -> None:
        _patiently(lambda: self._client.put_manifest(self._repository, identifier, document.media_type, document.body))


class _Stream:
    """A blob from its start to its end, over as many connections as it takes."""

    def __init__(self, client: Client, part: Part) -> None:
        self._client = client
        self._part = part
        self._at = 0
        self._failed_at = -1
        self._body: Body | None = None
        self._piece = memoryview(bytearray(PIECE_SIZE))

    def read(self, length: int) -> bytes:
        while self._at < self._part.length:
            try:
                count = self._open().reply.read_piece(self._piece[:length])
                if not count:
                    where = f"{self._client.registry}/{self._part.repository}@{self._part.digest}"
                    raise SourceError(f"reading a blob failed: {where} at {self._at}: the answer ended early")
            except SourceError:
                self.close()
                if self._at <= self._failed_at:
                    raise
                self._failed_at = self._at
            else:
                self._at += count
                return bytes(self._piece[:count])
        return b""

    def _open(self) -> Body:
        if self._body is None:
            part = self._part._replace(offset=self._at, length=self._part.length - self._at)
            body = _patiently(lambda: self._client.open_part(part, time.monotonic() + STREAM_SECONDS))
            left = self._at if body.whole else 0
            while left and (count := body.reply.read_piece(self._piece[:left])):
                left -= count
            self._body = body
        return self._body

    def close(self) -> None:
        if self._body:
            self._body.reply.close()
            self._body = None


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    return patiently(ask, time.monotonic() + PATIENCE)
