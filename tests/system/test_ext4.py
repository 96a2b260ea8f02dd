# SPDX-License-Identifier: Apache-2.0
"""convert --fs ext4: the kernel's own ext4, layer by layer, clean, and the same each time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockdev.root import Root
from tests import images, leaks, ordinary, requires
from tests.commands import Run, until

LIMIT = float(requires.scaled(120, 3600))  # seconds for one command
SHAPES = ("shell", "large") if requires.FULL else ("shell",)

Does = Callable[..., str]


@pytest.fixture
def does(ociblk: str, root: Root) -> Does:
    """does(words): what the command prints; it has to succeed."""
    requires.requires_mount()
    requires.requires_command("mkfs.ext4", "e2fsck")

    def does(*words: str | Path) -> str:
        command = [ociblk, *map(str, words), "--root", str(root.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return does


def layers_of(converted: str) -> list[dict[str, Any]]:
    (image,) = json.loads(converted)["images"]
    found: list[dict[str, Any]] = image["layers"]
    return found


def convert(does: Does, source: str, target: Path) -> list[dict[str, Any]]:
    return layers_of(does("convert", source, f"oci:{target}:1", "--fs", "ext4", "--json"))


@pytest.mark.timeout(requires.scaled(300, 7200))
@pytest.mark.parametrize("name", SHAPES)
def test_an_ext4_image_is_its_source_and_clean_and_its_programs_run(
    does: Does, tmp_path: Path, name: str, record_measured: Callable[[str, dict[str, object]], None]
) -> None:
    source, mount = images.image(name), tmp_path / "mount"
    started = time.monotonic()
    layers = convert(does, source, tmp_path / "target")
    seconds = time.monotonic() - started
    mount.mkdir()
    does("mount", f"oci:{tmp_path}/target:1", mount, "-o", "dev")  # programs want /dev/null
    try:
        found = json.loads(does("verify", source, mount, "--json"))
        for program in images.SHAPES[name].programs:
            subprocess.run(["chroot", mount, *program], check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)
    finally:
        does("umount", mount)
    does("export", f"oci:{tmp_path}/target:1", "-o", tmp_path / "disk")
    checked = subprocess.run(["e2fsck", "-fn", tmp_path / "disk"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    size = sum(layer["size"] for layer in layers)
    figures = {"convert_seconds": round(seconds, 1), "layers": len(layers), "layers_mib": round(size / (1 << 20), 1)}
    record_measured(f"ext4-{name}", {**figures, **{key: found[key] for key in ("entries", "files", "content")}})


def test_an_ext4_image_comes_out_the_same_again(does: Does, root: Root, tmp_path: Path) -> None:
    source = images.image("shell")
    first = convert(does, source, tmp_path / "first")
    # The second time from nothing, the third time on from the second layer.
    shutil.rmtree(root.path / "converted")
    second = convert(does, source, tmp_path / "second")
    forgotten = [layer["digest"].encode() for layer in first[2:]]
    for record in list((root.path / "converted").iterdir()):
        if any(digest in record.read_bytes() for digest in forgotten):
            record.unlink()
    third = convert(does, source, tmp_path / "third")
    digests = [[layer["digest"] for layer in layers] for layers in (first, second, third)]
    assert digests[0] == digests[1] == digests[2]
    assert [layer["reused"] for layer in third] == [True, True, False, False]


def test_layers_over_an_ext4_that_was_made_anew_are_made_anew(does: Does, root: Root, tmp_path: Path) -> None:
    source = images.image("shell")
    layers = convert(does, source, tmp_path / "first")
    (record,) = [
        path for path in (root.path / "converted").iterdir() if layers[1]["digest"].encode() in path.read_bytes()
    ]
    # As if it had come out differently: a record of other blocks.
    content = json.loads(record.read_text())
    content["written"]["state"] = f"{'0' * 64}{content['written']['state'][64:]}"
    record.write_text(json.dumps(content))
    again = convert(does, source, tmp_path / "second")
    assert [layer["reused"] for layer in again] == [True, True, False, False]


_UNFIT = {
    "a value beyond a block": ({"SCHILY.xattr.user.x": "x" * 60_000}, "'user.x' of 60000 bytes", tarfile.REGTYPE),
    "an attribute of a link": ({"SCHILY.xattr.user.x": "x"}, "'user.x' of 1 bytes", tarfile.SYMTYPE),
    "a time too far": ({"mtime": "20000000000"}, "no room for the time 20000000000", tarfile.REGTYPE),
}


@pytest.mark.parametrize("unfit", _UNFIT)
def test_what_ext4_cannot_hold_is_named_as_the_image_has_it(
    run: Run, root: Root, tmp_path: Path, unfit: str
) -> None:
    requires.requires_mount()
    requires.requires_command("mkfs.ext4")
    headers, why, kind = _UNFIT[unfit]
    source = ordinary.make(
        tmp_path / "source",
        lambda tar: ordinary.add(tar, "etc/it", type=kind, linkname="there", pax_headers=headers),
    )
    done = run("convert", f"oci:{source}", f"oci:{tmp_path}/target", "--fs", "ext4")
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert f"{ordinary.digests(source)[0]}: '/etc/it': " in done.stderr
    assert why in done.stderr
    assert str(root.path) not in done.stderr


def test_only_root_can_convert_to_ext4(ociblk: str, tmp_path: Path) -> None:
    requires.requires_root()
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    command = [ociblk, "convert", f"oci:{tmp_path}", f"oci:{home}/x", "--fs", "ext4", "--root", home / "root"]
    refused = subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 4
    assert "--fs ext4: only root can mount" in refused.stderr


def is_writing(converting: subprocess.Popen[bytes], root: Root) -> bool:
    """Whether the process has an ext4 of its own mounted."""
    assert converting.poll() is None
    lines = Path(f"/proc/{converting.pid}/mountinfo").read_text().splitlines()
    return any(f" {root.path}/ext4-" in line and " - ext4 " in line for line in lines)


def test_a_killed_conversion_leaves_no_mount_and_no_loop_device(ociblk: str, root: Root, tmp_path: Path) -> None:
    requires.requires_mount()
    source = images.image("large")
    command = [ociblk, "convert", source, f"oci:{tmp_path}/target:1", "--fs", "ext4", "--root", str(root.path)]
    converting = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        assert until(lambda: is_writing(converting, root))
        assert leaks.mounts(Path(root.path)) == []  # nobody else sees them
    finally:
        converting.kill()
        converting.wait()
    assert until(lambda: leaks.loops(Path(root.path)) == [])
    # What is left is no more than empty files; and the next conversion does not mind.
    assert sum(path.stat().st_size for path in root.path.glob("ext4-*/*") if path.is_file()) == 0
