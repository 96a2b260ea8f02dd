# SPDX-License-Identifier: Apache-2.0
"""What is read in a bench: the disk of tests/bench/disk.py in every form the servers need."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.bench.disk import disk_pieces


@dataclass(frozen=True)
class Content:
    """One disk and its other forms."""

    size: int
    sha256: str
    raw: Path
    qcow2: Path  # compressed clusters, zstd
    layers: dict[str, Path]  # by codec, in the tar wrapper


def write_disk(path: Path, size: int) -> None:
    """A sparse file, so that its holes are known to every server."""
    with path.open("wb") as disk:
        for piece in disk_pieces(size):
            if any(piece):
                disk.write(piece)
            else:
                disk.seek(len(piece), os.SEEK_CUR)
        disk.truncate(size)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_content(folder: Path, size: int, ociblk: str) -> Content:
    """All forms of the disk of this size, in folder. Made anew each time: our own layers
    must be those of the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, qcow2 = folder / "disk.raw", folder / "disk.qcow2"
    write_disk(raw, size)
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", raw, qcow2], check=True)
    layers = {codec: folder / f"{codec}.tar" for codec in ("none", "lz4", "zstd")}
    for codec, layer in layers.items():
        command = [ociblk, "import", raw, "-o", layer, "--codec", codec, "--tar"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Content(size, sha256_file(raw), raw, qcow2, layers)
