# SPDX-License-Identifier: Apache-2.0
"""Layers applied to a directory leave there what their tree says, whatever one changes of the other."""

from __future__ import annotations

import io
import os
import random
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockdev.build.apply import Applied, Staged
from blockdev.build.compare import compare
from blockdev.build.folder import Folder
from blockdev.build.layout import Layout
from blockdev.build.plain import plain
from blockdev.build.tree import Tree
from blockdev.build.unpacked import Unpacked
from blockdev.errors import BlockdevError
from formats import oci
from formats.archive import Archive
from formats.errors import FormatError
from formats.ext4 import TIME_MAX
from formats.tree import Node
from tests import images, requires

Build = Callable[[tarfile.TarFile], None]

NAMES = ("a", "b", "c")
MEMBERS = 12  # of a random layer


@pytest.fixture
def top(tmp_path: Path) -> Path:
    requires.requires_root()
    top = tmp_path / "top"
    top.mkdir()
    return top


def apply_layers(top: Path, layout: Layout) -> Iterator[Applied]:
    """Apply the layers of an image one by one."""
    manifest = oci.parse_manifest(layout.document("").body)
    assert isinstance(manifest, oci.Manifest)
    tree, applied = Tree(), Applied()
    for layer in manifest.layers:
        staged = Staged(top, tree.root)
        with layout.opened(layer) as read:
            tree.apply(Archive(plain(read)), staged.store)
        applied.apply(tree.root, staged)
        yield applied


def check_layers(top: Path, folder: Path, layers: list[Build]) -> None:
    """After each layer, the directory is what the layers so far add up to."""
    for count in range(1, len(layers) + 1):
        made = images.Layout(folder / str(count))
        for build in layers[:count]:
            with made.layer() as tar:
                build(tar)
        made.finish()
    whole = Layout.parse(str(folder / str(len(layers))))
    for count, _ in enumerate(apply_layers(top, whole), 1):
        part = Layout.parse(str(folder / str(count)))
        manifest = oci.parse_manifest(part.document("").body)
        assert isinstance(manifest, oci.Manifest)
        compare(Unpacked(part.name, part, manifest), Folder(str(top)))


def member(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **more: object) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.mode = kind, mode
    for attribute, value in more.items():
        setattr(found, attribute, value)
    return found


def add(tar: tarfile.TarFile, found: tarfile.TarInfo, content: bytes = b"") -> None:
    found.size = len(content)
    tar.addfile(found, io.BytesIO(content))


def random_layer(rng: random.Random) -> Build:
    """Files, links, directories, whiteouts under few names, so that they meet."""

    def build(tar: tarfile.TarFile) -> None:
        add(tar, member("./", tarfile.DIRTYPE, 0o755, mtime=rng.randrange(1 << 31)))
        files: list[str] = []
        for _ in range(MEMBERS):
            name = "/".join(rng.choice(NAMES) for _ in range(rng.randint(1, 3)))
            if any(name.startswith(f"{file}/") for file in files):
                continue
            more = {"mtime": rng.randrange(1 << 31), "uid": rng.randrange(3), "gid": rng.randrange(3)}
            what = rng.randrange(8)
            if what < 3:
                headers = {"SCHILY.xattr.user.x": str(rng.randrange(2))} if rng.randrange(2) else {}
                found = member(name, mode=rng.choice((0o644, 0o4755)), pax_headers=headers, **more)
                add(tar, found, rng.choice((b"", b"one", b"two" * 5000)))
                files.append(name)
            elif what == 3:
                add(tar, member(name, tarfile.DIRTYPE, rng.choice((0o755, 0o2700)), **more))
            elif what == 4 and files:
                add(tar, member(f"{name}-linked", tarfile.LNKTYPE, linkname=rng.choice(files)))
            elif what == 5:
                add(tar, member(f"{name}-fifo", tarfile.FIFOTYPE, **more))
            else:
                head, _, last = name.rpartition("/")
                add(tar, member(f"{head}/.wh.{last}" if head else f".wh.{last}"))

    return build


@pytest.mark.parametrize("seed", range(requires.scaled(12, 1000)))
def test_random_layers_leave_what_their_tree_says(top: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    # Each is built several times, and has to be the same each time.
    seeds = [rng.randrange(1 << 30) for _ in range(4)]
    layers: list[Build] = [lambda tar, seed=seed: random_layer(random.Random(seed))(tar) for seed in seeds]
    try:
        check_layers(top, tmp_path / "images", layers)
    except BlockdevError as error:
        # A link to what the layer itself has replaced is refused by the tree.
        assert "cannot unpack the layer" in str(error)  # noqa: PT017


def test_a_file_whose_names_all_change_stays_one_file(top: Path, tmp_path: Path) -> None:
    def first(tar: tarfile.TarFile) -> None:
        add(tar, member("./", tarfile.DIRTYPE, 0o755))
        add(tar, member("old"), b"content")
        add(tar, member("stays"), b"other")

    def second(tar: tarfile.TarFile) -> None:
        add(tar, member("new", tarfile.LNKTYPE, linkname="old"))
        add(tar, member(".wh.old"))

    check_layers(top, tmp_path / "images", [first, second])
    assert sorted(path.name for path in top.iterdir()) == ["new", "stays"]


def test_what_is_made_in_a_directory_with_a_default_acl_has_the_layers_own_xattrs_only(
    top: Path, tmp_path: Path
) -> None:
    entries = [(1, 7, -1), (2, 5, 3), (4, 5, -1), (16, 7, -1), (32, 5, -1)]
    acl = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, mode, who in entries
    )

    def first(tar: tarfile.TarFile) -> None:
        add(tar, member("./", tarfile.DIRTYPE, 0o755))
        header = {"SCHILY.xattr.system.posix_acl_default": acl.decode("utf-8", "surrogateescape")}
        add(tar, member("d", tarfile.DIRTYPE, 0o755, pax_headers=header))

    def second(tar: tarfile.TarFile) -> None:
        add(tar, member("d/e", tarfile.DIRTYPE, 0o755))
        add(tar, member("d/f", tarfile.FIFOTYPE))

    check_layers(top, tmp_path / "images", [first, second])
    assert os.listxattr(top / "d") == ["system.posix_acl_default"]


def test_the_directory_of_contents_does_not_take_an_images_name(top: Path, tmp_path: Path) -> None:
    def first(tar: tarfile.TarFile) -> None:
        add(tar, member("./", tarfile.DIRTYPE, 0o755))
        add(tar, member(".staged-0"), b"an image's own")

    def second(tar: tarfile.TarFile) -> None:
        add(tar, member(".staged-1"), b"this, too")

    check_layers(top, tmp_path / "images", [first, second])
    assert sorted(path.name for path in top.iterdir()) == [".staged-0", ".staged-1"]


def test_holes_stay_holes(top: Path) -> None:
    staged = Staged(top, Tree().root)
    number = staged.store(1 << 30, iter([(0, b"start"), (1 << 20, b"middle")]))
    found = Path(os.fsdecode(staged.place(number)))
    assert (found.stat().st_size, found.stat().st_blocks * 512 < 1 << 20) == (1 << 30, True)
    assert stat.S_IMODE(found.stat().st_mode) == 0o600


def test_a_time_that_ext4_cannot_hold_is_refused(top: Path) -> None:
    tree = Tree()
    staged = Staged(top, tree.root)
    tree.root.mtime_ns = (TIME_MAX + 1) * 10**9
    with pytest.raises(FormatError, match=f"'/': ext4 has no room for the time {TIME_MAX + 1}"):
        Applied().apply(tree.root, staged)


def test_nothing_becomes_free_before_all_that_is_new_is_there(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether ext4 takes a free inode again depends on the moment."""
    calls: list[str] = []
    for name in ("unlink", "rmdir", "mkdir", "mknod", "symlink"):
        call = getattr(os, name)

        def noted(*words: Any, name: str = name, call: Any = call, **options: Any) -> None:
            calls.append(name)
            call(*words, **options)

        monkeypatch.setattr(os, name, noted)

    def children(*names: str) -> dict[bytes, Node]:
        made = {name.encode(): Node(stat.S_IFDIR | 0o755, links=2, children={}) for name in names}
        made |= {f"{name}-link".encode(): Node(stat.S_IFLNK | 0o777, target=b"x") for name in names}
        return {**made, b"file": Node(stat.S_IFREG | 0o644)}

    applied, root = Applied(), Node(stat.S_IFDIR | 0o755, links=2, children=children("a", "b"))
    applied.apply(root, Staged(top, root))
    staged = Staged(top, root)
    root.children = children("b", "c")
    calls.clear()
    applied.apply(root, staged)
    made = [place for place, name in enumerate(calls) if name not in ("unlink", "rmdir")]
    assert min(calls.index("unlink"), calls.index("rmdir")) > made[-1]
    assert sorted(path.name for path in top.iterdir()) == ["b", "b-link", "c", "c-link", "file"]
