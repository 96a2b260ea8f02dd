# SPDX-License-Identifier: Apache-2.0
"""Prerequisites of tests. A missing one skips aloud, saying what to install.

In CI ($CI or $OCIBLK_CI set) a missing prerequisite fails instead: nothing may be
left out there unseen. The reference fixtures are the one exception, as they are not
part of the project; tests that need them skip wherever they are absent.

Call these in a test, in a fixture, or at the top of a test module.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import fixtures

ROOT = Path(__file__).parent.parent
FULL = os.environ.get("OCIBLK_FULL", "") not in {"", "0"}
IN_CI = any(os.environ.get(name, "") not in {"", "0"} for name in ("CI", "OCIBLK_CI"))


def scaled(usual: int, full: int) -> int:
    """How many rounds a test does: `full` under tools/test --full, else `usual`."""
    return full if FULL else usual


def _missing(what: str) -> None:
    __tracebackhide__ = True
    if IN_CI:
        pytest.fail(f"CI lacks {what}", pytrace=False)
    pytest.skip(f"needs {what}", allow_module_level=True)


def requires_command(*names: str) -> None:
    """Each of these programs is on PATH."""
    __tracebackhide__ = True
    for name in names:
        # Debian keeps mkfs, losetup and friends out of an ordinary user's PATH.
        if shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is None:
            _missing(f"the command {name}; tools/setup installs it")


def requires_root() -> None:
    """The tests run as uid 0 (mounts, loop devices)."""
    __tracebackhide__ = True
    if os.geteuid() != 0:
        _missing("root")


def requires_device(path: str) -> None:
    """This device node can be opened, e.g. /dev/fuse or /dev/loop-control."""
    __tracebackhide__ = True
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        _missing(f"{path} ({error.strerror})")


def requires_mount() -> None:
    """Kernel mounts of our kind are possible: root, FUSE and loop devices."""
    __tracebackhide__ = True
    requires_root()
    requires_device("/dev/fuse")
    requires_device("/dev/loop-control")


def requires_fixtures() -> Path:
    """The folder of reference fixtures (tests/fixtures.py says where it is sought)."""
    __tracebackhide__ = True
    return fixtures.folder()
