# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations, policies and the default root: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockdev.config import Policy, default_root, parse_duration, parse_policy, parse_size
from blockdev.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0", 0),
        ("16MiB", 16 << 20),
        ("16m", 16 << 20),
        ("8mb", 8_000_000),
        ("1.5G", 3 << 29),
        (" 2 TiB ", 2 << 40),
        ("7B", 7),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 parsec", "0x10", "1e3", "0.3", "9999999T", "1_0", "\u0661"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("30s", 30), ("1.5m", 90), ("2h", 7200), ("1d", 86400)])
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "-1s", "1w", "400d", "inf"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "policy"),
    [("eio:30s", Policy("eio", 30.0)), ("retry:10m", Policy("retry", 600.0)), ("hang", Policy("hang"))],
)
def test_a_policy_reads_and_prints_the_same(text: str, policy: Policy) -> None:
    assert parse_policy(text) == policy
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize("text", ["", "eio", "eio:", "retry", "hang:1s", "panic:1s", "eio:30", "EIO:30s"])
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_policy(text)


@pytest.mark.parametrize(
    ("environment", "uid", "root"),
    [
        ({}, 0, "/var/lib/ociblk"),
        ({"OCIBLK_ROOT": "/x"}, 0, "/x"),
        ({"XDG_DATA_HOME": "/data", "HOME": "/h"}, 0, "/var/lib/ociblk"),
        ({"XDG_DATA_HOME": "/data", "HOME": "/h"}, 7, "/data/ociblk"),
        ({"XDG_DATA_HOME": "data", "HOME": "/h"}, 7, "/h/.local/share/ociblk"),
        ({"HOME": "/h"}, 7, "/h/.local/share/ociblk"),
    ],
)
def test_the_default_root_follows_user_and_environment(environment: dict[str, str], uid: int, root: str) -> None:
    assert default_root(environment, uid) == Path(root)
