# SPDX-License-Identifier: Apache-2.0
"""Two registries have an image of one digest, and one of them has altered a byte of its layer where it is stored."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import requires
from tests.commands import Run, devices, until
from tests.registries import Registry

MIB = 1 << 20
PLACE = 5 * MIB  # in the middle of the disk, which no opening reads


@dataclass(frozen=True)
class Two:
    """The image as each registry names it, and the disk as each has it."""

    good: str
    evil: str
    right: bytes
    wrong: bytes


@pytest.fixture
def two(tmp_path: Path, ociblk: str, registries: Callable[[], Registry]) -> Iterator[Two]:
    right = random.Random(12).randbytes(10 * MIB)
    wrong = right[:PLACE] + bytes([right[PLACE] ^ 1]) + right[PLACE + 1 :]
    (tmp_path / "disk").write_bytes(right)
    layer, root = tmp_path / "layer", tmp_path / "pusher"
    subprocess.run([ociblk, "import", tmp_path / "disk", "-o", layer, "--codec", "none"], check=True)
    places = [registries(), registries()]
    names = [f"{place.host}/app:1" for place in places]
    for name in names:
        command = [ociblk, "push", layer, name, "--root", root]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (stored,) = [path for path in places[1].storage.rglob("data") if path.stat().st_size > MIB]
    content = stored.read_bytes()
    at = content.index(right[PLACE : PLACE + 64])
    stored.write_bytes(content[:at] + wrong[PLACE : PLACE + 64] + content[at + 64 :])
    yield Two(names[0], names[1], right, wrong)
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", root], check=True)


def read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(PLACE)
        return file.read(4096)


def test_mounted_together_each_reads_its_own(two: Two, run: Run, tmp_path: Path) -> None:
    requires.requires_mount()
    good, evil = tmp_path / "good", tmp_path / "evil"
    assert run("mount", "--raw", two.good, good, "--on-error", "hang").returncode == 0
    assert run("mount", "--raw", two.evil, evil).returncode == 0
    assert read(good) == two.right[PLACE:][:4096]
    assert read(evil) == two.wrong[PLACE:][:4096]
    assert run("pull", two.good, "--complete").returncode == 0
    assert read(good) == two.right[PLACE:][:4096]
    assert run("umount", good).returncode == 0
    assert run("umount", evil).returncode == 0
    assert run("mount", "--raw", two.evil, evil).returncode == 0
    assert read(evil) == two.right[PLACE:][:4096], "what has been verified is everybody's"
    assert run("umount", evil).returncode == 0


def test_what_one_has_left_is_not_the_others(two: Two, run: Run, tmp_path: Path) -> None:
    requires.requires_mount()
    file = tmp_path / "file"
    for name, disk in ((two.evil, two.wrong), (two.good, two.right)):
        assert run("mount", "--raw", name, file).returncode == 0
        assert read(file) == disk[PLACE:][:4096]
        assert run("umount", file).returncode == 0
        assert until(lambda: devices(run) == [])
        assert run("daemon", "--stop").returncode == 0
