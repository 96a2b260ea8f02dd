# SPDX-License-Identifier: Apache-2.0
"""The README's first hour, typed as it stands there."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

from tests.requires import ROOT, requires_command, requires_mount

PORT = "5055"  # the README's; any free one will do


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_first_hour_works_as_written(tmp_path: Path, ociblk: str):
    requires_mount()
    requires_command("mkfs.erofs", "docker-registry", "nbdinfo", "nbdcopy")
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tour,) = (block for block in blocks if "# 1." in block)
    assert PORT in tour
    script = tour.replace(PORT, free_port()).replace("$PWD/.venv/bin", str(Path(ociblk).parent))
    result = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "hello\n" in result.stdout
    assert list(tmp_path.iterdir()) == []
