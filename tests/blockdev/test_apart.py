# SPDX-License-Identifier: Apache-2.0
"""No output takes the place of what it is made of, by whatever name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAYER = Path(__file__).parent.parent / "data" / "a-l2.lsmt"


def run(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = f'ociblk() {{ {sys.executable} -m blockdev "$@"; }}; cd {folder}; {words}'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60, env=environment
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A raw disk, a layer, a configuration that names it and a writable layer, each with a hard and a symbolic link."""
    (tmp_path / "raw").write_bytes(b"disk" * 128)
    (tmp_path / "layer").write_bytes(LAYER.read_bytes())
    (tmp_path / "config").write_text(f'{{"lowers": [{{"file": "{tmp_path}/layer"}}], "resultFile": ""}}')
    assert run("ociblk create data index --size 1M", tmp_path).returncode == 0
    for path in list(tmp_path.iterdir()):
        path.with_name(f"{path.name}.hard").hardlink_to(path)
        path.with_name(f"{path.name}.soft").symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("link", ["", ".hard", ".soft"])
@pytest.mark.parametrize(
    ("words", "output"),
    [
        ("import raw", "raw"),
        ("import - < raw", "raw"),
        ("export layer", "layer"),
        ("export config", "layer"),
        ("export config", "config"),
        ("merge layer", "layer"),
        ("merge config", "config"),
        ("commit data index", "data"),
        ("commit data index", "index"),
    ],
)
def test_an_output_that_is_an_input_is_refused_and_both_are_named(
    folder: Path, words: str, output: str, link: str
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    done = run(f"ociblk {words} -o {output}{link}", folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{output}{link}: it is " in done.stderr
    assert ("stdin" if "<" in words else output) in done.stderr.partition(": it is ")[2]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_stdout_is_no_way_round(folder: Path) -> None:
    done = run("ociblk export layer -o - 1<> layer", folder)
    assert (done.returncode, done.stderr) == (2, "ociblk: write file: stdout: it is layer, which is read for it\n")
    assert (folder / "layer").read_bytes() == LAYER.read_bytes()


def test_an_output_beside_the_inputs_is_written(folder: Path) -> None:
    for words in ("import raw -o new", "export layer -o new", "merge config -o new", "commit data index -o new"):
        assert run(f"ociblk {words}", folder).returncode == 0
    assert run("ociblk export layer -o /dev/null < /dev/null", folder).returncode == 0
