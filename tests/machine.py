# SPDX-License-Identifier: Apache-2.0
"""Where a figure was measured: what a reader needs to repeat it or to doubt it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSION_COMMANDS = {  # foreign programs whose version changes a figure
    "fio": ["fio", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "libnbd": ["nbdcopy", "--version"],
    "qemu": ["qemu-nbd", "--version"],
    "docker-registry": ["docker-registry", "--version"],
    "mkfs.erofs": ["mkfs.erofs", "-V"],
    "curl": ["curl", "--version"],
    "nginx": ["nginx", "-v"],
}


def cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def first_line(command: list[str]) -> str | None:
    """The first line a command prints; None if the command is not installed."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except FileNotFoundError:
        return None
    lines = (result.stdout or result.stderr).strip().splitlines()
    return lines[0] if lines else None


def machine() -> dict[str, object]:
    """Kernel, processor, load, revision and versions, at this moment."""
    return {
        "kernel": platform.release(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "revision": first_line(["git", "describe", "--always", "--dirty"]),
        "versions": {name: first_line(command) for name, command in VERSION_COMMANDS.items()},
    }
