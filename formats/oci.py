# SPDX-License-Identifier: Apache-2.0
"""OCI: references, digests, descriptors, manifests, indexes, overlaybd's annotations.

Reads the OCI image specification 1.1 and Docker's image manifest 2.2 alike, and writes
either. Documents are JSON; what is built is canonical (sorted keys, no spaces), so equal
values have equal digests. Fields that nobody here reads are ignored, and kept (`more`) where
others' words are written again: in an index and its entries.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.errors import FormatError

NESTING_MAX = 100  # of a document; those of the specifications have less than ten
DOCUMENT_SIZE_MAX = 4 << 20  # the distribution specification asks registries for at least this
SIZE_LIMIT = 1 << 63  # what a file offset can say
LAYERS_MAX = 4096  # far more than any image; bounds what a 4 MiB document makes us build
_NAME_SIZE_MAX = 255  # of host and repository together, as in Docker's reference grammar

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_INDEX)

OVERLAYBD = "containerd.io/snapshot/overlaybd/"
BLOB_DIGEST = OVERLAYBD + "blob-digest"
BLOB_SIZE = OVERLAYBD + "blob-size"
BLOB_FS_TYPE = OVERLAYBD + "blob-fs-type"
VERSION = OVERLAYBD + "version"
ACCELERATION_LAYER = OVERLAYBD + "acceleration-layer"
TURBO_TARGET_DIGEST = OVERLAYBD + "turbo-oci/target-digest"
TURBO_TARGET_TYPE = OVERLAYBD + "turbo-oci/target-media-type"
FASTOCI_TARGET_DIGEST = OVERLAYBD + "fastoci/target-digest"  # the name before TurboOCI
FASTOCI_TARGET_TYPE = OVERLAYBD + "fastoci/target-media-type"
NATIVE_VERSION = "0.1.0"
NATIVE_ARTIFACT = "application/vnd.containerd.overlaybd.native.v1+json"
REFERENCE_TYPE = "vnd.docker.reference.type"  # BuildKit's, of a descriptor in an index
ATTESTATION = "attestation-manifest"

_HEX_LENGTH = {"sha256": 64, "sha512": 128}
_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]+)")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::([0-9]{{1,5}}))?")
_PORT_LIMIT = 1 << 16

# uname's machine names → Go's, which platforms are spelled in.
ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "386",
    "ppc64le": "ppc64le",
    "riscv64": "riscv64",
    "s390x": "s390x",
}


# ---- digests ---------------------------------------------------------------------------


def parse_digest(text: str) -> tuple[str, str]:
    """Algorithm and lower-case hex of "sha256:…" or "sha512:…"; FormatError for anything else."""
    match = _DIGEST.fullmatch(text)
    if not match or len(match[2]) != _HEX_LENGTH[match[1]]:
        raise FormatError(f"{shown(text)} is no sha256 or sha512 digest")
    return match[1], match[2]


def digest_of(content: bytes) -> str:
    """The sha256 digest of the content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def matches(digest: str, content: bytes) -> bool:
    """Whether the content has the digest."""
    algorithm, hexadecimal = parse_digest(digest)
    return hashlib.new(algorithm, content).hexdigest() == hexadecimal


# ---- references --------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """registry/repository[:tag][@digest]. A digest says which image; a tag beside it is a remark."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Docker's defaults apply: docker.io, library/, latest. FormatError says what is wrong."""
        if "://" in text:
            raise FormatError(f"{shown(text)} is a URL, not an image reference")
        name, at, digest = text.partition("@")
        if at:
            parse_digest(digest)
        name, tag = _split_tag(name)
        if tag is not None and not _TAG.fullmatch(tag):
            raise FormatError(f"{shown(tag)} is no tag")
        registry, repository = _split_registry(name)
        if len(registry) + 1 + len(repository) > _NAME_SIZE_MAX:
            raise FormatError(f"an image name has at most {_NAME_SIZE_MAX} characters")
        if not _REPOSITORY.fullmatch(repository):
            hint = ": it must be lower case" if repository != repository.lower() else ""
            raise FormatError(f"{shown(repository)} is no repository name{hint}")
        if not at and tag is None:
            tag = "latest"
        return cls(registry, repository, tag, digest if at else None)

    @property
    def identifier(self) -> str:
        """What to ask the registry for: the digest, or else the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon after the last slash starts a tag; any other belongs to a port."""
    colon = name.rfind(":")
    return (name[:colon], name[colon + 1 :]) if colon > name.rfind("/") else (name, None)


def _split_registry(name: str) -> tuple[str, str]:
    """The first component is a host if it could not be part of a repository, or is localhost."""
    first, slash, rest = name.partition("/")
    if not slash or not (set(first) & set(".:[") or first == "localhost" or first != first.lower()):
        return "docker.io", name if slash else f"library/{name}"
    host = _HOST.fullmatch(first)
    if not host or (host[1] and not 0 < int(host[1]) < _PORT_LIMIT):
        raise FormatError(f"{shown(first)} is no registry host")
    if first in ("docker.io", "index.docker.io"):
        return "docker.io", rest if "/" in rest else f"library/{rest}"
    return first, rest


def shown(value: str) -> str:
    """Foreign text, quoted and cut, for a message."""
    return repr(value if len(value) <= 100 else value[:100] + "…")


# ---- descriptors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Platform:
    """What an image runs on, in Go's words. An empty variant fits any. more: other fields, kept as they are."""

    os: str
    architecture: str
    variant: str = ""
    more: Mapping[str, Any] = field(default_factory=dict, compare=False, kw_only=True)

    @classmethod
    def of_machine(cls, machine: str) -> Platform:
        """Linux on uname's machine name."""
        return cls("linux", ARCHITECTURES.get(machine, machine))

    def accepts(self, other: Platform) -> bool:
        """Whether an image for `other` may run here."""
        same = (self.os, self.architecture) == (other.os, other.architecture)
        return same and (not self.variant or not other.variant or self.variant == other.variant)

    def build(self) -> dict[str, Any]:
        """As a JSON object."""
        given = {**self.more, "os": self.os, "architecture": self.architecture}
        return given | ({"variant": self.variant} if self.variant else {})

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True)
class Descriptor:
    """A blob or document: what it is, its digest and its size in bytes. more: other fields, kept as they are."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""
    more: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def build(self) -> dict[str, Any]:
        """As a JSON object."""
        document = {**self.more, "mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.platform:
            document["platform"] = self.platform.build()
        return document


@dataclass(frozen=True)
class Referral:
    """That a manifest or index belongs to another one, and as what."""

    subject: Descriptor
    artifact_type: str


@dataclass(frozen=True)
class Manifest:
    """One image: its config and its layers, bottom first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = OCI_MANIFEST
    annotations: Mapping[str, str] = field(default_factory=dict)
    referral: Referral | None = None

    def build(self) -> bytes:
        """Canonical JSON."""
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": self.media_type, "config": self.config.build()}
        document["layers"] = [layer.build() for layer in self.layers]
        return _build(document, self.annotations, self.referral)


@dataclass(frozen=True)
class Index:
    """Several images under one name, usually one a platform. more: other fields, kept as they are."""

    manifests: tuple[Descriptor, ...]
    media_type: str = OCI_INDEX
    annotations: Mapping[str, str] = field(default_factory=dict)
    referral: Referral | None = None
    more: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def build(self) -> bytes:
        """Canonical JSON."""
        document = {**self.more, "schemaVersion": 2, "mediaType": self.media_type}
        document["manifests"] = [manifest.build() for manifest in self.manifests]
        return _build(document, self.annotations, self.referral)

    @property
    def images(self) -> list[Descriptor]:
        """The manifests without those that say something about another one."""
        return [image for image in self.manifests if not _is_attestation(image)]

    def choose(self, platform: Platform) -> Descriptor:
        """The image for a platform; the only one whatever it says. FormatError if there is none."""
        images = self.images
        if len(images) == 1 and images[0].platform is None:
            return images[0]
        fitting = [image for image in images if image.platform and platform.accepts(image.platform)]
        if not fitting:
            offered = ", ".join(str(image.platform) for image in images[:10] if image.platform) or "none"
            raise FormatError(f"no image for {platform} in the index (it has {offered})")
        exact = [image for image in fitting if image.platform == platform]
        return (exact or fitting)[0]


def _is_attestation(image: Descriptor) -> bool:
    """BuildKit keeps signatures and SBOMs in the index as images for no platform at all."""
    said = image.annotations.get(REFERENCE_TYPE) == ATTESTATION
    return said or (image.platform is not None and image.platform.os == "unknown")


def _build(document: dict[str, Any], annotations: Mapping[str, str], referral: Referral | None) -> bytes:
    if referral:
        document |= {"subject": referral.subject.build(), "artifactType": referral.artifact_type}
    return canonical(document | ({"annotations": dict(annotations)} if annotations else {}))


# ---- parsing ----------------------------------------------------------------------------------


def parse_manifest(document: bytes) -> Manifest | Index:
    """What the document is by its own account. FormatError if it is neither, or could be both."""
    top = load(document, "manifest")
    if top.get("schemaVersion") != 2:
        raise FormatError(f"manifest of schema version {top.get('schemaVersion')!r:.20}, only 2 is known")
    media_type = text(top, "mediaType", "manifest")
    # A document that can be read in two ways is read in two ways by somebody (CVE-2021-41190).
    if ("manifests" in top) == ("layers" in top or "config" in top):
        raise FormatError("manifest: want either layers or manifests")
    annotations = _annotations(top, "manifest")
    if "manifests" in top:
        _expect(media_type, INDEX_TYPES)
        more = _without(top, "schemaVersion", "mediaType", "manifests", "annotations")
        return Index(_descriptors(top, "manifests"), media_type or OCI_INDEX, annotations, more=more)
    _expect(media_type, MANIFEST_TYPES)
    config = _descriptor(top.get("config"), "config")
    return Manifest(config, _descriptors(top, "layers"), media_type or OCI_MANIFEST, annotations)


def _expect(media_type: str, known: tuple[str, str]) -> None:
    if media_type and media_type not in known:
        raise FormatError(f"manifest: its media type {shown(media_type)} contradicts its content")


def load(document: bytes, name: str) -> dict[str, Any]:
    """The JSON object that a document is; FormatError if it is none, or larger than DOCUMENT_SIZE_MAX."""
    if len(document) > DOCUMENT_SIZE_MAX:
        raise FormatError(f"{name} of {len(document)} bytes, at most {DOCUMENT_SIZE_MAX}")
    try:
        loaded = json.loads(document, parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not JSON: {error}") from error
    if _nesting(loaded) > NESTING_MAX:
        raise FormatError(f"{name} is nested more than {NESTING_MAX} deep")
    return _object(loaded, name)


def _nesting(value: object) -> int:
    """How deep objects and lists lie in each other: Python writes less of that than it reads."""
    depth = 0
    level = [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return depth


def _number(text: str) -> float:
    """ValueError for what JSON cannot say when it is written again: Python reads NaN, and 1e999 as infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.30} is no number")
    return value


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{place}: not an object")
    return value


def text(values: dict[str, Any], key: str, place: str, default: str | None = "") -> str:
    """The string under a key; FormatError if it is something else, or missing without a default."""
    value = values.get(key, default)
    if not isinstance(value, str):
        raise FormatError(f"{place}.{key}: want a string")
    return value


def _annotations(values: dict[str, Any], place: str) -> dict[str, str]:
    annotations = _object(values.get("annotations") or {}, f"{place}.annotations")
    if not all(isinstance(value, str) for value in annotations.values()):
        raise FormatError(f"{place}.annotations: values must be strings")
    return annotations


def _descriptors(top: dict[str, Any], key: str) -> tuple[Descriptor, ...]:
    found = top.get(key)
    if not isinstance(found, list) or len(found) > LAYERS_MAX:
        raise FormatError(f"{key}: want a list of at most {LAYERS_MAX}")
    return tuple(_descriptor(value, f"{key}[{place}]") for place, value in enumerate(found))


def _descriptor(value: object, place: str) -> Descriptor:
    values = _object(value, place)
    digest = text(values, "digest", place, None)
    parse_digest(digest)
    size = values.get("size")
    if type(size) is not int or not 0 <= size < SIZE_LIMIT:
        raise FormatError(f"{place}.size: {size!r:.30} is no size")
    platform = None
    if values.get("platform") is not None:
        inner = _object(values["platform"], f"{place}.platform")
        names = ("os", "architecture", "variant")
        platform = Platform(*(text(inner, key, f"{place}.platform") for key in names), more=_without(inner, *names))
    kind, artifact = text(values, "mediaType", place), text(values, "artifactType", place)
    more = _without(values, "mediaType", "digest", "size", "annotations", "platform", "artifactType")
    return Descriptor(kind, digest, size, _annotations(values, place), platform, artifact, more=more)


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


# ---- building -----------------------------------------------------------------------------------


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one spelling of a JSON document."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def build_config(platform: Platform, diff_ids: Iterable[str]) -> bytes:
    """An image config that says no more than its layers, which is what a block image has to say."""
    values: dict[str, Any] = {"architecture": platform.architecture, "os": platform.os, "config": {}}
    if platform.variant:
        values["variant"] = platform.variant
    return canonical(values | {"rootfs": {"type": "layers", "diff_ids": list(diff_ids)}})


# ---- overlaybd's annotations ----------------------------------------------------------------------


def layer_annotations(digest: str, size: int, fs_type: str = "") -> dict[str, str]:
    """What makes a layer one of overlaybd's, for its snapshotter; fs_type is what the whole disk holds."""
    parse_digest(digest)
    given = {VERSION: NATIVE_VERSION, BLOB_DIGEST: digest, BLOB_SIZE: str(size)}
    return given | ({BLOB_FS_TYPE: fs_type} if fs_type else {})


def layer_digest(layer: Descriptor) -> str:
    """The blob to read for a layer: the annotation's, or else the descriptor's own."""
    digest = layer.annotations.get(BLOB_DIGEST, layer.digest)
    parse_digest(digest)
    return digest


def layer_size(layer: Descriptor) -> int:
    """Bytes of the blob that layer_digest() names."""
    size = layer.annotations.get(BLOB_SIZE)
    if size is None or layer_digest(layer) == layer.digest:
        return layer.size
    if not (size.isascii() and size.isdigit() and len(size) < 20 and int(size) < SIZE_LIMIT):
        raise FormatError(f"{BLOB_SIZE}: {shown(size)} is no size")
    return int(size)


def is_overlaybd(layer: Descriptor) -> bool:
    """Whether the layer says that it holds blocks."""
    return BLOB_DIGEST in layer.annotations


def is_acceleration(layer: Descriptor) -> bool:
    """Whether the layer carries a trace instead of blocks."""
    return layer.annotations.get(ACCELERATION_LAYER) == "yes"


def turbo_target(layer: Descriptor) -> str | None:
    """The original layer that a TurboOCI layer points into; None for every other layer."""
    annotations = layer.annotations
    digest = annotations.get(TURBO_TARGET_DIGEST) or annotations.get(FASTOCI_TARGET_DIGEST)
    if digest is not None:
        parse_digest(digest)
    return digest
