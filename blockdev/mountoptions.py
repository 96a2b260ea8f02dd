# SPDX-License-Identifier: Apache-2.0
"""What -o of mount(8) may say of an image, as mount(2) takes it."""

from __future__ import annotations

from dataclasses import dataclass

from blockdev import syscalls
from blockdev.errors import UsageError


@dataclass(frozen=True)
class MountOptions:
    """What -o said: mount(2) flags, and options for the file system itself."""

    flags: int
    rest: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """The options for the file system, as mount(2) takes them."""
        return ",".join(self.rest)


_SETS = {
    "ro": syscalls.MS_RDONLY,
    "nosuid": syscalls.MS_NOSUID,
    "nodev": syscalls.MS_NODEV,
    "noexec": syscalls.MS_NOEXEC,
    "nosymfollow": syscalls.MS_NOSYMFOLLOW,
    "noatime": syscalls.MS_NOATIME,
    "nodiratime": syscalls.MS_NODIRATIME,
    "relatime": syscalls.MS_RELATIME,
    "strictatime": syscalls.MS_STRICTATIME,
}
_CLEARS = {
    "suid": syscalls.MS_NOSUID,
    "dev": syscalls.MS_NODEV,
    "exec": syscalls.MS_NOEXEC,
    "symfollow": syscalls.MS_NOSYMFOLLOW,
    "atime": syscalls.MS_NOATIME,
    "diratime": syscalls.MS_NODIRATIME,
    "norelatime": syscalls.MS_RELATIME,
    "nostrictatime": syscalls.MS_STRICTATIME,
}
_REFUSED = {
    "rw": "an image is read-only without --rw",
    "remount": "umount and mount again",
    "bind": "not a mount of an image",
}
_FOR_OTHERS = {"defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "group", "owner"}


def parse_options(text: str, *, writable: bool = False) -> MountOptions:
    """The argument of -o, over the defaults ro (unless writable), nodev and nosuid. UsageError if it cannot be had.

    What only fstab's readers care about (defaults, nofail, x-...) is dropped; what is not
    ours goes to the file system.
    """
    flags = (0 if writable else syscalls.MS_RDONLY) | syscalls.MS_NODEV | syscalls.MS_NOSUID
    rest = []
    for option in filter(None, text.split(",")):
        if writable and option == "rw":
            continue
        if option in _REFUSED:
            raise UsageError(f"reading mount options failed: {option}: {_REFUSED[option]}")
        if option in _SETS:
            flags |= _SETS[option]
        elif option in _CLEARS:
            flags &= ~_CLEARS[option]
        elif option not in _FOR_OTHERS and not option.startswith(("x-", "X-", "comment=")):
            rest.append(option)
    return MountOptions(flags, tuple(rest))
