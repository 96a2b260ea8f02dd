# SPDX-License-Identifier: Apache-2.0
"""The C programs of tests/bench, built when they are needed (build/bench)."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "bench"
LIBRARIES = {"http_ranges": ["-lcurl"], "slow_link": []}  # those that need nothing of the engine


@cache
def program(name: str) -> Path:
    """Path of the program, built from the sources as they are."""
    if name in LIBRARIES:
        BUILD.mkdir(parents=True, exist_ok=True)
        target, source = BUILD / name, ROOT / "tests" / "bench" / f"{name}.c"
        command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-pthread", "-o", target, source]
        subprocess.run([*command, *LIBRARIES[name]], check=True)
        return target
    folder = BUILD / "c"
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"  # cmake and ninja of the build toolchain
    for command in (
        ["cmake", "-S", ROOT / "native", "-B", folder, "-G", "Ninja"],
        ["cmake", "--build", folder, "--target", name],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PATH": path})
    return folder / name
