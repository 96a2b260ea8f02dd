# SPDX-License-Identifier: Apache-2.0
"""What the two names that `verify SRC DST` takes stand for: directories, ordinary images, block images."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from blockdev.build.compare import Side
from blockdev.build.depot import Depot
from blockdev.build.folder import Folder
from blockdev.build.unmounted import Unmounted
from blockdev.build.unpacked import Unpacked
from blockdev.cli import text
from blockdev.cli.depots import Depots
from blockdev.cli.disk import opened_disk
from blockdev.errors import CorruptImage, NotFound
from blockdev.origin import LAYOUT_PREFIX, locate, own_platform
from formats import oci
from formats.errors import FormatError


class Sides:
    """Opens what is to be compared, until `undo`."""

    def __init__(self, args: argparse.Namespace, undo: ExitStack) -> None:
        self._args = args
        self._undo = undo
        self._depots = Depots(args, undo)

    def open(self, name: str) -> Side:
        """All names and attributes of a side are read; of an ordinary image the contents, too."""
        if name.startswith(LAYOUT_PREFIX):
            return self._image(name)
        if name and Path(name).is_dir():
            return Folder(name)
        with locate(name) as origin:
            reference = origin.reference
        return self._image(name) if reference else self._disk(name)

    def _image(self, name: str) -> Side:
        depot = self._depots.depot(name)
        try:
            manifest = _manifest(depot)
        except FormatError as error:
            raise CorruptImage(f"reading a manifest failed: {name}: {error}") from None
        if any(oci.is_overlaybd(layer) for layer in manifest.layers):
            return self._disk(name)
        return Unpacked(name, depot, manifest, text.progress(f"read {name}:"))

    def _disk(self, name: str) -> Side:
        origin = self._undo.enter_context(locate(name))
        return Unmounted(name, self._undo.enter_context(opened_disk(self._args, origin)))


def _manifest(depot: Depot) -> oci.Manifest:
    """That of the image for this machine, where there are several."""
    found = oci.parse_manifest(depot.document("").body)
    if isinstance(found, oci.Index):
        try:
            chosen = found.choose(own_platform())
        except FormatError as error:
            raise NotFound(f"opening the image failed: {depot.name}: {error}") from None
        found = oci.parse_manifest(depot.document(chosen.digest).body)
    if isinstance(found, oci.Index):
        raise FormatError("an index of indexes")
    return found
