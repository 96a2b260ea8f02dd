# SPDX-License-Identifier: Apache-2.0
"""ociblk ls and cat: of a layer file, a config and a registry's image, without rights and without a mount."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from blockdev.root import Root
from formats.tree import Node
from tests import requires
from tests.commands import Run
from tests.registries import Registry
from tests.trees import ACL, Disk, directory, rich

BIG = os.urandom(3 << 20)
LISTING = r"""
drwxr-xr-x   2     0     0         27 1970-01-01 00:00:00 d
brw-rw----   1     0     6      8, 17 1970-01-01 00:00:00 disk
-rwsr-xr-x   2  1000 3000000    3145728 2023-01-01 00:00:00 file
lrwxrwxrwx   1     0     0          4 1970-01-01 00:00:00 link -> file
-rw-r--r--   1     0     0          0 1969-12-31 23:59:59 new\nline\x1b\xff\\
-rwsr-xr-x   2  1000 3000000    3145728 2023-01-01 00:00:00 twice
-rw-r--r--   1     0     0          0   @9223372036854775 éa
"""


def tree(disk: Disk) -> Node:
    file = disk.file(BIG, mode=0o4755, uid=1000, gid=3_000_000, links=2, mtime_ns=1_672_531_200 * 10**9 + 5)
    late = disk.file(mtime_ns=9_223_372_036_854_775 * 10**9)
    late.xattrs = ((b"system.posix_acl_access", ACL), (b"user.\xff", b"\0"))
    children = {
        b"d": directory(),
        b"disk": Node(stat.S_IFBLK | 0o660, gid=6, device=(8, 17)),
        b"file": file,
        b"twice": file,
        b"link": Node(stat.S_IFLNK | 0o777, target=b"file"),
        b"new\nline\x1b\xff\\": disk.file(mtime_ns=-1),
        "\u00e9a".encode(): late,
    }
    return directory(
        {b"top": directory(children), b"usr": directory({b"bin": Node(stat.S_IFLNK, target=b"/top/d/..")})}
    )


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory, ociblk: str) -> Path:
    folder = tmp_path_factory.mktemp("layer")
    disk = Disk(folder / "disk")
    disk.finish(tree(disk))
    subprocess.run([ociblk, "import", disk.path, "-o", folder / "layer", "--tar"], check=True)
    return folder / "layer"


def entries(run: Run, *words: str) -> dict[str, dict[str, Any]]:
    answer = run("ls", *words, "--json")
    assert answer.returncode == 0, answer.stderr
    return {entry["path"]: entry for entry in json.loads(answer.stdout)["entries"]}


def cat(ociblk: str, image: str | Path, *paths: str, under: tuple[str, ...] = (), root: Path) -> bytes:
    """sha256 of what it writes."""
    command = [*under, ociblk, "cat", image, *paths, "--root", root]
    answer = subprocess.run(command, capture_output=True, check=True)
    assert answer.stderr == b""
    return sha256(answer.stdout).digest()


def test_ls_prints_lines_as_ls_does(run: Run, layer: Path) -> None:
    answer = run("ls", layer, "/top")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout == LISTING.lstrip("\n")


def test_ls_as_json_has_every_attribute(run: Run, layer: Path) -> None:
    found = entries(run, str(layer), "top")
    assert found["/top/disk"]["device"] == [8, 17]
    assert found["/top/file"]["mtime_ns"] == 1_672_531_200 * 10**9 + 5
    assert found["/top/file"]["mode"] == "4755"
    assert found["/top/file"]["inode"] == found["/top/twice"]["inode"]
    assert found["/top/link"] | {"target": "file", "type": "link"} == found["/top/link"]
    assert found["/top/\u00e9a"]["xattrs"] == {"system.posix_acl_access": ACL.hex(), "user.\udcff": "00"}
    assert "/top/new\nline\x1b\udcff\\" in found


def test_ls_follows_links_within_the_image_and_names_one_file(run: Run, layer: Path) -> None:
    assert run("ls", layer, "/usr/bin").stdout == run("ls", layer, "/top").stdout
    assert list(entries(run, str(layer), "../../usr/bin/link")) == ["/../../usr/bin/link"]
    assert run("ls", layer).stdout.split("\n")[0].endswith(" top")


def test_ls_of_all_below(run: Run, layer: Path) -> None:
    lines = run("ls", layer, "-R").stdout.split("\n")
    assert [line for line in lines if line.startswith("/")] == ["/:", "/top:", "/top/d:", "/usr:"]
    assert len(entries(run, str(layer), "-R")) == 10


def test_cat_streams_the_bytes_with_no_right_that_root_has(ociblk: str, layer: Path, tmp_path: Path) -> None:
    """No capability is left, so nothing is mounted; no owner is started."""
    requires.requires_command("setpriv")
    bare = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    found = cat(ociblk, layer, "/top/link", "top/file", under=bare, root=tmp_path / "none")
    assert found == sha256(BIG + BIG).digest()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("cat", "/no"), 3, "/no: no such file"),
        (("cat", "/top/file", "/no"), 3, "/no: no such file"),
        (("cat", "/top/file/"), 3, "no such file"),
        (("cat", "/top"), 2, "/top: it is a directory"),
        (("cat", "/top/disk"), 2, "no regular file"),
        (("ls", "/top/no"), 3, "/top/no: no such file"),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_no_output(
    run: Run, layer: Path, words: tuple[str, ...], code: int, why: str
) -> None:
    answer = run(words[0], layer, *words[1:])
    assert (answer.returncode, answer.stdout) == (code, "")
    assert why in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_a_config_and_a_registrys_image_are_the_same(
    run: Run, ociblk: str, root: Root, registry: Registry, layer: Path, tmp_path: Path
) -> None:
    reference = f"{registry.host}/app:1"
    assert run("push", layer, reference).returncode == 0
    config = tmp_path / "config.v1.json"
    config.write_text(json.dumps({"lowers": [{"file": str(layer)}]}))
    for image in (str(config), reference):
        assert run("ls", image, "/top").stdout == LISTING.lstrip("\n")
        assert cat(ociblk, image, "/top/link", root=root.path) == sha256(BIG).digest()
        assert run("cat", image, "/no").returncode == 3


def test_another_file_system_is_named(run: Run, tmp_path: Path) -> None:
    requires.requires_command("mkfs.ext4")
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 4 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    assert run("import", disk, "-o", tmp_path / "layer").returncode == 0
    for command in (("ls",), ("cat", "x")):
        answer = run(command[0], tmp_path / "layer", *command[1:])
        assert (answer.returncode, answer.stdout) == (2, "")
        assert "its file system is ext4; only EROFS" in answer.stderr


def test_a_rich_tree_is_listed_to_the_last_name(run: Run, ociblk: str, tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk")
    disk.finish(rich(disk, 300))
    subprocess.run([ociblk, "import", disk.path, "-o", tmp_path / "layer"], check=True)
    found = entries(run, str(tmp_path / "layer"), "-R")
    text = run("ls", tmp_path / "layer", "-R").stdout
    lines = [line for line in text.split("\n") if line and not line.startswith("/")]
    assert len(lines) == len(found)
