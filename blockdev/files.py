# SPDX-License-Identifier: Apache-2.0
"""The files of an image, without a mount: EROFS only, as the reader of formats/ has it.

Promises: what is there is found by the same rules as through a mount, links within the
image included; what is not is NotFound; bytes that break the format are CorruptImage.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blockdev.errors import CorruptImage, NotFound, UsageError
from formats.erofs_disk import COMPRESSED, Inode
from formats.erofs_reader import TREE_ENTRIES_MAX, FileSystem
from formats.errors import FormatError, Unsupported
from formats.readat import ReadAt
from formats.superblock import HEAD_SIZE, file_system
from formats.tree import Xattrs


@dataclass(frozen=True)
class File:
    """One name and what it stands for. `path`: from the root, without a slash in front; b"" is the root."""

    path: bytes
    inode: Inode
    target: bytes  # of a symbolic link
    xattrs: Xattrs

    @property
    def name(self) -> bytes:
        """Its last part; "." is the root's."""
        return self.path.rpartition(b"/")[2] or b"."


class Files:
    """Of one image's disk; `image` is what messages call it."""

    def __init__(self, disk: ReadAt, image: str) -> None:
        """UsageError if the file system is one that has to be mounted."""
        self._image = image
        kind = file_system(disk.read_at(0, min(HEAD_SIZE, disk.size)))
        if kind != "erofs":
            found = f"its file system is {kind}" if kind else "no file system that is known is on it"
            raise UsageError(f"looking into an image failed: {image}: {found}; only EROFS is read without a mount")
        with self._reading():
            self._files = FileSystem(disk)

    def find(self, path: bytes) -> File:
        """What a path leads to. NotFound."""
        with self._reading(path):
            inode = self._files.lookup(path)
            if inode is None:
                why = "no such file, or its symbolic links lead nowhere"
                raise NotFound(f"looking into an image failed: {self._image}: {_shown(path)}: {why}")
            return self._file(b"/".join(part for part in path.split(b"/") if part), inode)

    def below(self, directory: File) -> Iterator[File]:
        """What is in a directory, by name."""
        with self._reading(directory.path):
            for name, nid, _ in self._files.entries(directory.inode):
                path = directory.path + b"/" + name if directory.path else name
                yield self._file(path, self._files.inode(nid))

    def walk(self, top: File) -> Iterator[tuple[File, list[File]]]:
        """Each directory from `top` on with what is in it; a directory is followed by those in it."""
        ahead, met, entries = [top], {top.inode.nid}, 0
        while ahead:
            directory = ahead.pop()
            found = list(self.below(directory))
            entries += len(found)
            yield directory, found
            deeper = [file for file in found if stat.S_ISDIR(file.inode.mode)]
            nids = {file.inode.nid for file in deeper}
            if nids & met or len(nids) < len(deeper) or entries > TREE_ENTRIES_MAX:
                raise self._corrupt(directory.path, "directories that lead into each other, or without an end")
            met |= nids
            ahead += reversed(deeper)

    def content(self, file: File) -> Iterator[bytes]:
        """All of a regular file, in pieces. UsageError at once if it is none."""
        kind = file.inode.kind
        why = ""
        if kind != stat.S_IFREG:
            why = "it is a directory" if kind == stat.S_IFDIR else "it is no regular file"
        elif file.inode.layout in COMPRESSED:
            why = "EROFS compresses it; a mount reads it"
        if why:
            raise UsageError(f"reading a file failed: {self._image}: {_shown(file.path)}: {why}")
        return self._pieces(file)

    def _pieces(self, file: File) -> Iterator[bytes]:
        with self._reading(file.path):
            yield from self._files.content(file.inode)

    def _file(self, path: bytes, inode: Inode) -> File:
        target = self._files.readlink(inode) if inode.kind == stat.S_IFLNK else b""
        return File(path, inode, target, self._files.xattrs(inode))

    @contextmanager
    def _reading(self, path: bytes = b"") -> Iterator[None]:
        try:
            yield
        except Unsupported as error:
            raise UsageError(f"reading EROFS failed: {self._image}: {_shown(path)}: {error}") from error
        except FormatError as error:
            raise self._corrupt(path, str(error)) from error

    def _corrupt(self, path: bytes, why: str) -> CorruptImage:
        return CorruptImage(f"reading EROFS failed: {self._image}: {_shown(path)}: {why}")


def _shown(path: bytes) -> str:
    return "/" + path.decode("utf-8", "backslashreplace").lstrip("/")
