# SPDX-License-Identifier: Apache-2.0
"""OCI image layout directories: `oci-layout`, `index.json`, and blobs by digest.

Values only: the caller reads the files. Tags are annotations of the index.
"""

from __future__ import annotations

from formats.errors import FormatError
from formats.oci import Descriptor, Index, load, parse_digest, parse_manifest, shown, text

MARKER = "oci-layout"
INDEX = "index.json"
REF_NAME = "org.opencontainers.image.ref.name"


def check_marker(marker: bytes) -> None:
    """FormatError unless the bytes of `oci-layout` name a version that is known."""
    version = text(load(marker, MARKER), "imageLayoutVersion", MARKER)
    if not version.startswith("1."):
        raise FormatError(f"{MARKER}: version {shown(version)}, only 1.x is known")


def parse_index(document: bytes) -> Index:
    """The index that `index.json` is."""
    index = parse_manifest(document)
    if not isinstance(index, Index):
        raise FormatError(f"{INDEX}: a manifest, not an index")
    return index


def choose_tag(index: Index, tag: str | None) -> Descriptor:
    """What the layout has under a tag; without one, all it has if that is one image, or `latest`.

    What only says something about another image (it has an artifact type) does not count.
    """
    images = [manifest for manifest in index.manifests if not manifest.artifact_type]
    if tag is None and len(images) == 1:
        return images[0]
    wanted = tag or "latest"
    for manifest in index.manifests:
        if manifest.annotations.get(REF_NAME) == wanted:
            return manifest
    offered = sorted({manifest.annotations.get(REF_NAME, "") for manifest in index.manifests} - {""})
    raise FormatError(f"no image tagged {shown(wanted)} in the layout (it has {', '.join(offered[:10]) or 'no tags'})")


def blob_path(digest: str) -> str:
    """Where a layout directory keeps a blob."""
    return "blobs/" + "/".join(parse_digest(digest))
