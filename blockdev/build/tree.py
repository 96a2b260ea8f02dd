# SPDX-License-Identifier: Apache-2.0
"""The file system that layers' tars add up to.

Layers are applied bottom first. What follows from a layer is what `umoci unpack` makes of it,
where the image specification leaves it open: the last entry of a name wins; a directory over
a directory keeps its children and takes the new attributes; anything else replaces what was
there; whiteouts act on lower layers only, wherever in the tar they stand.

No path leads out of the tree. `..` that would climb out of it is refused, in a path as in the
name a hard link is for. A symbolic link on the way is followed as in a chroot: an absolute
target starts at the root of the tree, and `..` stays there.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator

from blockdev.errors import CorruptImage
from formats.archive import Archive, Kind, Member
from formats.errors import FormatError
from formats.tree import Node, Xattrs

Store = Callable[[int, Iterator[tuple[int, bytes | memoryview]]], int]

NAME_MAX = 255
PATH_MAX = 4095  # of a directory, and of a symbolic link's target: Linux takes no longer ones
_ID_MAX = 0xFFFF_FFFE  # the next one is "no id" to the kernel
_MAJOR_MAX = 0xFFF
_MINOR_MAX = 0xF_FFFF
_SIZE_MAX = 16 << 40  # bytes of a file: what a disk of 2^32 blocks could hold
_XATTR_NAME_MAX = 255
_XATTR_VALUE_MAX = 1 << 16
_NAMESPACES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default")
_LINKS_FOLLOWED = 40  # symbolic links in one path; Linux's own limit
# Bytes of targets that are followed: this once for each layer, and so many again for each of its members.
# A few compressed bytes can ask for 160 KB of it, and no image in use needs a tenth of this.
_FOLLOWED_ONCE = 4 << 20
_FOLLOWED_EACH = 1 << 10
_NEW_DIRECTORY = stat.S_IFDIR | 0o755  # one that the tar has no entry for

# What all names of a tree may take, each with its inode: five million of them. Far beyond any
# image in use, and what keeps a few compressed bytes from filling the machine.
_MEMORY_MAX = 2 << 30
_NAME_COST = 400

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."  # what AUFS keeps for itself at the root of a layer
_AUFS_LINKS = b".wh..wh.plnk"  # files that hard links of the layer may be for
_PLACES_KEPT = 1024
_SHOWN = 300  # bytes of a path in a message

_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHARACTER: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
}
_NONE: frozenset[bytes] = frozenset()


class Tree:
    """The merged tree of the layers applied so far. For one thread; useless after an error."""

    def __init__(self) -> None:
        self.root = Node(_NEW_DIRECTORY, links=2, children={})
        self.memory = 0  # an estimate, in bytes
        self.xattrs: dict[Xattrs, Xattrs] = {}  # as in the tars -> what the tree keeps, once for all that are equal
        self._layers = 0

    def apply(self, archive: Archive, store: Store, layer: str = "layer") -> None:
        """Lay a tar over the tree. CorruptImage names `layer`, its fault and where in the tar it is.

        `store(size, content)` is called for each regular file that is not empty, and answers
        where its content starts on the disk; `content` are (offset, bytes), holes left out.
        """
        merge = _Merge(self, store)
        merge.over_lower = self._layers > 0
        self._layers += 1
        try:
            for member in archive:
                merge.add(member, archive)
        except FormatError as error:
            raise CorruptImage(f"cannot unpack the layer: {layer}: {error}") from error


class _Merge:
    """One layer on its way into the tree."""

    def __init__(self, tree: Tree, store: Store) -> None:
        self.over_lower = False
        self._tree = tree
        self._store = store
        self._places: dict[bytes, Node] = {}  # directories by the path that led there
        self._upper: dict[Node, set[bytes]] = {}  # names that this layer has put, and those on the way to them
        self._aufs_links: dict[bytes, Node] = {}
        self._follow_left = _FOLLOWED_ONCE  # bytes of targets
        self._cleared: set[Node] = set()  # directories with nothing of lower layers left in them

    def add(self, member: Member, archive: Archive) -> None:
        """One member, whose content is read from the archive."""
        self._follow_left += _FOLLOWED_EACH
        if _AUFS in member.path and self._is_aufs(member, archive):
            return
        head, name = _split(member)
        if name.startswith(_WHITEOUT):
            self._hide(head, name, member)
            return
        if not name:
            if member.kind is not Kind.DIRECTORY:
                raise FormatError("the root would become something else than a directory", member.offset)
            self._describe(self._tree.root, member)
            return
        directory = self._directory(head, member)
        if member.kind is Kind.DIRECTORY:
            self._add_directory(directory, name, member)
            return
        if name in _children(directory):
            self._remove(directory, name)
        if member.kind is Kind.HARDLINK:
            node = self._linked(member)
            node.links += 1
        else:
            node = self._made(member, archive)
        self._put(directory, name, node, member)

    # ---- nodes ----

    def _made(self, member: Member, archive: Archive) -> Node:
        node = Node(_TYPES[member.kind] | member.mode)
        self._describe(node, member)
        if member.kind is Kind.FILE:
            if member.size > _SIZE_MAX:
                raise _refused(f"file of {member.size} bytes, more than 16 TiB", member)
            node.size = member.size
            node.block = self._store(member.size, archive.content()) if member.size else 0
        elif member.kind is Kind.SYMLINK:
            if not 0 < len(member.link) <= PATH_MAX:
                raise _refused("symbolic link to a name of impossible length", member)
            node.mode = stat.S_IFLNK | 0o777
            node.target = member.link
        elif member.kind is not Kind.FIFO:
            if member.device[0] > _MAJOR_MAX or member.device[1] > _MINOR_MAX:
                raise _refused("impossible device number", member)
            node.device = member.device
        return node

    def _add_directory(self, directory: Node, name: bytes, member: Member) -> None:
        node = _children(directory).get(name)
        if node is None or node.children is None:
            if node is not None:
                self._remove(directory, name)
            node = Node(_NEW_DIRECTORY, links=2, children={})
            self._put(directory, name, node, member)
        else:
            self._mark(directory, name)
        self._describe(node, member)

    def _describe(self, node: Node, member: Member) -> None:
        """The attributes that all kinds have."""
        if member.uid > _ID_MAX or member.gid > _ID_MAX:
            raise _refused("impossible owner", member)
        node.mode = stat.S_IFMT(node.mode) | member.mode
        node.uid = member.uid
        node.gid = member.gid
        node.mtime_ns = member.mtime_ns
        node.xattrs = self._xattrs(member) if member.xattrs else ()

    def _xattrs(self, member: Member) -> Xattrs:
        """One object for all that are equal. Names that Linux has no namespace for cannot be set there: left out."""
        kept = self._tree.xattrs.get(member.xattrs)
        if kept is None:
            for name, value in member.xattrs:
                if not 0 < len(name) <= _XATTR_NAME_MAX or b"\0" in name or len(value) > _XATTR_VALUE_MAX:
                    raise _refused("impossible extended attribute", member)
            kept = tuple(pair for pair in member.xattrs if pair[0].startswith(_NAMESPACES))
            self._tree.xattrs[member.xattrs] = kept
            self._spend(sum(_NAME_COST + len(name) + len(value) for name, value in member.xattrs), member)
        return kept

    def _linked(self, member: Member) -> Node:
        """What a hard link is to be a further name of: not what it has just replaced, nor what comes later."""
        parts = _cleaned(member.link, member)
        if parts[:1] == [_AUFS_LINKS]:
            node = self._aufs_links.get(parts[-1])
        else:
            trail = self._walk(parts[:-1], member)
            node = _child(trail[-1], parts[-1]) if parts else None
        if node is None:
            raise _refused(f"hard link to {_shown(member.link)}, which is not there", member)
        if node.children is not None:
            raise _refused(f"hard link to {_shown(member.link)}, a directory", member)
        return node

    def _put(self, directory: Node, name: bytes, node: Node, member: Member) -> None:
        if len(name) > NAME_MAX:
            raise _refused(f"name of more than {NAME_MAX} bytes", member)
        self._spend(_NAME_COST + len(name) + len(node.target), member)
        _children(directory)[name] = node
        if node.children is not None:
            directory.links += 1
        self._mark(directory, name)

    def _mark(self, directory: Node, name: bytes) -> None:
        """The name is this layer's, or leads to one that is."""
        if self.over_lower:
            self._upper.setdefault(directory, set()).add(name)

    def _spend(self, memory: int, member: Member) -> None:
        self._tree.memory += memory
        if self._tree.memory > _MEMORY_MAX:
            raise _refused("more files than a tree may hold", member)

    def _remove(self, directory: Node, name: bytes) -> None:
        """A name and all below it."""
        node = _children(directory).pop(name)
        self._tree.memory -= _NAME_COST + len(name) + len(node.target)
        if node.children is None:
            node.links -= 1
            if stat.S_ISLNK(node.mode):
                self._places.clear()
            return
        self._places.clear()
        directory.links -= 1
        gone = [node]
        while gone:
            parent = gone.pop()
            self._upper.pop(parent, None)
            self._cleared.discard(parent)
            for below, child in _children(parent).items():
                self._tree.memory -= _NAME_COST + len(below) + len(child.target)
                if child.children is None:
                    child.links -= 1
                else:
                    gone.append(child)

    # ---- whiteouts ----

    def _is_aufs(self, member: Member, archive: Archive) -> bool:
        """Whether it is no part of the image but AUFS's own, whose files hard links may name all the same."""
        parts = _cleaned(member.path, member)
        if not parts or not parts[0].startswith(_AUFS) or parts == [_OPAQUE]:
            return False
        if parts[0] == _AUFS_LINKS and member.kind is Kind.FILE:
            self._spend(_NAME_COST + len(parts[-1]), member)
            node = self._aufs_links[parts[-1]] = self._made(member, archive)
            node.links = 0
        return True

    def _hide(self, head: bytes, name: bytes, member: Member) -> None:
        """A whiteout: what lower layers have under a name, or all that they have in a directory, goes."""
        hidden = name[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise _refused("whiteout of nothing", member)
        directory = self._walk(_cleaned(head, member), member)[-1]
        if directory is None or directory.children is None or not self.over_lower:
            return
        if name == _OPAQUE:
            self._clear(directory)
            return
        node = _children(directory).get(hidden)
        if node is None:
            return
        if hidden not in self._upper.get(directory, _NONE):
            self._remove(directory, hidden)
        elif node.children is not None:
            self._clear(node)

    def _clear(self, directory: Node) -> None:
        """Only what this layer has put stays. Once for each directory: nothing of lower layers comes back."""
        waiting = [directory]
        while waiting:
            here = waiting.pop()
            if here in self._cleared:
                continue
            self._cleared.add(here)
            upper = self._upper.get(here, _NONE)
            for name in [name for name in _children(here) if name not in upper]:
                self._remove(here, name)
            waiting += [child for child in _children(here).values() if child.children is not None]

    # ---- paths ----

    def _directory(self, head: bytes, member: Member) -> Node:
        """The directory of a member. What is missing of it is made, as what the layer has put."""
        known = self._places.get(head)
        if known is not None:
            return known
        names: list[bytes] = []
        trail = self._walk(_cleaned(head, member), member, names)
        here = self._tree.root
        for name, node in zip(names, trail[1:], strict=True):
            if node is not None and node.children is None:
                raise _refused(f"{_shown(name)} on the way is not a directory", member)
            if node is None:
                node = Node(_NEW_DIRECTORY, links=2, children={})
                self._put(here, name, node, member)
            else:
                self._mark(here, name)
            here = node
        if len(self._places) >= _PLACES_KEPT:
            self._places.clear()
        self._places[head] = here
        return here

    def _walk(self, parts: list[bytes], member: Member, names: list[bytes] | None = None) -> list[Node | None]:
        """The root and what a path leads through, None where there is nothing; the names of that.

        Symbolic links are followed, but not into being: `..` after what is missing, or is no directory, goes back.
        """
        names = [] if names is None else names
        trail: list[Node | None] = [self._tree.root]
        waiting = parts[::-1]
        links = 0
        while waiting:
            part = waiting.pop()
            if part == b"..":
                del trail[max(1, len(trail) - 1) :], names[max(0, len(names) - 1) :]
                continue
            node = _child(trail[-1], part)
            if node is None or not stat.S_ISLNK(node.mode):
                trail.append(node)
                names.append(part)
                continue
            links += 1
            if links > _LINKS_FOLLOWED:
                raise _refused("too many symbolic links on the way", member)
            self._follow_left -= len(node.target)
            if self._follow_left < 0:
                raise _refused("more and longer symbolic links on the ways than files", member)
            if node.target.startswith(b"/"):
                del trail[1:], names[:]
            waiting += [part for part in reversed(node.target.split(b"/")) if part not in (b"", b".")]
        if sum(map(len, names)) + len(names) > PATH_MAX:
            raise _refused(f"path of more than {PATH_MAX} bytes", member)
        return trail


def _children(directory: Node) -> dict[bytes, Node]:
    """The children of what is known to be a directory."""
    assert directory.children is not None
    return directory.children


def _child(directory: Node | None, name: bytes) -> Node | None:
    """What has this name in what may be no directory, or nothing."""
    return directory.children.get(name) if directory and directory.children else None


def _split(member: Member) -> tuple[bytes, bytes]:
    """The directory's path and the name of a member; both empty for the root."""
    head, _, name = member.path.rpartition(b"/")
    if name in (b"", b".", b".."):
        parts = _cleaned(member.path, member)
        return b"/".join(parts[:-1]), parts[-1] if parts else b""
    return head, name


def _cleaned(path: bytes, member: Member) -> list[bytes]:
    """The parts of a path without `.` and `..`."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if not parts:
                raise _refused("path leads out of the tree", member)
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return parts


def _refused(why: str, member: Member) -> FormatError:
    return FormatError(f"{_shown(member.path)}: {why}", member.offset)


def _shown(path: bytes) -> str:
    """A path in a message: printable, and not too long."""
    return repr(path if len(path) <= _SHOWN else path[:_SHOWN] + b"...")[2:-1]
