# SPDX-License-Identifier: Apache-2.0
"""Layers add up to the tree that unpacking them would make, attribute by attribute."""

from __future__ import annotations

import stat

import pytest

from blockdev.build.tree import Tree
from blockdev.errors import CorruptImage
from formats.archive import Archive
from formats.tree import Node
from tests.tars import (
    END,
    Contents,
    file,
    folder,
    hardlink,
    header,
    merged,
    names,
    paths,
    pax,
    reader,
    symlink,
)


def at(tree: Tree, path: bytes) -> Node:
    return dict(paths(tree.root))[path]


def refused(*layers: bytes, why: str) -> None:
    with pytest.raises(CorruptImage, match=f"cannot unpack the layer: layer {len(layers) - 1}: .*{why}"):
        merged(*layers)


# ---- one layer ----


def test_attributes_come_over_exactly() -> None:
    records = {
        b"mtime": b"-1.000000001",
        b"uid": b"4294967294",
        b"SCHILY.xattr.security.capability": b"\1\0\0\2\0\xff",
        b"SCHILY.xattr.system.posix_acl_access": b"\2\0\0\0",
        b"SCHILY.xattr.user.empty": b"",
        b"SCHILY.xattr.com.apple.provenance": b"no namespace of Linux",
    }
    tree = merged(pax(records) + file(b"f", b"xyz", mode=0o6751, gid=5) + header(b"c", b"3", major=4095, minor=0xFFFFF))
    node = at(tree, b"f")
    assert (node.mode, node.uid, node.gid, node.mtime_ns) == (stat.S_IFREG | 0o6751, 4294967294, 5, -1_000_000_001)
    assert (node.size, node.links) == (3, 1)
    assert node.xattrs == (
        (b"security.capability", b"\1\0\0\2\0\xff"),
        (b"system.posix_acl_access", b"\2\0\0\0"),
        (b"user.empty", b""),
    )
    assert (at(tree, b"c").mode, at(tree, b"c").device) == (stat.S_IFCHR | 0o644, (4095, 0xFFFFF))


def test_equal_xattrs_are_one_object() -> None:
    one = pax({b"SCHILY.xattr.user.x": b"same"})
    tree = merged(one + file(b"a") + one + file(b"b"))
    assert at(tree, b"a").xattrs is at(tree, b"b").xattrs


def test_paths_are_what_they_lead_to() -> None:
    tar = folder(b"./") + file(b"/abs") + file(b"./dot") + folder(b"d//e/") + file(b"d/./e/../f") + file(b"a/b/../../g")
    assert names(merged(tar)) == [b"abs", b"d", b"d/e", b"d/f", b"dot", b"g"]


def test_the_root_has_an_entry() -> None:
    tree = merged(folder(b"./", mode=0o700, uid=5, mtime=9))
    assert (tree.root.mode, tree.root.uid, tree.root.mtime_ns) == (stat.S_IFDIR | 0o700, 5, 9 * 10**9)
    for name in (b".", b"/", b"./", b"", b"x/.."):
        refused(symlink(name, b"/etc"), why="the root would become")


def test_missing_parents_are_made() -> None:
    tree = merged(file(b"a/b/c/f") + folder(b"a/b", mode=0o700))
    assert [oct(stat.S_IMODE(at(tree, path).mode)) for path in (b"a", b"a/b", b"a/b/c")] == ["0o755", "0o700", "0o755"]
    assert [node.links for _, node in paths(tree.root)] == [3, 3, 2, 1]
    assert tree.root.links == 3


def test_the_last_entry_of_a_name_wins() -> None:
    contents = Contents()
    files = file(b"x", b"one", uid=1) + file(b"x", b"three", uid=2) + symlink(b"y", b"t") + file(b"y", b"yy")
    folders = folder(b"z") + file(b"z/f") + symlink(b"z", b"gone") + folder(b"w") + file(b"w")
    tree = merged(files + folders, contents=contents)
    assert names(tree) == [b"w", b"x", b"y", b"z"]
    assert (at(tree, b"x").uid, contents.of(at(tree, b"x"))) == (2, b"three")
    types = [stat.S_IFMT(node.mode) for _, node in paths(tree.root)]
    assert types == [stat.S_IFREG, stat.S_IFREG, stat.S_IFREG, stat.S_IFLNK]
    assert tree.root.links == 2


def test_a_directory_over_a_directory_keeps_its_children_only() -> None:
    old = pax({b"SCHILY.xattr.user.old": b"x"}) + folder(b"d", mode=0o700, uid=3) + file(b"d/f")
    tree = merged(old, folder(b"d", mode=0o755, gid=4, mtime=2))
    assert names(tree) == [b"d", b"d/f"]
    node = at(tree, b"d")
    assert (node.mode & 0o7777, node.uid, node.gid, node.mtime_ns, node.xattrs) == (0o755, 0, 4, 2 * 10**9, ())


def test_hard_links_are_one_node() -> None:
    files = file(b"a", b"x", uid=1) + hardlink(b"d/b", b"./a", uid=9) + hardlink(b"c", b"/d/b")
    tree = merged(files + symlink(b"s", b"t") + hardlink(b"u", b"s"))
    assert at(tree, b"a") is at(tree, b"d/b") is at(tree, b"c")
    assert (at(tree, b"a").links, at(tree, b"a").uid) == (3, 1)
    assert at(tree, b"u") is at(tree, b"s")
    assert (at(tree, b"s").links, at(tree, b"s").target) == (2, b"t")


def test_links_are_counted_when_names_go() -> None:
    lower = file(b"a", b"x") + hardlink(b"d/b", b"a") + hardlink(b"d/e/c", b"a") + hardlink(b"z", b"a")
    assert at(merged(lower, file(b".wh.d")), b"a").links == 2
    assert at(merged(lower, file(b"z", b"new")), b"a").links == 3
    assert at(merged(lower, hardlink(b"z", b"a")), b"a").links == 4


def test_a_link_made_before_its_source_is_replaced_keeps_the_old_file() -> None:
    tree = merged(file(b"a", b"old"), hardlink(b"b", b"a") + file(b"a", b"newer"))
    assert (at(tree, b"b").size, at(tree, b"b").links, at(tree, b"a").size, at(tree, b"a").links) == (3, 1, 5, 1)


def test_links_lead_through_the_trees_own_symlinks() -> None:
    """An absolute target starts at the tree's root, and `..` stays there: as in a chroot."""
    links = symlink(b"bin", b"usr/bin") + symlink(b"abs", b"/usr/bin") + symlink(b"up", b"../../usr")
    upper = file(b"bin/a") + file(b"abs/b") + file(b"up/bin/c") + hardlink(b"up/d", b"abs/b")
    tree = merged(folder(b"usr/bin") + links, upper)
    below = [b"usr/bin", b"usr/bin/a", b"usr/bin/b", b"usr/bin/c", b"usr/d"]
    assert names(tree) == [b"abs", b"bin", b"up", b"usr", *below]
    assert at(tree, b"usr/d") is at(tree, b"usr/bin/b")


def test_a_dangling_link_on_the_way_leads_to_new_directories() -> None:
    tree = merged(symlink(b"l", b"not/here/../there") + file(b"l/f"))
    assert names(tree) == [b"l", b"not", b"not/there", b"not/there/f"]


def test_an_entry_replaces_a_link_and_does_not_follow_it() -> None:
    tree = merged(folder(b"d") + symlink(b"l", b"d") + folder(b"l") + file(b"l/f"))
    assert names(tree) == [b"d", b"l", b"l/f"]


def test_a_replaced_link_leads_nowhere_any_more() -> None:
    links = folder(b"d") + symlink(b"l", b"d") + file(b"l/1") + symlink(b"l", b"e") + file(b"l/2")
    tree = merged(links + folder(b"l") + file(b"l/3"))
    assert names(tree) == [b"d", b"d/1", b"e", b"e/2", b"l", b"l/3"]


# ---- whiteouts ----


def test_what_aufs_keeps_for_itself_is_left_out_but_for_what_links_name() -> None:
    kept = file(b"./.wh..wh.plnk/12.34", b"content", mode=0o4711) + file(b".wh..wh.plnk/5", b"unused")
    own = folder(b".wh..wh.plnk") + kept + folder(b"/.wh..wh.orph/") + file(b".wh..wh.orph/x/y") + file(b".wh..wh.aufs")
    links = hardlink(b"a", b".wh..wh.plnk/12.34") + hardlink(b"d/b", b"/.wh..wh.plnk/12.34") + file(b".wh..wh..opq")
    contents = Contents()
    tree = merged(file(b"lower"), own + links, contents=contents)
    assert names(tree) == [b"a", b"d", b"d/b"]
    assert at(tree, b"a") is at(tree, b"d/b")
    assert (at(tree, b"a").links, at(tree, b"a").mode & 0o7777) == (2, 0o4711)
    assert contents.of(at(tree, b"a")) == b"content"
    refused(own, links, why="which is not there")

LOWER = folder(b"d", uid=7) + file(b"d/f") + file(b"d/g") + folder(b"d/s") + file(b"d/s/x") + file(b"other")
ALL = [b"d", b"d/f", b"d/g", b"d/s", b"d/s/x", b"other"]


@pytest.mark.parametrize(
    ("upper", "left"),
    [
        (file(b"d/.wh.f"), [b"d", b"d/g", b"d/s", b"d/s/x", b"other"]),
        (file(b".wh.d"), [b"other"]),
        (
            file(b".wh.missing") + file(b"no/.wh.x") + file(b"d/.wh..wh.plnk"),
            [b"d", b"d/f", b"d/g", b"d/s", b"d/s/x", b"other"],
        ),
        (file(b"d/.wh..wh..opq"), [b"d", b"other"]),
        (file(b".wh..wh..opq"), []),
        (file(b"missing/.wh..wh..opq") + file(b"d/f/.wh..wh..opq") + file(b"d/f/.wh.x"), ALL),
        # What this layer has put stays, wherever in the tar the whiteout is.
        (file(b"d/f", b"new") + file(b"d/.wh.f"), ALL),
        (file(b"d/.wh.f") + file(b"d/f", b"new"), ALL),
        (file(b"d/s/new") + file(b"d/.wh..wh..opq"), [b"d", b"d/s", b"d/s/new", b"other"]),
        (file(b"d/.wh..wh..opq") + file(b"d/s/new"), [b"d", b"d/s", b"d/s/new", b"other"]),
        (file(b"d/s/new") + file(b".wh.d"), [b"d", b"d/s", b"d/s/new", b"other"]),
        (file(b".wh.d") + file(b"d/s/new"), [b"d", b"d/s", b"d/s/new", b"other"]),
        (file(b"d/new") + file(b"d/.wh..wh..opq") + file(b"d/two") + file(b".wh..wh..opq"), [b"d", b"d/new", b"d/two"]),
        (folder(b"d/s") + file(b"d/.wh.s"), [b"d", b"d/f", b"d/g", b"d/s", b"other"]),
        (hardlink(b"d/g", b"d/f") + file(b"d/.wh..wh..opq"), [b"d", b"d/g", b"other"]),
        # A directory that takes the place of one this layer has emptied is new again.
        (file(b"d/.wh..wh..opq") + file(b"d") + folder(b"d") + file(b"d/n"), [b"d", b"d/n", b"other"]),
        (
            symlink(b"l", b"d/s") + file(b"l/.wh.x") + file(b"l/y"),
            [b"d", b"d/f", b"d/g", b"d/s", b"d/s/y", b"l", b"other"],
        ),
        (folder(b"d/.wh.s"), [b"d", b"d/f", b"d/g", b"other"]),
    ],
)
def test_whiteouts_act_on_lower_layers_only(upper: bytes, left: list[bytes]) -> None:
    assert names(merged(LOWER, upper)) == left


def test_what_an_opaque_directory_keeps_of_itself() -> None:
    kept = merged(LOWER, file(b"d/.wh..wh..opq"))
    assert (at(kept, b"d").uid, at(kept, b"d").links, kept.root.links) == (7, 2, 3)
    assert at(merged(LOWER, file(b".wh.d") + file(b"d/n")), b"d").uid == 0


def test_whiteouts_of_the_lowest_layer_hide_nothing() -> None:
    assert names(merged(file(b"f") + file(b".wh.f") + file(b".wh..wh..opq") + file(b".wh.g") + file(b"g"))) == [
        b"f",
        b"g",
    ]


def test_a_whiteout_has_no_content() -> None:
    contents = Contents()
    merged(LOWER, file(b"d/.wh.f", b"content"), contents=contents)
    assert len(contents.files) == 1


@pytest.mark.parametrize("name", [b".wh.", b"d/.wh..", b"d/.wh..."])
def test_whiteouts_of_nothing_are_refused(name: bytes) -> None:
    refused(LOWER, file(name), why="whiteout of nothing")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("tar", "why"),
    [
        (file(b"../x"), "leads out of the tree"),
        (file(b"a/../../x"), "leads out of the tree"),
        (file(b"/../x"), "leads out of the tree"),
        (folder(b".."), "leads out of the tree"),
        (file(b"../.wh.x"), "leads out of the tree"),
        (file(b"../.wh..wh..opq"), "leads out of the tree"),
        (hardlink(b"x", b"../../etc/shadow"), "leads out of the tree"),
        (hardlink(b"x", b"missing"), "which is not there"),
        (hardlink(b"x", b"x"), "which is not there"),
        (hardlink(b"x", b"no/such"), "which is not there"),
        (file(b"x") + hardlink(b"x", b"./x"), "which is not there"),
        (file(b"d/x") + hardlink(b"d", b"d/x"), "which is not there"),
        (hardlink(b"x", b"/"), "which is not there"),
        (folder(b"d") + hardlink(b"x", b"d"), "a directory"),
        (symlink(b"s", b"/etc/shadow") + hardlink(b"x", b"s/y"), "which is not there"),
        (file(b"f") + file(b"f/below"), "f on the way is not a directory"),
        (file(b"f") + symlink(b"l", b"f") + file(b"l/below"), "f on the way is not a directory"),
        (symlink(b"l", b"l") + file(b"l/x"), "too many symbolic links"),
        (symlink(b"a", b"b/c") + symlink(b"b", b"a/c") + file(b"a/x"), "too many symbolic links"),
        (symlink(b"s", b""), "impossible length"),
        (pax({b"linkpath": b"x" * 4096}) + symlink(b"s", b""), "impossible length"),
        (pax({b"path": b"x" * 256}) + file(b""), "name of more than 255"),
        (pax({b"path": b"y" * 256 + b"/x"}) + file(b""), "name of more than 255"),
        (pax({b"path": b"y/" * 3000}) + file(b""), "path of more than 4095"),
        (pax({b"uid": b"4294967295"}) + file(b"x"), "impossible owner"),
        (pax({b"gid": b"9223372036854775807"}) + folder(b"x"), "impossible owner"),
        (header(b"x", b"3", major=4096), "impossible device"),
        (header(b"x", b"4", minor=1 << 20), "impossible device"),
        (pax({b"SCHILY.xattr.": b"x"}) + file(b"x"), "impossible extended attribute"),
        (pax({b"SCHILY.xattr.user." + b"n" * 251: b"x"}) + file(b"x"), "impossible extended attribute"),
        (pax({b"SCHILY.xattr.user.x": bytes(65537)}) + file(b"x"), "impossible extended attribute"),
        (header(b"x", b"Z"), "unknown tar entry type"),
        (file(b"ok") + header(b"x")[:-1] + b"!", "tar header is damaged .at byte 512."),
    ],
)
def test_what_cannot_be_is_one_error(tar: bytes, why: str) -> None:
    refused(file(b"lower"), tar, why=why)


def test_an_error_names_path_and_place() -> None:
    with pytest.raises(CorruptImage) as caught:
        merged(file(b"ok") + file(b"a/\xff\n/../../../x"))
    assert str(caught.value) == (
        "cannot unpack the layer: layer 0: a/\\xff\\n/../../../x: path leads out of the tree (at byte 512)"
    )


def test_layers_in_any_piece_size_are_the_same_tree() -> None:
    tar = LOWER + END
    for piece in (1, 511, 513):
        tree = Tree()
        tree.apply(Archive(reader(tar, piece)), Contents())
        assert names(tree) == names(merged(tar))
