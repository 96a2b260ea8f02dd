# SPDX-License-Identifier: Apache-2.0
"""A small ordinary image in an image layout, and looking into layouts."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formats.layout import blob_path
from tests.images import Layout

TIME = 1_700_000_000

Fill = Callable[[tarfile.TarFile], None]


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: Any) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = len(content), TIME, 0o644
    for key, value in fields.items():
        setattr(entry, key, value)
    tar.addfile(entry, io.BytesIO(content))


def lower(tar: tarfile.TarFile) -> None:
    chance = random.Random(1)
    add(tar, "etc", type=tarfile.DIRTYPE, mode=0o755)
    add(tar, "etc/name", b"lower\n", uid=7, gid=8, mode=0o640)
    add(tar, "etc/gone", b"gone\n")
    add(tar, "bin/tool", chance.randbytes(300_000), mode=0o4755)
    add(tar, "bin/same", type=tarfile.LNKTYPE, linkname="bin/tool")
    add(tar, "data", bytes(2 << 20) + chance.randbytes(1 << 20))
    add(tar, "again", chance.randbytes(1 << 20))


def upper(tar: tarfile.TarFile) -> None:
    chance = random.Random(1)
    add(tar, "etc/name", b"upper\n", mtime=TIME + 1)
    add(tar, "etc/.wh.gone")
    add(tar, "copy", chance.randbytes(300_000))
    add(tar, "link", type=tarfile.SYMTYPE, linkname="etc/name")


def make(folder: Path, *layers: Fill) -> Path:
    """A layout with an image of these layers, tagged TAG."""
    layout = Layout(folder)
    for fill in layers:
        with layout.layer() as tar:
            fill(tar)
    layout.finish()
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    """What the first image of a layout is: a manifest or an index."""
    return document(folder, json.loads((folder / "index.json").read_bytes())["manifests"][0]["digest"])


def document(folder: Path, digest: str) -> dict[str, Any]:
    """A JSON blob of a layout."""
    found: dict[str, Any] = json.loads((folder / blob_path(digest)).read_bytes())
    return found


def digests(folder: Path) -> list[str]:
    """Of a layout's image, its layers."""
    return [layer["digest"] for layer in manifest(folder)["layers"]]
