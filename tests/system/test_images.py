# SPDX-License-Identifier: Apache-2.0
"""Real images: what they add up to is what umoci unpacks, to the last attribute."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev.root import Root
from tests import images, requires

LIMIT = float(requires.scaled(120, 1800))  # seconds for one command
FILES = 30_000  # of the large image, in earnest


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[[str], Path]:
    """unpack(oci: image): the root file system that umoci makes of it."""
    requires.requires_root()
    requires.requires_command("umoci")

    def unpack(source: str) -> Path:
        bundle = tmp_path / "bundle"
        command = ["umoci", "unpack", "--image", source.removeprefix("oci:"), str(bundle)]
        subprocess.run(command, check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)
        return bundle / "rootfs"

    return unpack


@pytest.fixture
def does(ociblk: str, root: Root) -> Callable[..., str]:
    """does(words): what the command prints; it has to succeed."""

    def does(*words: str | Path) -> str:
        command = [ociblk, *map(str, words), "--root", str(root.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return does


@pytest.fixture(params=sorted(images.SHAPES))
def shape(request: pytest.FixtureRequest) -> images.Shape:
    """Each of the images."""
    return images.SHAPES[request.param]


def test_the_layers_add_up_to_what_umoci_unpacks(
    shape: images.Shape, unpack: Callable[[str], Path], does: Callable[..., str]
) -> None:
    source = images.image(shape.name)
    found = json.loads(does("verify", source, unpack(source), "--json"))
    assert found["entries"] > found["files"] > 300
    assert shape.name != "large" or not requires.FULL or (found["files"] > FILES and found["content"] > 1 << 30)


def test_a_difference_ends_verify_with_its_name_and_5(
    unpack: Callable[[str], Path], ociblk: str, tmp_path: Path
) -> None:
    source = images.image("shell")
    rootfs = unpack(source)
    os.chown(rootfs / "odd/capable", 0, 7)
    command = [ociblk, "verify", source, rootfs, "--root", tmp_path / "root"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (5, "")
    assert found.stderr == f"ociblk: comparing failed: '/odd/capable': group: 0 in {source}, 7 in {rootfs}\n"
