# SPDX-License-Identifier: Apache-2.0
"""What -o may say, and which kernels may read EROFS from a file."""

from __future__ import annotations

import pytest

from blockdev import syscalls
from blockdev.errors import UsageError
from blockdev.mountoptions import MountOptions, parse_options
from blockdev.mountpoint import erofs_from_file

DEFAULT = syscalls.MS_RDONLY | syscalls.MS_NODEV | syscalls.MS_NOSUID


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", MountOptions(DEFAULT)),
        ("ro,defaults,,nofail,_netdev,x-systemd.automount", MountOptions(DEFAULT)),
        ("noexec,noatime", MountOptions(DEFAULT | syscalls.MS_NOEXEC | syscalls.MS_NOATIME)),
        ("noexec,exec", MountOptions(DEFAULT)),
        ("dev,suid", MountOptions(syscalls.MS_RDONLY)),
        ("suid,nosuid", MountOptions(DEFAULT)),
        ("errors=continue,acl", MountOptions(DEFAULT, ("errors=continue", "acl"))),
    ],
)
def test_options_become_flags_and_what_the_file_system_gets(text: str, expected: MountOptions) -> None:
    assert parse_options(text) == expected


@pytest.mark.parametrize("option", ["rw", "remount", "bind"])
def test_what_an_image_cannot_be_is_refused_by_name(option: str) -> None:
    with pytest.raises(UsageError, match=option):
        parse_options(f"noatime,{option}")


@pytest.mark.parametrize(
    ("release", "right"),
    [
        ("6.1.0-42-amd64", False),
        ("6.12.79", False),
        ("6.12.80-1-generic", True),
        ("6.12.117+deb12-amd64", True),
        ("6.14.0-37-generic", False),
        ("6.18.20", False),
        ("6.18.44", True),
        ("6.19.5", False),
        ("7.0.0", True),
        ("10.1", True),
        ("unknown", False),
    ],
)
def test_erofs_is_read_from_a_file_only_where_short_reads_are_no_zeros(release: str, right: bool) -> None:
    assert erofs_from_file(release) == right
