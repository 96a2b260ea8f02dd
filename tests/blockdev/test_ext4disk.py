# SPDX-License-Identifier: Apache-2.0
"""Making an ext4: what its tools do wrong is told. The rest is judged by tests/system/test_ext4.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockdev.build import ext4disk
from blockdev.errors import DeviceError


def test_an_mkfs_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "mkfs.ext4"
    command.write_text("#!/bin/sh\nexec sleep 600\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(ext4disk, "_MKFS_SECONDS", 0.1)
    with pytest.raises(DeviceError, match=r"mkfs\.ext4 has not ended in 0\.1 s"):
        ext4disk._make_file_system(tmp_path / "disk")
