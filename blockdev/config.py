# SPDX-License-Identifier: Apache-2.0
"""Settings as text: sizes, durations, failure policies, where the root is.

One parser for each kind of value, used by every command. Each turns text into a value
or raises UsageError, and touches nothing but the environment it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blockdev.errors import UsageError

SYSTEM_ROOT = Path("/var/lib/ociblk")  # of uid 0: survives reboots, shared by nobody else
ROOT_VARIABLE = "OCIBLK_ROOT"
DEFAULT_POLICY = "eio:30s"  # longer than a registry's restart, shorter than a user's patience

# Bare letters and the -iB names are powers of 1024, as in dd and qemu-img; -B names of 1000.
_SIZE_UNITS = {
    "": 1,
    "b": 1,
    **{letter: 1024**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE_MAX = 1 << 63  # what a file offset can say
_JOBS_MAX = 1024  # threads; more is a typing error
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_MAX = 366 * 86400.0  # a longer wait is a typing error, or means hang
_NUMBER_AND_UNIT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([a-z]*)", re.ASCII)


@dataclass(frozen=True)
class Policy:
    """What a read does while its source fails.

    "eio": misses fail `seconds` after the source's first failure; "retry": each request
    waits `seconds` of its own; "hang": requests wait for ever (`seconds` is 0).
    """

    mode: Literal["eio", "retry", "hang"]
    seconds: float = 0.0

    @property
    def patience(self) -> tuple[int, float]:
        """The more, the later a read fails."""
        return ("eio", "retry", "hang").index(self.mode), self.seconds

    def __str__(self) -> str:
        return "hang" if self.mode == "hang" else f"{self.mode}:{self.seconds:g}s"


def parse_size(text: str) -> int:
    """Bytes of "4096", "8mb" (10^6) or "16MiB" (2^20)."""
    match = _NUMBER_AND_UNIT.fullmatch(text.strip().lower())
    if not match or match[2] not in _SIZE_UNITS:
        raise UsageError(f"reading a size failed: {text!r}: want a number and a unit such as 16MiB or 8mb")
    number = float(match[1]) if "." in match[1] else int(match[1])
    size = number * _SIZE_UNITS[match[2]]
    if size != int(size) or size >= _SIZE_MAX:
        raise UsageError(f"reading a size failed: {text!r}: not a whole number of bytes below 2^63")
    return int(size)


def parse_duration(text: str) -> float:
    """Seconds of "500ms", "30s", "10m", "2h" or "1d". The unit is required."""
    match = _NUMBER_AND_UNIT.fullmatch(text.strip().lower())
    if not match or match[2] not in _DURATION_UNITS:
        raise UsageError(f"reading a duration failed: {text!r}: want a number and a unit such as 30s or 10m")
    seconds = float(match[1]) * _DURATION_UNITS[match[2]]
    if seconds > _DURATION_MAX:
        raise UsageError(f"reading a duration failed: {text!r}: longer than a year")
    return seconds


def parse_policy(text: str) -> Policy:
    """The Policy of "eio:30s", "retry:10m" or "hang"."""
    mode, colon, duration = text.partition(":")
    if mode == "hang" and not colon:
        return Policy("hang")
    if mode == "eio" and duration:
        return Policy("eio", parse_duration(duration))
    if mode == "retry" and duration:
        return Policy("retry", parse_duration(duration))
    raise UsageError(f"reading a policy failed: {text!r}: want eio:DURATION, retry:DURATION or hang")


def parse_path(text: str) -> Path:
    """A path of the caller's. An empty one would be the working directory, which nobody has named."""
    if not text:
        raise UsageError("reading a path failed: '': it is empty")
    return Path(text)


def parse_jobs(text: str) -> int:
    """A number of threads."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _JOBS_MAX):
        raise UsageError(f"reading a number of threads failed: {text!r}: want 1 to {_JOBS_MAX}")
    return int(text)


def default_root(environment: Mapping[str, str], uid: int) -> Path:
    """$OCIBLK_ROOT, else SYSTEM_ROOT for uid 0, else the user's data directory."""
    chosen = environment.get(ROOT_VARIABLE)
    if chosen:
        return Path(chosen)
    if uid == 0:
        return SYSTEM_ROOT
    data_home = Path(environment.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the XDG specification: relative values are to be ignored
        data_home = Path(environment.get("HOME") or Path.home(), ".local/share")
    return data_home / "ociblk"
