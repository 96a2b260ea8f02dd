# SPDX-License-Identifier: Apache-2.0
"""Layers with a writable one on top, as a file that can be written: what `convert --fs ext4` works on.

The owner serves it, as it serves every writable device: it holds what must not wait for the
device itself under memory pressure. The mounts are this process's own: nobody else sees them, and however it ends,
they end with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blockdev import client, mountpoint, syscalls
from blockdev.cli import text
from blockdev.cli.umount import unmount
from blockdev.config import DEFAULT_POLICY
from blockdev.errors import from_os
from blockdev.origin import NOTHING, Part, locate
from blockdev.root import Root


def _keep_mounts_private() -> None:
    try:
        syscalls.keep_mounts_private()
    except OSError as error:
        raise from_os("keeping mounts private", error) from None


@contextmanager
def attached(root: Root, layers: Sequence[int], pair: tuple[Path, Path], file: Path) -> Iterator[None]:
    """`file` is the disk of the layers (descriptors, bottom first) and the pair, until the block ends."""
    with locate(NOTHING, [str(path) for path in pair], write=True) as origin:
        origin.layers = [Part(f"layer {place}", os.fstat(fd).st_size, fd=fd) for place, fd in enumerate(layers)]
        image, descriptors = origin.to_wire()
        with client.connect(root, text.print_notice) as owner:
            _keep_mounts_private()  # not before there is an owner: one that we start is not to hold them
            owner.call("mount", {"image": image, "policy": DEFAULT_POLICY}, descriptors)
            with mountpoint.mount_file(file, writable=True) as fuse:
                try:
                    owner.call("fuse", descriptors=[fuse])
                finally:
                    os.close(fuse)  # the owner has it; its end has to end the file
                connection = mountpoint.find(file).connection
                owner.call("mounted", {"where": str(file), "how": "while it is converted", "connection": connection})
                origin.close()  # what is locked is the owner's now, until it has closed the pair
                yield
            unmount(file, root, force=False)
