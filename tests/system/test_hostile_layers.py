# SPDX-License-Identifier: Apache-2.0
"""An image with a layer that is none ends `convert` and `verify` with one line and 5, and makes nothing."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.commands import Run
from tests.images import TAG
from tests.ordinary import Fill, lower, make
from tests.tars import binary, file, header

HOSTILE = {
    "an escape": (file(b"ok") + file(b"../../x", b"x"), "../../x: path leads out of the tree (at byte 512)"),
    "a huge size": (header(b"x", size=binary(1 << 62, 12)), "more than 16 TiB (at byte 0)"),
    "a damaged header": (header(b"a")[:-1] + b"!", "tar header is damaged (at byte 0)"),
}


@pytest.mark.parametrize(("layer", "why"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_layer_is_one_error(run: Run, tmp_path: Path, layer: bytes, why: str) -> None:
    def hostile(tar: tarfile.TarFile) -> None:
        assert tar.fileobj is not None
        tar.fileobj.write(layer)

    layers: list[Fill] = [lower, hostile]
    source = f"oci:{make(tmp_path / 'source', *layers)}:{TAG}"
    target = tmp_path / "target"
    for command in (("convert", source, f"oci:{target}:{TAG}"), ("verify", source, source)):
        done = run(*command)
        assert done.returncode == 5, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ociblk: ")
        assert last.endswith(why)
        assert "sha256:" in last
        assert "Traceback" not in done.stderr
    assert not (target / "index.json").exists()
