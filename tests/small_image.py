# SPDX-License-Identifier: Apache-2.0
"""A small image to push and read, a login to do it with, and the form of a refusal."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import time
from pathlib import Path

from blockdev.errors import BlockdevError
from blockdev.registry.client import Client, Part
from blockdev.registry.credentials import Provider
from formats import oci

SECRET = "Pa55:word-and-more"
WRONG = "not-the-Pa55word"
CONTENT = os.urandom(3 << 20)
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
NOBODY = Provider()


def provider(folder: Path, host: str, user: str = "ann", password: str = SECRET, **more: str) -> Provider:
    """A config.json with one login."""
    entry = {"auth": base64.b64encode(f"{user}:{password}".encode()).decode(), **more}
    (folder / "config.json").write_text(json.dumps({"auths": {host: entry}}))
    return Provider.of_environment({"DOCKER_CONFIG": str(folder)})


def soon() -> float:
    return time.monotonic() + 20


def read(client: Client, offset: int, length: int, *, repository: str = "app", digest: str = DIGEST) -> bytes:
    buffer = bytearray(length)
    filled = 0
    with client.open_part(Part(repository, digest, offset, length), soon()) as body:
        assert not body.whole
        while filled < length and (count := body.reply.read_piece(memoryview(buffer)[filled:])):
            filled += count
    return bytes(buffer[:filled])


def push(client: Client, repository: str = "app", tag: str = "v1") -> str:
    """An image with CONTENT as its layer; its digest."""
    client.upload(repository, DIGEST, len(CONTENT), io.BytesIO(CONTENT))
    config = oci.build_config(oci.Platform("linux", "amd64"), [DIGEST])
    digest = oci.digest_of(config)
    client.upload(repository, digest, len(config), io.BytesIO(config))
    layer = oci.Descriptor(oci.OCI_LAYER, DIGEST, len(CONTENT), oci.layer_annotations(DIGEST, len(CONTENT)))
    manifest = oci.Manifest(oci.Descriptor(oci.OCI_CONFIG, digest, len(config)), (layer,))
    return client.put_manifest(repository, tag, manifest.media_type, manifest.build())


def assert_one_sentence(error: BlockdevError, *parts: str) -> None:
    """ "what failed: which thing: why", naming the parts, without any secret."""
    text = str(error)
    assert text.count(" failed: ") == 1
    assert "\n" not in text
    for part in parts:
        assert part in text
    for secret in (SECRET, WRONG, base64.b64encode(f"ann:{SECRET}".encode()).decode()):
        assert secret not in text
