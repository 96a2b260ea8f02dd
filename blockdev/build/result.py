# SPDX-License-Identifier: Apache-2.0
"""The documents of a converted image: config, manifest and index. What the source's said of themselves is kept."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace

from blockdev.build.depot import Blob, Depot
from blockdev.build.sending import Finished
from blockdev.build.sourceimage import SourceImage
from blockdev.registry.client import Document
from formats import oci


@dataclass(frozen=True)
class Kind:
    """What the layers hold, and whether the image is to be found from its source."""

    file_system: str
    referrer: bool


def put_image(target: Depot, image: SourceImage, layers: list[Finished], kind: Kind) -> Document:
    """Config and manifest of a converted image. What the source's said of itself is kept."""
    diff_ids = [layer.made.digest for layer in layers]
    config = oci.canonical({**image.config, "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    described = oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(config), len(config))
    _put_bytes(target, described, config)
    manifest = oci.Manifest(
        described,
        tuple(layer.descriptor(kind.file_system) for layer in layers),
        annotations=image.manifest.annotations,
        referral=_referral(image.document) if kind.referrer else None,
    )
    document = _document(oci.OCI_MANIFEST, manifest.build())
    if kind.referrer:
        entry = replace(_entry(image, document), artifact_type=oci.NATIVE_ARTIFACT)
        target.refer(image.document.digest, document, entry)
    else:
        target.put_document(document)
    return document


def put_index(
    target: Depot, top: Document, images: list[SourceImage], documents: list[Document], kind: Kind
) -> Document:
    """An index of the converted images like the source's of the others."""
    source = oci.parse_manifest(top.body)
    entries = tuple(_entry(image, document) for image, document in zip(images, documents, strict=True))
    referral = _referral(top) if kind.referrer else None
    index = oci.Index(entries, annotations=source.annotations, referral=referral)
    document = _document(oci.OCI_INDEX, index.build())
    if kind.referrer:
        described = oci.Descriptor(
            oci.OCI_INDEX, document.digest, len(document.body), artifact_type=oci.NATIVE_ARTIFACT
        )
        target.refer(top.digest, document, described)
    return document


def _entry(image: SourceImage, document: Document) -> oci.Descriptor:
    annotations = image.entry.annotations if image.entry else {}
    return oci.Descriptor(document.media_type, document.digest, len(document.body), annotations, image.platform)


def _referral(subject: Document) -> oci.Referral:
    return oci.Referral(oci.Descriptor(subject.media_type, subject.digest, len(subject.body)), oci.NATIVE_ARTIFACT)


def _document(media_type: str, body: bytes) -> Document:
    return Document(media_type, oci.digest_of(body), body)


def _put_bytes(target: Depot, described: oci.Descriptor, content: bytes) -> None:
    with ExitStack() as stack:
        fd = os.memfd_create("config", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.write(fd, content)
        target.put_blob(Blob(described.digest, described.size, fd), lambda arrived: None)
