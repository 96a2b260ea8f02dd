# SPDX-License-Identifier: Apache-2.0
"""What a test run left in the kernel: mounts, loop devices and processes.

A run keeps everything under one directory of its own and names that directory in the
environment variable RUN_VARIABLE, which its children inherit. So whatever belongs to a
run can be found again, by this run to fail the test that leaked, and by a later one to
sweep up after a run that was killed. Nothing that is not under that directory, or was
not started with that variable, is ever touched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from blockdev import syscalls

RUNS = Path(tempfile.gettempdir()).resolve() / "ociblk-test"  # short: socket paths go below it
RUN_VARIABLE = "OCIBLK_TEST_RUN"
# For the beginning of a script in a new mount namespace: the mounts of other tests are in it too, and would stay for as
# long as it. Best effort: one may have ended meanwhile.
FORGET_MOUNTS = f"""
awk -v runs={RUNS}/ 'index($5, runs) == 1 {{ print $5 }}' /proc/self/mountinfo | tac | xargs -r -n 1 umount --lazy || :
"""
KILL_WAIT = 5.0  # seconds a killed process may take to disappear


def mounts(run: Path) -> list[str]:
    """Mount points under the run's directory, the innermost first."""
    return [entry.point for entry in reversed(syscalls.mounts()) if entry.point.startswith(f"{run}/")]


def loops(run: Path) -> list[str]:
    """Loop devices whose backing file, or whose owner's root, is under the run's directory.

    A device whose name has no room for its root (blockdev/mountpoint.py) is told by its mount alone.
    """
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        device = backing.parent.parent.name
        try:
            file = backing.read_text().rstrip("\n")
            if file == syscalls.NOWHERE:
                file = syscalls.loop_status(int(device.removeprefix("loop"))).name.partition(" ")[2]
        except OSError:  # detached between listing and reading
            continue
        if file.startswith(f"{run}/"):
            found.append(f"/dev/{device}")
    return found


def processes(run: Path) -> dict[int, str]:
    """Command lines, by pid, of live processes that inherited the run's variable."""
    marker = f"{RUN_VARIABLE}={run}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(entry.name)] = command.strip()
        except OSError:  # gone, or another user's
            continue
    return found


def describe(run: Path) -> list[str]:
    """One line for everything the run holds at this moment."""
    return [
        *(f"mount {point}" for point in mounts(run)),
        *(f"loop device {device}" for device in loops(run)),
        *(f"process {pid}: {command}" for pid, command in processes(run).items()),
    ]


def sweep(run: Path) -> list[str]:
    """Take away everything a dead run left behind; says what that was."""
    swept = describe(run)
    for pid in processes(run):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + KILL_WAIT
    while processes(run) and time.monotonic() < deadline:
        time.sleep(0.02)
    for point in mounts(run):
        subprocess.run(["umount", "--lazy", point], check=False)
    for device in loops(run):
        subprocess.run(["losetup", "--detach", device], check=False)
    return swept
