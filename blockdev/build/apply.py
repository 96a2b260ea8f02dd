# SPDX-License-Identifier: Apache-2.0
"""Making a mounted file system hold what a tree of nodes says, layer after layer.

What layers mean is Tree's business: a layer is merged there, and then the differences to the
tree before it are done to the mount, with the kernel's own calls. Contents arrive while the
layer is merged, so they wait in a directory of the same file system and are renamed from there.
Only root can do this, and the mount must be nobody else's.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from blockdev.errors import from_os
from blockdev.ranges import write_at
from formats.errors import FormatError
from formats.ext4 import TIME_MAX, TIME_MIN
from formats.tree import Node, Xattrs

_DOING = "applying a layer failed"
_SECOND = 10**9

# What an archive may ask for, and ext4 has no way to do: too many links or bytes of a path.
_TOO_MUCH = {errno.EMLINK, errno.ENAMETOOLONG, errno.EFBIG}
# Too many bytes, a file of a kind that has none such, an ACL that is none.
_IMPOSSIBLE_XATTR = {errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL}

_Attributes = tuple[int, int, int, int, Xattrs]
Content = Iterator[tuple[int, bytes | memoryview]]


class Applied:
    """What a mounted file system holds so far. After an error neither it nor the mount are of use."""

    def __init__(self) -> None:
        self._children: dict[Node, dict[bytes, Node]] = {}  # of each directory
        self._attributes: dict[Node, _Attributes] = {}

    def apply(self, root: Node, staged: Staged) -> None:
        """Bring the mount from what it holds to `root`. FormatError for what the file system cannot hold."""
        try:
            _Change(self._children, self._attributes, root, staged).run()
        except OSError as error:
            place = os.fsencode(error.filename2 or error.filename or b"").removeprefix(staged.mount)
            if error.errno in _TOO_MUCH:
                raise FormatError(f"{_shown(place)}: ext4 has no room for it: {error.strerror}") from error
            raise from_os(_DOING, error, _shown(place)) from error
        self.follow(root)

    def follow(self, root: Node) -> None:
        """Take it that the mount holds `root` by now."""
        self._children = {}
        self._attributes = {}
        for _, node in _walk(root):
            self._attributes[node] = _attributes(node)
            if node.children is not None:
                self._children[node] = dict(node.children)


class Staged:
    """Contents on their way, in a directory below the mount that is there for as long as this is open."""

    def __init__(self, mount: Path, root: Node) -> None:
        """root: of what the mount holds, for a name that is not taken there."""
        self.mount = os.fsencode(mount)
        self._folder = self._free(root)
        self._count = 0
        os.mkdir(self._folder, 0o700)

    def make_way(self, root: Node) -> None:
        """Leave a name that `root` has, too: the layer has brought it."""
        if self._folder.rpartition(b"/")[2] in (root.children or {}):
            free = self._free(root)
            os.rename(self._folder, free)
            self._folder = free

    def discard(self, path: bytes) -> None:
        """Take a file, or an empty directory, out of the mount. It goes at the end, when all that is new is there:

        an inode that has just become free is taken for the next file, or is not, as its block happens to be in memory.
        """
        self._count += 1
        os.rename(path, self.place(self._count))

    def remove(self) -> None:
        """Nothing of it stays: what was discarded, and contents that the layer itself has replaced."""
        for name in sorted(os.listdir(self._folder)):
            path = self._folder + b"/" + name
            if stat.S_ISDIR(os.lstat(path).st_mode):
                os.rmdir(path)
            else:
                os.unlink(path)
        os.rmdir(self._folder)

    def _free(self, root: Node) -> bytes:
        """A path in the mount that neither it nor `root` has."""
        number = 0
        while (name := b".staged-%d" % number) in (root.children or {}) or os.path.lexists(self.mount + b"/" + name):
            number += 1
        return self.mount + b"/" + name

    def store(self, size: int, content: Content) -> int:
        """As tree.Store: keep a content; its number."""
        self._count += 1
        place = self.place(self._count)
        try:
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for offset, piece in content:
                    write_at(fd, piece, offset)
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise from_os(_DOING, error, _shown(place.removeprefix(self.mount))) from error
        return self._count

    def place(self, number: int) -> bytes:
        """Where a content waits."""
        return b"%s/%d" % (self._folder, number)

    def keep(self, path: bytes) -> bytes:
        """A further name for a file that is about to lose its own."""
        self._count += 1
        os.link(path, self.place(self._count), follow_symlinks=False)
        return self.place(self._count)


class _Change:
    """From one tree to the next."""

    def __init__(
        self,
        before: dict[Node, dict[bytes, Node]],
        attributes: dict[Node, _Attributes],
        root: Node,
        staged: Staged,
    ) -> None:
        self._before = before
        self._attributes = attributes
        self._root = root
        self._staged = staged
        self._mount = staged.mount
        self._where: dict[Node, bytes] = {}  # a name of files that have several, or are about to get another
        self._touched: set[Node] = {root}  # directories whose time has changed by what was done in them

    def run(self) -> None:
        self._staged.make_way(self._root)
        alive = {node for _, node in _walk(self._root)}
        gone = list(self._vanished(alive))
        for path in reversed(gone):  # what is in a directory before it
            self._staged.discard(path)
        for path, node in _walk(self._root):
            if node.children is not None:
                self._fill(self._mount + path, node)
        self._staged.remove()
        for path, node in _walk(self._root):
            if node in self._touched or self._attributes.get(node) != _attributes(node):
                self._describe(self._mount + path, node)

    def _vanished(self, alive: set[Node]) -> Iterator[bytes]:
        """Names that are no more, directories before what is in them. Notes where files with names to come are."""
        waiting: list[tuple[bytes, Node, bool]] = [(self._mount, self._root, True)] if self._before else []
        rescue: list[tuple[bytes, Node]] = []
        while waiting:
            place, directory, stays = waiting.pop()
            after = (directory.children or {}) if stays else {}
            for name, node in self._before[directory].items():
                path = place + b"/" + name
                kept = after.get(name) is node
                if node.children is not None:
                    waiting.append((path, node, kept))
                elif kept and node.links > 1:
                    self._where.setdefault(node, path)
                elif not kept and node in alive:
                    rescue.append((path, node))
                if not kept:
                    self._touched.add(directory)
                    yield path
        for path, node in rescue:
            if node not in self._where:
                self._where[node] = self._staged.keep(path)

    def _fill(self, place: bytes, directory: Node) -> None:
        """Make what a directory has anew."""
        assert directory.children is not None
        before = self._before.get(directory, {})
        for name, node in directory.children.items():
            if before.get(name) is not node:
                self._touched.add(directory)
                self._make(place + b"/" + name, node)

    def _make(self, path: bytes, node: Node) -> None:
        if node in self._where:
            os.link(self._where[node], path, follow_symlinks=False)
            return
        if node.children is not None:
            os.mkdir(path)
        elif stat.S_ISLNK(node.mode):
            os.symlink(node.target, path)
        elif stat.S_ISREG(node.mode) and node.size:
            os.rename(self._staged.place(node.block), path)
        else:
            os.mknod(path, node.mode, os.makedev(*node.device))
        if node.links > 1 and node.children is None:
            self._where[node] = path

    def _describe(self, path: bytes, node: Node) -> None:
        """Attributes, in an order in which none undoes another."""
        seconds = node.mtime_ns // _SECOND
        if not TIME_MIN <= seconds <= TIME_MAX:
            raise FormatError(f"{self._inside(path)}: ext4 has no room for the time {seconds}")
        os.chown(path, node.uid, node.gid, follow_symlinks=False)
        # Those of a new one, too: it may have inherited an access list.
        for present in os.listxattr(path, follow_symlinks=False):
            if os.fsencode(present) not in dict(node.xattrs):
                os.removexattr(path, present, follow_symlinks=False)
        for name, value in node.xattrs:
            self._set_xattr(path, name, value)
        if not stat.S_ISLNK(node.mode):
            os.chmod(path, stat.S_IMODE(node.mode))
        os.utime(path, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)


    def _set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        try:
            os.setxattr(path, name, value, follow_symlinks=False)
        except OSError as error:
            full = error.errno == errno.ENOSPC and not os.statvfs(self._mount).f_bavail
            if full or error.errno not in _IMPOSSIBLE_XATTR:
                raise
            what = f"extended attribute {_shown(name)} of {len(value)} bytes"
            raise FormatError(f"{self._inside(path)}: {what}: ext4 cannot hold it: {error.strerror}") from error

    def _inside(self, path: bytes) -> str:
        return _shown(path.removeprefix(self._mount) or b"/")


def _walk(root: Node) -> Iterator[tuple[bytes, Node]]:
    """All names in order, a directory before what is in it; the root's is empty, others begin with a slash."""
    waiting = [(b"", root)]
    while waiting:
        path, node = waiting.pop()
        yield path, node
        children = node.children or {}
        waiting += [(path + b"/" + name, children[name]) for name in sorted(children, reverse=True)]


def _attributes(node: Node) -> _Attributes:
    return node.mode, node.uid, node.gid, node.mtime_ns, node.xattrs


def _shown(path: bytes) -> str:
    return repr(os.fsdecode(path))
