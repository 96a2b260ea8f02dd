# SPDX-License-Identifier: Apache-2.0
"""The documents of a converted image: config, manifest and index. What the source's said of themselves is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

from blockdev.build.depot import Depot, document_of, put_bytes
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
    manifest = oci.Manifest(
        put_bytes(target, oci.OCI_CONFIG, config),
        tuple(layer.descriptor(kind.file_system) for layer in layers),
        annotations=image.manifest.annotations,
        referral=_referral(image.document) if kind.referrer else None,
    )
    document = document_of(manifest)
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
    document = document_of(index)
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
