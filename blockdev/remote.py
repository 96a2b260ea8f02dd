# SPDX-License-Identifier: Apache-2.0
"""Images of registries: from a reference to blobs that fill as they are read.

A Client holds connections and a login; images opened by one caller's credentials share
it while any of them is open. Resolving a tag waits for the registry; if that cannot be
reached, what the catalog remembers of the tag counts, and the caller is told. What is
named by its digest is asked for once.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from blockdev.cache import Cache
from blockdev.caller import Caller
from blockdev.catalog import Catalog, Place
from blockdev.config import Policy
from blockdev.control import member
from blockdev.errors import BlockdevError, CorruptImage, NotFound, SourceError, UsageError
from blockdev.layer import NamedBlob
from blockdev.origin import BlockLayer, Part, block_layers, own_platform
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from blockdev.source import Offer
from blockdev.source.blob import RegistryBlob
from blockdev.source.retrying import patiently
from blockdev.supply import Supply
from formats.errors import FormatError
from formats.oci import DOCUMENT_SIZE_MAX, Descriptor, Index, Manifest, Reference, parse_manifest

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds with a registry that tells us to wait, under the policy `hang`


@dataclass(frozen=True)
class Access:
    """A caller's way to registries. `credentials` is a Provider as JSON: it may hold secrets."""

    plain_http: bool
    ca: str
    credentials: str

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Access:
        """Of what a client sends (cli/ask.py)."""
        credentials = json.dumps(member(body, "credentials", dict), sort_keys=True)
        return cls(member(body, "plain_http", bool), member(body, "ca", str), credentials)

    def __repr__(self) -> str:
        return f"Access(plain_http={self.plain_http})"


@dataclass
class _Shared:
    client: Client
    users: int = 0


@dataclass(frozen=True)
class _Image:
    """What a reference stands for now: documents by digest, the topmost first."""

    manifest: Manifest
    layers: list[BlockLayer]
    documents: dict[str, bytes]
    fetched: bool  # some of them now
    tag_asked: bool  # the registry has said now what the tag stands for


class Remotes:
    """The registries in use, and the way from their images to blobs. Any thread may call."""

    def __init__(self, supply: Supply, cache: Cache, catalog: Catalog) -> None:
        self._supply = supply
        self._cache = cache
        self._catalog = catalog
        self._clients: dict[tuple[str, Access], _Shared] = {}
        self._lock = threading.Lock()

    def client(self, registry: str, access: Access, undo: ExitStack) -> Client:
        """A client of a registry, until `undo`."""
        key = (registry, access)
        with self._lock:
            shared = self._clients.get(key)
            if shared is None:
                provider = Provider.from_json(json.loads(access.credentials))
                client = Client(
                    registry,
                    provider,
                    ca=access.ca or None,
                    plain_http=access.plain_http,
                    backoff=self._supply.backoff,
                )
                shared = self._clients[key] = _Shared(client)
            shared.users += 1
        undo.callback(self._leave, key, shared)
        return shared.client

    def _leave(self, key: tuple[str, Access], shared: _Shared) -> None:
        with self._lock:
            shared.users -= 1
            if shared.users:
                return
            del self._clients[key]
        shared.client.close()

    def open_reference(
        self, text: str, access: Mapping[str, Any], policy: Policy, undo: ExitStack, caller: Caller
    ) -> list[NamedBlob]:
        """The blobs of the image that a reference names, bottom first."""
        try:
            reference = Reference.parse(text)  # locate() has parsed it before
        except FormatError as error:
            raise UsageError(f"opening an image failed: {error}") from None
        asked = Access.from_wire(access)
        client = self.client(reference.registry, asked, undo)
        image = self._resolve(client, reference, caller, policy.seconds or PATIENCE)
        place = Place(reference.registry, reference.repository, asked.plain_http)
        blobs = [self.open_blob(client, place, blob, policy, undo, caller) for blob in image.layers]
        # Only now: the blobs are in use, so a prune knows that these are needed.
        self._catalog.note_place(place, [layer.digest for layer in image.layers])
        self._catalog.keep(image.documents)
        if image.tag_asked:
            self._catalog.see(str(reference), next(iter(image.documents)))
        if image.fetched:
            self._keep_config(reference, asked, image.manifest.config)
        return blobs

    def open_part(
        self, part: Part, access: Mapping[str, Any], policy: Policy, undo: ExitStack, caller: Caller
    ) -> NamedBlob:
        """The blob of a part that a config places in a registry."""
        registry, repository, plain_http = _split_url(part)
        asked = Access.from_wire(access)
        place = Place(registry, repository, asked.plain_http or plain_http)
        client = self.client(registry, replace(asked, plain_http=place.plain_http), undo)
        size = part.size or self._cache.size_of(part.digest, place.key) or client.blob_size(repository, part.digest)
        blob = self.open_blob(client, place, BlockLayer(part.digest, size), policy, undo, caller)
        self._catalog.note_place(place, [part.digest])
        return blob

    def open_blob(
        self, client: Client, place: Place, layer: BlockLayer, policy: Policy, undo: ExitStack, caller: Caller
    ) -> NamedBlob:
        """A blob that fills from a repository."""

        def source_of(offer: Offer, undo: ExitStack) -> RegistryBlob:
            return _source(client, place, layer, offer, undo)

        digest, size, table = layer
        return self._supply.open(digest, size, policy, source_of, undo, table, place.key, caller.sleep)

    def source(self, access: Mapping[str, Any], place: Place, blob: NamedBlob, undo: ExitStack) -> RegistryBlob:
        """Where the bytes of an open blob can be had, for whoever wants them at once."""
        asked = Access.from_wire(access)
        asked = replace(asked, plain_http=place.plain_http)
        layer = BlockLayer(blob.name, blob.blob.size)
        return _source(self.client(place.registry, asked, undo), place, layer, blob.blob.store, undo)

    # ---- documents ----

    def _resolve(self, client: Client, reference: Reference, caller: Caller, patience: float) -> _Image:
        """What the reference means for this machine. `patience`: seconds for a registry that tells us to wait."""
        digest = reference.digest or ""
        body = self._catalog.document(digest) if digest else None
        if body is not None:
            return self._understand(client, reference, digest, body, asked=False)
        return self._ask(client, reference, caller, patience)

    def _ask(self, client: Client, reference: Reference, caller: Caller, patience: float) -> _Image:
        """What the registry answers with; if it does not, or with what is no manifest, what it last answered with."""
        name = str(reference)
        seen = None if reference.digest else self._catalog.seen(name)
        body = self._catalog.document(seen.digest) if seen else None
        # Nobody waits for what can be had from the catalog.
        deadline = time.monotonic() + (0 if body else patience)
        try:
            ask = partial(client.manifest, reference.repository, reference.identifier)
            document = patiently(ask, deadline, caller.sleep)
            if body is not None:
                parse_manifest(document.body)  # others than the registry answer too: a portal to log in at
            return self._understand(client, reference, document.digest, document.body, asked=True)
        except (SourceError, FormatError) as error:
            if seen is None or body is None:
                raise
            log.warning("registry unreachable image=%s: %s", name, error)
            why = "unreachable" if isinstance(error, SourceError) else "answers with no manifest"
            caller.tell(f"registry {reference.registry} {why}: using {name}@{seen.digest} seen {seen.date}")
        return self._understand(client, reference, seen.digest, body, asked=False)

    def _understand(self, client: Client, reference: Reference, digest: str, body: bytes, *, asked: bool) -> _Image:
        """The image of a document, with the one that this document chooses for this machine."""
        name = str(reference)
        documents = {digest: body}
        fetched = asked
        try:
            manifest = parse_manifest(body)
            if isinstance(manifest, Index):
                digest = _choose(name, manifest)
                chosen = self._catalog.document(digest)
                fetched = fetched or chosen is None
                documents[digest] = chosen or client.manifest(reference.repository, digest).body
                manifest = parse_manifest(documents[digest])
            if isinstance(manifest, Index):
                raise FormatError("an index of indexes")
            tag_asked = asked and not reference.digest
            return _Image(manifest, block_layers(name, manifest), documents, fetched, tag_asked)
        except FormatError as error:
            raise CorruptImage(f"reading a manifest failed: {name}: {error}") from None

    def _keep_config(self, reference: Reference, access: Access, config: Descriptor) -> None:
        """Fetch a new image's config, which nobody waits for: no layer needs it."""
        if config.size <= DOCUMENT_SIZE_MAX and self._catalog.document(config.digest) is None:
            arguments = (reference, access, config.digest)
            try:
                threading.Thread(target=self._fetch_config, args=arguments, name="config", daemon=True).start()
            except RuntimeError as error:  # no thread to be had
                log.warning("config not kept image=%s: %s", reference, error)

    def _fetch_config(self, reference: Reference, access: Access, digest: str) -> None:
        with ExitStack() as undo:
            try:
                client = self.client(reference.registry, access, undo)
                self._catalog.keep({digest: client.blob(reference.repository, digest, DOCUMENT_SIZE_MAX)})
            except BlockdevError as error:
                log.warning("config not kept image=%s: %s", reference, error)


def _source(client: Client, place: Place, layer: BlockLayer, offer: Offer, undo: ExitStack) -> RegistryBlob:
    source = RegistryBlob(client, place.repository, layer.digest, layer.size, offer)
    undo.callback(source.close)
    return source


def _choose(name: str, index: Index) -> str:
    try:
        return index.choose(own_platform()).digest
    except FormatError as error:
        raise NotFound(f"opening the image failed: {name}: {error}") from None


def _split_url(part: Part) -> tuple[str, str, bool]:
    """Registry, repository and whether it is plain HTTP, of SCHEME://HOST/v2/REPOSITORY/blobs/DIGEST."""
    refusal = f"opening the image failed: {part.url}: want http(s)://HOST/v2/REPOSITORY/blobs/DIGEST"
    try:
        url = urlsplit(part.url)
        _ = url.port
    except ValueError:
        raise UsageError(refusal) from None
    path = url.path.removeprefix("/v2/").removesuffix(f"/blobs/{part.digest}")
    if url.scheme not in ("http", "https") or not url.netloc or "@" in url.netloc or f"/v2/{path}" not in url.path:
        raise UsageError(refusal)
    return url.netloc, path, url.scheme == "http"
