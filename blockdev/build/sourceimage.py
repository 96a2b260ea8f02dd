# SPDX-License-Identifier: Apache-2.0
"""An ordinary OCI image as a conversion reads it: its manifest, its config, its archives and what they chain up to."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from blockdev.build.depot import Depot
from blockdev.engine import LAYERS_MAX
from blockdev.errors import CorruptImage, NotFound, UsageError
from blockdev.registry.client import Document
from formats import oci
from formats.errors import FormatError

_ARCHIVE = re.compile(r".*[.]tar(?:[.+](?:gzip|zstd))?")  # media types of layers: OCI's and Docker's


@dataclass(frozen=True)
class Archived:
    """One layer. diff_id: the digest of its archive unpacked; chain: of that and of all below."""

    blob: oci.Descriptor
    diff_id: str
    chain: str

    @property
    def uuid(self) -> str:
        """Of the block layer that stands for it."""
        digits = self.chain.partition(":")[2][:32].upper()
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


@dataclass(frozen=True)
class SourceImage:
    """One image for one platform."""

    document: Document
    manifest: oci.Manifest
    config: dict[str, Any]
    layers: tuple[Archived, ...]  # bottom first
    entry: oci.Descriptor | None = None  # of the index that it came from

    @property
    def platform(self) -> oci.Platform:
        """As the index says, or else the config."""
        if self.entry and self.entry.platform:
            return self.entry.platform
        said = (self.config.get(key) for key in ("os", "architecture", "variant"))
        return oci.Platform(*(value if isinstance(value, str) else "" for value in said))


def read_image(depot: Depot, document: Document, entry: oci.Descriptor | None = None) -> SourceImage:
    """The image of a manifest. UsageError if it is none that has archives; CorruptImage if it contradicts itself."""
    name = f"{depot.name}@{document.digest}"
    try:
        manifest = oci.parse_manifest(document.body)
        if isinstance(manifest, oci.Index):
            raise FormatError("an index of indexes")
        if any(oci.is_overlaybd(layer) for layer in manifest.layers):
            raise UsageError(f"converting failed: {name}: it is a block image already")
        foreign = [layer.media_type for layer in manifest.layers if not _ARCHIVE.fullmatch(layer.media_type)]
        if foreign or not 0 < len(manifest.layers) <= LAYERS_MAX:
            raise UsageError(f"converting failed: {name}: {_why(foreign, len(manifest.layers))}")
        if manifest.config.size > oci.DOCUMENT_SIZE_MAX:
            raise FormatError(f"config of {manifest.config.size} bytes, at most {oci.DOCUMENT_SIZE_MAX}")
        with depot.opened(manifest.config) as read:
            body = b"".join(iter(lambda: read(oci.DOCUMENT_SIZE_MAX), b""))
        config = oci.load(body, "config")
        return SourceImage(document, manifest, config, _chained(manifest, _diff_ids(config)), entry)
    except FormatError as error:
        raise CorruptImage(f"reading an image failed: {name}: {error}") from None


def choose(
    depot: Depot, document: Document, platform: oci.Platform | None, *, strict: bool = False
) -> list[SourceImage]:
    """The image for a platform; for every one that a document has, if it is None.

    NotFound if there is none. An image that is the only one is taken whatever it is for, unless `strict`.
    """
    found = _choose(depot, document, platform)
    if strict and platform and not platform.accepts(found[0].platform):
        why = f"no image for {platform} (it is for {oci.shown(str(found[0].platform)) or 'none'})"
        raise NotFound(f"converting failed: {depot.name}@{document.digest}: {why}")
    return found


def _choose(depot: Depot, document: Document, platform: oci.Platform | None) -> list[SourceImage]:
    try:
        top = oci.parse_manifest(document.body)
        if isinstance(top, oci.Manifest):
            return [read_image(depot, document)]
        entries = top.images if platform is None else [_chosen(depot, top, platform)]
        if not entries:
            raise NotFound(f"converting failed: {depot.name}: its index has no images")
    except FormatError as error:
        raise CorruptImage(f"reading an image failed: {depot.name}@{document.digest}: {error}") from None
    return [read_image(depot, depot.document(entry.digest), entry) for entry in entries]


def _chosen(depot: Depot, index: oci.Index, platform: oci.Platform) -> oci.Descriptor:
    try:
        return index.choose(platform)
    except FormatError as error:
        raise NotFound(f"converting failed: {depot.name}: {error}") from None


def _why(foreign: list[str], count: int) -> str:
    if foreign:
        return f"its layers are no archives but {oci.shown(foreign[0])}"
    return f"it has {count} layers, at most {LAYERS_MAX} can be stacked" if count else "it has no layers"


def _diff_ids(config: dict[str, Any]) -> list[str]:
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or not all(isinstance(diff_id, str) for diff_id in found):
        raise FormatError("config.rootfs.diff_ids: want a list of digests")
    for diff_id in found:
        oci.parse_digest(diff_id)
    return found


def _chained(manifest: oci.Manifest, diff_ids: list[str]) -> tuple[Archived, ...]:
    if len(diff_ids) != len(manifest.layers):
        raise FormatError(f"{len(manifest.layers)} layers, but the config has {len(diff_ids)} diff_ids")
    layers: list[Archived] = []
    for blob, diff_id in zip(manifest.layers, diff_ids, strict=True):
        chain = diff_id
        if layers:
            chain = f"sha256:{hashlib.sha256(f'{layers[-1].chain} {diff_id}'.encode()).hexdigest()}"
        layers.append(Archived(blob, diff_id, chain))
    return tuple(layers)
