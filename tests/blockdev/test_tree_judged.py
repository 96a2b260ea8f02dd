# SPDX-License-Identifier: Apache-2.0
"""The tree that layers add up to is what others make of them: overlaybd's fixtures, GNU tar, umoci."""

from __future__ import annotations

import os
import stat
import subprocess
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from blockdev.build.plain import plain
from blockdev.build.tree import Tree
from blockdev.errors import CorruptImage
from formats.archive import Archive
from formats.tree import Node
from tests.images import TAG, Layout
from tests.requires import requires_command, requires_fixtures, requires_root, scaled
from tests.tars import Contents, file, folder, hardlink, header, merged, paths, symlink
from tests.trees import SECOND, Listing, difference, listing, mounted


def said(tree: Tree, contents: Contents) -> Listing:
    """All that a merged tree says, the root's own attributes left out."""
    found = listing(tree.root, {node: contents.of(node) for _, node in paths(tree.root)})
    del found[b""]
    return found


def unpacked(place: Path) -> Listing:
    """What lies in a folder of this machine, each directory's links as a tree counts them: not all kernels do."""
    found = mounted(place)
    for path, facts in found.items():
        if stat.S_ISDIR(int(facts["mode"], 8)):
            below = os.scandir(os.fsencode(place) + path)
            facts["links"] = 2 + sum(entry.is_dir(follow_symlinks=False) for entry in below)
    del found[b""]
    return found


# ---- overlaybd ----

_LETTERS = dict(
    zip((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK), "fdlpcb", strict=True)
)
LOST = (  # by the reference
    ("1600000000.000000000 'etc/mtime'", "1600000000.123456789 'etc/mtime'"),
    ("0:0 mtime=1700000000.000000000 'etc/uid-big'", "3000000:4000000 mtime=1700000000.000000000 'etc/uid-big'"),
)


def _line(path: bytes, node: Node, contents: Contents) -> str:
    """A line as the fixtures' manifests have it."""
    seconds, nanoseconds = divmod(node.mtime_ns, SECOND)
    letter = _LETTERS[stat.S_IFMT(node.mode)]
    line = f"{letter} {stat.S_IMODE(node.mode):#o} {node.uid}:{node.gid} mtime={seconds}.{nanoseconds:09}"
    line += f" {path.decode()!r} "
    if letter == "f":
        line += f"size={node.size} sha256={sha256(contents.of(node)).hexdigest()} nlink={node.links}"
    elif letter == "l":
        line += f"-> {node.target.decode()}"
    elif letter in "bc":
        line += f"dev={node.device[0]},{node.device[1]}"
    return line + (f" xattr={[(name.decode(), value.hex()) for name, value in node.xattrs]}" if node.xattrs else "")


def test_the_reference_layers_give_their_manifests() -> None:
    """All but what the reference loses: a fraction of a second, and owners beyond 2097151."""
    home = requires_fixtures() / "04-apply-ext4"
    tree, contents = Tree(), Contents()
    for i in (1, 2, 3):
        with (home / f"layer{i}.tar.zst").open("rb") as blob:
            tree.apply(Archive(plain(blob.read)), contents)
        text = (home / f"v64m-{i}layer.manifest.txt").read_text()
        for lost, exact in LOST:
            assert lost in text
            text = text.replace(lost, exact)
        found = [_line(path, node, contents) for path, node in paths(tree.root)]
        assert sorted(found) == sorted(text.splitlines())


# ---- GNU tar ----


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything."""
    requires_root()
    place = tmp_path_factory.mktemp("sample")
    deep = place / "d" / ("n" * 200) / "e"
    deep.mkdir(parents=True)
    (deep / ("long" * 20)).write_bytes(b"deep")
    for i in range(30):
        (place / "d" / f"f{i}").write_bytes(b"%d\n" % i * 7 * i)
    os.link(place / "d" / "f3", place / "d" / "hard")
    (place / "link").symlink_to("x" * 180)
    os.link(place / "link", place / "hardlink-of-link", follow_symlinks=False)
    os.mknod(place / "char", stat.S_IFCHR | 0o640, os.makedev(10, 70000))
    os.mkfifo(place / "fifo")
    (place / "set").write_bytes(b"x")
    (place / "set").chmod(0o4711)
    (place / "d").chmod(0o2775)
    os.chown(place / "d" / "f4", 70000, 2_000_000)
    with (place / "sparse").open("wb") as sparse:
        for offset in range(0, 40 << 16, 2 << 16):
            sparse.seek(offset)
            sparse.write(b"%d" % offset)
        sparse.truncate(5 << 20)
    Path(os.fsdecode(os.fsencode(place) + b"/\xff\xfe")).write_bytes(b"not UTF-8")
    os.utime(place / "d" / "f5", ns=(0, 1_600_000_000_123_456_789))
    os.utime(place / "d" / "f6", ns=(0, -1_500_000_000))
    return place


def packed(place: Path, *options: str) -> bytes:
    """What GNU tar makes of a folder."""
    requires_command("tar")
    command = ["tar", "-C", place, "--numeric-owner", *options, "-cf", "-", "."]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--format=gnu",),
        ("--format=gnu", "--sparse"),
        ("--format=posix",),
        *(("--format=posix", "--sparse", f"--sparse-version={version}") for version in ("0.0", "0.1", "1.0")),
    ],
    ids=" ".join,
)
def test_what_gnu_tar_packs_comes_out_as_it_was(sample: Path, options: tuple[str, ...]) -> None:
    contents = Contents()
    tree = merged(packed(sample, *options), contents=contents)
    expected = unpacked(sample)
    if "--format=gnu" in options:  # which has whole seconds
        for facts in expected.values():
            facts["mtime"] = facts["mtime"] // SECOND * SECOND
    assert not difference(said(tree, contents), expected)


def test_gnu_tars_xattrs_come_out_as_they_were(tmp_path: Path) -> None:
    requires_root()
    (tmp_path / "f").write_bytes(b"x")
    os.setxattr(tmp_path / "f", "trusted.binary", b"\0\xff=\n" * 50)
    tree = merged(packed(tmp_path, "--xattrs", "--xattrs-include=*"))
    assert dict(paths(tree.root))[b"f"].xattrs == ((b"trusted.binary", b"\0\xff=\n" * 50),)


# ---- umoci ----

SEEDS = 8  # of a test; each makes an image
NOW = 1_750_000_000 * SECOND  # later than any time in these layers


def _path(random: Random) -> bytes:
    return b"/".join(random.choice((b"a", b"b", b"c")) for _ in range(random.randint(1, 3)))


def _entry(random: Random) -> bytes:
    """Something, so that what comes later has much to replace and to hide."""
    path = _path(random)
    at = {"mtime": random.randint(1, 10**9), "uid": random.randint(0, 9), "gid": random.randint(0, 9)}
    below, slash, name = path.rpartition(b"/")
    targets = [_path(random), b"/" + _path(random), b"../" + _path(random), b"../../../" + _path(random), b"."]
    entries = [
        *[file(path, b"%d" % random.randint(0, 5) * random.randint(0, 3), mode=random.choice((0o644, 0o4755)), **at)]
        * 3,
        *[folder(path, mode=random.choice((0o755, 0o700, 0o1777)), **at)] * 3,
        *[symlink(path, random.choice(targets), **at)] * 2,
        *[hardlink(path, _path(random), **at)] * 2,
        header(path, b"6", **at),
        *[file(below + slash + b".wh." + name, **at)] * 2,
        file(path + b"/.wh..wh..opq", **at),
    ]
    return random.choice(entries)


def _layer(random: Random, lower: list[bytes]) -> bytes:
    """Entries that can be applied over the lower layers, and now and then one that cannot."""
    layer = b""
    for _ in range(random.randint(1, 12)):
        entry = _entry(random)
        if random.random() < 0.01 or _merged_or_none([*lower, layer + entry], Contents()) is not None:
            layer += entry
    return layer


def _merged_or_none(layers: list[bytes], contents: Contents) -> Tree | None:
    try:
        return merged(*layers, contents=contents)
    except CorruptImage:
        return None


def by_umoci(place: Path, layers: list[bytes]) -> Listing | None:
    """What umoci unpacks, None if it refuses to."""
    layout = Layout(place / "layout")
    for layer in layers:
        with layout.layer() as tar:
            assert tar.fileobj is not None
            tar.fileobj.write(layer)
    layout.finish()
    command = ["umoci", "raw", "unpack", "--image", f"{place / 'layout'}:{TAG}", place / "rootfs"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return unpacked(place / "rootfs") if done.returncode == 0 else None


@pytest.mark.parametrize("first", range(0, scaled(48, 4000), SEEDS))
def test_random_layers_are_what_umoci_unpacks(first: int, tmp_path: Path) -> None:
    """Replaced, linked, hidden and brought back in any order, through links and over several layers."""
    requires_root()
    requires_command("umoci")
    for seed in range(first, first + SEEDS):
        random = Random(seed)
        layers: list[bytes] = []
        for _ in range(random.randint(1, 4)):
            layers.append(_layer(random, layers))
        contents = Contents()
        tree = _merged_or_none(layers, contents)
        place = tmp_path / f"{seed}"
        place.mkdir()
        expected = by_umoci(place, layers)
        assert (tree is None) == (expected is None), f"seed {seed}"
        if tree is None or expected is None:
            continue
        found = said(tree, contents)
        for path, facts in expected.items():
            # umoci gives a directory that no entry is for the present time, and one that it makes a directory in, too.
            if path in found and facts["mtime"] > NOW and stat.S_ISDIR(int(facts["mode"], 8)):
                facts["mtime"] = found[path]["mtime"]
        assert not difference(found, expected), f"seed {seed}"
