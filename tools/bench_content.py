# SPDX-License-Identifier: Apache-2.0
"""What is read in a bench: a disk of real files, in every form the servers need.

The files are those of the Debian packages on this machine, in an order of no meaning, then
those of .venv, until there are enough; they make an ext4 file system. As an image it has
three layers, whose borders are 60 % and 90 % of the disk; and in each MiB a piece that
comes from an upper layer hides another piece below, as changed files do.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
CODECS = ("lz4", "zstd")
BORDERS = (0.6, 0.9)  # where the disk's second and third layer begin
HIDDEN = 16 << 10  # bytes of each MiB that an upper layer hides
SEED = 20240229
PAGE = 4096
INODE = 256  # bytes
INODES_SPARE = 1000
SPARE = 1.05  # of the disk over its files: directories and tables of the file system
ROOT = Path(__file__).parent.parent
PACKAGE_LISTS = Path("/var/lib/dpkg/info")
LARGE_FILE = MIB  # the mounted file system is read in files from this size
LARGE_FILES = 64  # how many of them at most: fio keeps each open


@dataclass(frozen=True)
class Content:
    """One disk and its other forms."""

    size: int
    sha256: str
    raw: Path
    qcow2: Path  # compressed clusters, zstd
    layers: dict[str, list[Path]]  # by codec, bottom first, each in the tar wrapper
    large_files: list[str]  # paths in the file system


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_content(folder: Path, files_bytes: tuple[int, int], ociblk: str, kept: Path | None) -> Content:
    """All forms of a disk with so many bytes of files (at least, at most), in folder.

    The disk itself, which no code of ours has made, is kept in `kept` for later benches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = kept / f"disk-{files_bytes[1] // MIB}" if kept else folder / "disk"
    if not home.exists():
        new = home.with_name(f"{home.name}.{os.getpid()}")
        new.mkdir(parents=True)
        large_files = _make_file_system(new / "tree", new / "raw", files_bytes)
        (new / "large-files").write_text("\n".join(large_files))
        new.rename(home)
    raw, qcow2 = home / "raw", folder / "disk.qcow2"
    command = ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", raw, qcow2]
    subprocess.run(command, check=True)
    parts = [folder / f"part{number}.raw" for number in range(len(BORDERS) + 1)]
    _split(raw, parts)
    layers = {codec: [folder / f"{codec}{number}.tar" for number in range(len(parts))] for codec in CODECS}
    for codec, outputs in layers.items():
        for part, output in zip(parts, outputs, strict=True):
            command = [ociblk, "import", part, "-o", output, "--codec", codec, "--tar"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for part in parts:
        part.unlink()
    large_files = (home / "large-files").read_text().splitlines()
    return Content(raw.stat().st_size, sha256_file(raw), raw, qcow2, layers, large_files)


def files() -> Iterator[Path]:
    """Regular files of packages, then those of .venv."""
    lists = sorted(PACKAGE_LISTS.glob("*.list"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    for names in lists:
        for name in names.read_text().splitlines():
            path = Path(name)
            if name.startswith(("/usr/", "/lib/", "/bin/")) and path.is_file() and not path.is_symlink():
                yield path
    for path in sorted((ROOT / ".venv").rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix != ".pyc":
            yield path


def _make_file_system(tree: Path, raw: Path, files_bytes: tuple[int, int]) -> list[str]:
    """Copy files into a tree and make a file system of it; the names of large files in it."""
    copied, count, large = 0, 0, []
    for path in files():
        target = tree / path.relative_to("/")
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
        size = target.stat().st_size
        copied += -(-size // PAGE) * PAGE
        count += 1
        if size >= LARGE_FILE and ":" not in str(path):  # fio's separator
            large.append(str(path.relative_to("/")))
        if copied >= files_bytes[1]:
            break
    if copied < files_bytes[0]:
        raise SystemExit(f"tools/bench: this machine has only {copied // MIB} MiB of package files")
    inodes = INODES_SPARE + 2 * count  # directories too
    with raw.open("wb") as disk:
        disk.truncate(int((copied + inodes * INODE) * SPARE) // MIB * MIB + 16 * MIB)
    command = ["mkfs.ext4", "-q", "-b", str(PAGE), "-m", "0", "-N", str(inodes), "-O", "^has_journal", "-d", tree, raw]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return large[:LARGE_FILES]


def _split(raw: Path, parts: list[Path]) -> None:
    """Distribute the disk over one sparse file for each layer."""
    size = raw.stat().st_size
    rng = random.Random(SEED)
    files = [part.open("wb") for part in parts]
    with raw.open("rb") as disk:
        older = disk.read(HIDDEN)
        for offset in range(0, size, MIB):
            disk.seek(offset)
            piece = disk.read(MIB)
            layer = sum(offset >= border * size for border in BORDERS)
            hidden = rng.randrange(MIB // HIDDEN) * HIDDEN
            if layer + 1 < len(files) and any(piece[hidden : hidden + HIDDEN]):
                _put(files[layer + 1], offset + hidden, piece[hidden : hidden + HIDDEN])
                # A page of zeros above would show what lies below: it is left as it is there too.
                below = [
                    old if any(new) else new
                    for old, new in zip(_pages(older), _pages(piece[hidden : hidden + HIDDEN]), strict=True)
                ]
                older = piece[hidden : hidden + HIDDEN]
                piece = piece[:hidden] + b"".join(below) + piece[hidden + HIDDEN :]
            _put(files[layer], offset, piece)
    for file in files:
        file.truncate(size)
        file.close()


def _pages(piece: bytes) -> list[bytes]:
    return [piece[at : at + PAGE] for at in range(0, len(piece), PAGE)]


def _put(file: object, offset: int, piece: bytes) -> None:
    for number, page in enumerate(_pages(piece)):
        if any(page):
            os.pwrite(file.fileno(), page, offset + number * PAGE)  # type: ignore[attr-defined]
