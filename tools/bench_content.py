# SPDX-License-Identifier: Apache-2.0
"""What is read in a bench: one disk, made from a seed, in every form the servers need.

The disk is made of 4 KiB pages: text-like ones, incompressible ones and zeros, so that
lz4 and zstd have something to do and holes occur. The same seed gives the same bytes, so
a row can be repeated elsewhere; its sha256 is recorded with the figures.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
TEXT, NOISE = 0.55, 0.30  # share of pages; the rest is zero
POOL_PAGES = 8192  # distinct text pages: 32 MiB, far past any codec's window
RUN_PAGES = 16  # neighbours are of one kind, as in files
SEED = 20240229


@dataclass(frozen=True)
class Content:
    """One disk and its other forms."""

    size: int
    sha256: str
    raw: Path
    qcow2: Path  # compressed clusters, zstd
    layers: dict[str, Path]  # by codec, in the tar wrapper


def _text_page(rng: random.Random, words: list[bytes]) -> bytes:
    page = b" ".join(rng.choices(words, k=PAGE // 4))
    return page[:PAGE]


def write_disk(path: Path, size: int) -> None:
    """The disk of SEED with this size."""
    rng = random.Random(SEED)
    words = [rng.randbytes(rng.randrange(3, 12)).hex().encode() for _ in range(4000)]
    pool = [_text_page(rng, words) for _ in range(POOL_PAGES)]
    zeros = bytes(PAGE * RUN_PAGES)
    with path.open("wb") as disk:
        for _ in range(size // len(zeros)):
            kind = rng.random()
            if kind < TEXT:
                disk.write(b"".join(rng.choices(pool, k=RUN_PAGES)))
            elif kind < TEXT + NOISE:
                disk.write(rng.randbytes(len(zeros)))
            else:
                disk.write(zeros)


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
