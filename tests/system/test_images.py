# SPDX-License-Identifier: Apache-2.0
"""Real images, converted: mounted they are what umoci unpacks, to the last attribute, and their programs run.

The large ones are converted under --full, and leave figures in docs/measured/images.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockdev.root import Root
from tests import images, requires
from tests.registries import Registry
from tests.trees import fsck

LIMIT = float(requires.scaled(120, 1800))  # seconds for one command
MIB = 1 << 20
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


@pytest.fixture(scope="module")
def figures() -> dict[str, object]:
    """What was seen of each image."""
    return {}


def convert(words: list[str | Path], figures: dict[str, object]) -> dict[str, Any]:
    """Run the command; what it prints. Time and memory are noted."""
    started = time.monotonic()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as converting:
        assert converting.stdout
        printed = converting.stdout.read()
        _, status, used = os.wait4(converting.pid, 0)
        converting.returncode = os.waitstatus_to_exitcode(status)
    assert converting.returncode == 0
    found: dict[str, Any] = json.loads(printed)
    (image,) = found["images"]
    figures |= {
        "convert_seconds": round(time.monotonic() - started, 1),
        "convert_rss_mib": used.ru_maxrss >> 10,
        "layers": len(image["layers"]),
        "layers_mib": round(sum(layer["size"] for layer in image["layers"]) / MIB, 1),
    }
    return found


def check_disk(does: Callable[..., str], image: str, folder: Path) -> None:
    """The file system's own checker finds nothing."""
    does("export", image, "-o", folder / "disk")
    fsck(folder / "disk")
    (folder / "disk").unlink()


def run_programs(shape: images.Shape, mount: Path) -> None:
    for program in shape.programs:
        subprocess.run(["chroot", mount, *program], check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)


@pytest.mark.timeout(requires.scaled(300, 7200))
def test_a_converted_image_is_what_umoci_unpacks_and_its_programs_run(
    shape: images.Shape,
    unpack: Callable[[str], Path],
    does: Callable[..., str],
    registry: Registry,
    tmp_path: Path,
    ociblk: str,
    root: Root,
    figures: dict[str, object],
    record_measured: Callable[[str, dict[str, object]], None],
) -> None:
    requires.requires_mount()
    requires.requires_command("skopeo", "fsck.erofs")
    source = images.image(shape.name)
    rootfs, mount = unpack(source), tmp_path / "mount"
    pushed = images.push(source, registry.host, "app")
    target = f"{registry.host}/blocks:1"
    seen: dict[str, object] = {}
    convert([ociblk, "convert", pushed, target, "--plain-http", "--json", "--root", root.path], seen)
    found = json.loads(does("verify", pushed, target, "--plain-http", "--json"))
    assert found["entries"] > found["files"] > 300
    assert shape.name != "large" or not requires.FULL or (found["files"] > FILES and found["content"] > 1 << 30)
    mount.mkdir()
    does("mount", target, mount, "--plain-http", "-o", "dev")  # programs want /dev/null
    try:
        does("verify", rootfs, mount)
        run_programs(shape, mount)
    finally:
        does("umount", mount)
    check_disk(does, target, tmp_path)
    figures[shape.name] = {**seen, **{key: found[key] for key in ("entries", "files", "content")}}
    record_measured("images", figures)


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
