# SPDX-License-Identifier: Apache-2.0
"""Images of registries: from a reference to blobs that fill as they are read.

A Client holds connections and a login; images opened by one caller's credentials share
it while any of them is open. Resolving a reference waits for the registry.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from blockdev.config import Policy
from blockdev.engine import Blob
from blockdev.errors import CorruptImage, NotFound, UsageError
from blockdev.layer import NamedBlob
from blockdev.origin import Part, block_layers, own_platform
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from blockdev.source.blob import RegistryBlob
from blockdev.supply import Supply
from formats.errors import FormatError
from formats.oci import Index, Reference, parse_manifest


@dataclass(frozen=True)
class Access:
    """A caller's way to registries. `credentials` is a Provider as JSON: it may hold secrets."""

    plain_http: bool
    ca: str
    credentials: str

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Access:
        """Of what a client sends (cli/ask.py)."""
        return cls(body["plain_http"], body["ca"], json.dumps(body["credentials"], sort_keys=True))

    def __repr__(self) -> str:
        return f"Access(plain_http={self.plain_http})"


@dataclass
class _Shared:
    client: Client
    users: int = 0


class Remotes:
    """The registries in use, and the way from their images to blobs. Any thread may call."""

    def __init__(self, supply: Supply) -> None:
        self._supply = supply
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
        self, text: str, access: Mapping[str, Any], policy: Policy, undo: ExitStack
    ) -> list[NamedBlob]:
        """The blobs of the image that a reference names, bottom first."""
        reference = Reference.parse(text)  # locate() has parsed it before
        client = self.client(reference.registry, Access.from_wire(access), undo)
        layers = _resolve(client, reference)
        return [self._open(client, reference.repository, digest, size, policy, undo) for digest, size in layers]

    def open_part(self, part: Part, access: Mapping[str, Any], policy: Policy, undo: ExitStack) -> NamedBlob:
        """The blob of a part that a config places in a registry."""
        registry, repository, plain_http = _split_url(part)
        asked = Access.from_wire(access)
        client = self.client(registry, replace(asked, plain_http=asked.plain_http or plain_http), undo)
        size = part.size or client.blob_size(repository, part.digest)
        return self._open(client, repository, part.digest, size, policy, undo)

    def _open(
        self, client: Client, repository: str, digest: str, size: int, policy: Policy, undo: ExitStack
    ) -> NamedBlob:
        def source_of(blob: Blob, undo: ExitStack) -> RegistryBlob:
            source = RegistryBlob(client, repository, digest, size, blob.store)
            undo.callback(source.close)
            return source

        return self._supply.open(digest, size, policy, source_of, undo)


def _resolve(client: Client, reference: Reference) -> list[tuple[str, int]]:
    """Digest and size of the layers of the image for this machine."""
    name = str(reference)
    try:
        manifest = parse_manifest(client.manifest(reference.repository, reference.identifier).body)
        if isinstance(manifest, Index):
            chosen = _choose(name, manifest)
            manifest = parse_manifest(client.manifest(reference.repository, chosen).body)
        if isinstance(manifest, Index):
            raise FormatError("an index of indexes")
        return block_layers(name, manifest)
    except FormatError as error:
        raise CorruptImage(f"reading a manifest failed: {name}: {error}") from None


def _choose(name: str, index: Index) -> str:
    try:
        return index.choose(own_platform()).digest
    except FormatError as error:
        raise NotFound(f"opening the image failed: {name}: {error}") from None


def _split_url(part: Part) -> tuple[str, str, bool]:
    """Registry, repository and whether it is plain HTTP, of SCHEME://HOST/v2/REPOSITORY/blobs/DIGEST."""
    url = urlsplit(part.url)
    path = url.path.removeprefix("/v2/").removesuffix(f"/blobs/{part.digest}")
    if url.scheme not in ("http", "https") or not url.netloc or "@" in url.netloc or f"/v2/{path}" not in url.path:
        raise UsageError(f"opening the image failed: {part.url}: want http(s)://HOST/v2/REPOSITORY/blobs/DIGEST")
    return url.netloc, path, url.scheme == "http"
