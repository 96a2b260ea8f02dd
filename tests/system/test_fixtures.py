# SPDX-License-Identifier: Apache-2.0
"""What overlaybd's own tools made, read through the commands: export, serve and mount say the same."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import fixtures, requires
from tests.commands import COMMAND_WAIT, WAIT

ROWS = fixtures.rows("01", "02", "03", "05")
TIB = 1 << 40
HUGE = fixtures.DATA / "huge-4t.lsmt"
HUGE_DATA = [(0, 512), (3 * TIB + 4096, 4096), (4 * TIB - 512, 512)]
PIECE = 1 << 20
HOLE_WHOLE_FILE = 256 << 20  # a larger disk is hashed through its map


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, ociblk: str) -> Iterator[list[str]]:
    """The command on one root, whose owner serves the whole module."""
    root = tmp_path_factory.mktemp("root")
    yield [ociblk, "--root", str(root)]
    subprocess.run([ociblk, "--root", str(root), "daemon", "--stop", "--force"], check=True, timeout=WAIT)


def run(commands: list[str], *words: str | Path) -> str:
    done = subprocess.run(
        [*commands, *map(str, words)], capture_output=True, text=True, check=False, timeout=COMMAND_WAIT
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@contextmanager
def mounted(commands: list[str], *words: str | Path) -> Iterator[Path]:
    """A mount of the given words, the last of which is where; undone whatever happens."""
    run(commands, "mount", *words)
    try:
        yield Path(words[-1])
    finally:
        run(commands, "umount", words[-1])


def image_of(row: fixtures.Row, folder: Path) -> Path:
    """One IMAGE argument for a row: its layer, or a config.v1.json that names its layers."""
    if row.kind == "config":
        config = folder / "config.v1.json"
        config.write_bytes(fixtures.config(row.paths[0]))
        return config
    layers = [fixtures.folder() / path for path in row.paths]
    if len(layers) == 1:
        return layers[0]
    config = folder / "config.v1.json"
    config.write_text(json.dumps({"repoBlobUrl": "", "lowers": [{"file": str(layer)} for layer in layers]}))
    return config


def digest_of(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file; holes are not read from it."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        done = 0
        while done < size:
            data = _next_data(file.fileno(), done, size)
            while done < data:
                step = min(PIECE, data - done)
                digest.update(bytes(step))
                done += step
            if done < size:
                piece = os.pread(file.fileno(), PIECE, done)
                digest.update(piece)
                done += len(piece)
    return size, digest.hexdigest()


def _next_data(fd: int, offset: int, size: int) -> int:
    if size < HOLE_WHOLE_FILE:
        return offset
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:
        return size


def served(commands: list[str], image: Path, folder: Path) -> Path:
    """The disk, copied by nbdcopy from a serve of the image."""
    out = folder / "copied"
    socket = folder / "socket"
    with subprocess.Popen([*commands, "serve", str(image), "--socket", str(socket)], stdout=subprocess.PIPE) as serving:
        assert serving.stdout
        uri = serving.stdout.readline().decode().strip()
        subprocess.run(["nbdcopy", uri, str(out)], check=True, timeout=COMMAND_WAIT)
        serving.terminate()
        assert serving.wait(WAIT) == 0
    return out


def test_the_fixtures_are_there() -> None:
    assert fixtures.folder()
    assert len(ROWS) > 50


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_export_serve_and_mount_show_the_listed_disk(row: fixtures.Row, commands: list[str], tmp_path: Path) -> None:
    requires.requires_mount()
    requires.requires_command("nbdcopy")
    image = image_of(row, tmp_path)
    expected = (row.size, row.sha256)
    run(commands, "export", image, "-o", tmp_path / "exported")
    assert digest_of(tmp_path / "exported") == expected
    assert digest_of(served(commands, image, tmp_path)) == expected
    with mounted(commands, "--raw", image, tmp_path / "mounted") as file:
        assert digest_of(file) == expected


def test_a_4_tib_disk_has_its_map_and_sectors_everywhere(commands: list[str], tmp_path: Path) -> None:
    requires.requires_mount()
    requires.requires_command("nbdinfo")
    exported, socket = tmp_path / "exported", tmp_path / "socket"
    run(commands, "export", HUGE, "-o", exported)
    raw = mounted(commands, "--raw", HUGE, tmp_path / "mounted")
    with raw as file, open(exported, "rb") as one, open(file, "rb") as other:
        for offset in (0, 2 * TIB, 3 * TIB + 4096, 4 * TIB - 512):
            assert os.pread(one.fileno(), 512, offset) == os.pread(other.fileno(), 512, offset)
        assert os.pread(other.fileno(), 512, 2 * TIB) == bytes(512)
        assert os.lseek(other.fileno(), 512, os.SEEK_DATA) == HUGE_DATA[1][0]
    with subprocess.Popen([*commands, "serve", str(HUGE), "--socket", str(socket)], stdout=subprocess.PIPE) as serving:
        assert serving.stdout
        uri = serving.stdout.readline().decode().strip()
        text = subprocess.run(["nbdinfo", "--map", "--json", uri], check=True, capture_output=True, text=True).stdout
        serving.terminate()
    assert [(e["offset"], e["length"]) for e in json.loads(text) if e["type"] == 0] == HUGE_DATA


# ---- 04: what the kernel's mount shows ----


def manifest_line(path: Path, name: str) -> str:
    """One entry, written as the fixtures' manifests write it."""
    found = path.lstat()
    kind = stat.filemode(found.st_mode)[0].replace("-", "f")
    mtime = f"{found.st_mtime_ns // 10**9}.{found.st_mtime_ns % 10**9:09d}"
    mode = oct(stat.S_IMODE(found.st_mode))
    line = f"{kind} {mode} {found.st_uid}:{found.st_gid} mtime={mtime} {name!r} "
    if kind == "l":
        return line + f"-> {path.readlink()}"
    if kind == "f":
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        line += f"size={found.st_size} sha256={digest} nlink={found.st_nlink}"
    if kind in "bc":
        return line + f"dev={os.major(found.st_rdev)},{os.minor(found.st_rdev)}"
    attributes = sorted((key, os.getxattr(path, key).hex()) for key in os.listxattr(path))
    return line + (f" xattr={attributes}" if attributes else "")


def manifest_of(top: Path) -> list[str]:
    lines = []
    for path in top.rglob("*"):
        name = path.relative_to(top)
        if name.parts[0] != "lost+found":
            lines.append(manifest_line(path, str(name)).rstrip())
    return sorted(lines)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_ext4_stack_mounts_as_its_manifest_says(layers: int, commands: list[str], tmp_path: Path) -> None:
    requires.requires_mount()
    name = f"04-apply-ext4/v64m-{layers}layer"
    expected = (fixtures.folder() / f"{name}.manifest.txt").read_text().splitlines()
    config, mnt = tmp_path / "config.v1.json", tmp_path / "mnt"
    config.write_bytes(fixtures.config(f"{name}.config.json"))
    mnt.mkdir()
    with mounted(commands, config, mnt):
        assert manifest_of(mnt) == sorted(line.rstrip() for line in expected)
