# SPDX-License-Identifier: Apache-2.0
"""Standard streams that are closed, full, or not what names can be said on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data"
LAYER = DATA / "a-l2.lz4-4k.zlsmt"


def shell(words: str) -> subprocess.CompletedProcess[str]:
    command = f'ociblk() {{ {sys.executable} -m blockdev "$@"; }}; {words}'
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("words", ["version", f"inspect {LAYER}", f"inspect {LAYER} --json", f"verify {LAYER}"])
@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_what_needs_no_stream_works_without_it(words: str, streams: str) -> None:
    done = shell(f"ociblk {words} {streams}")
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) is (">&-" not in streams.replace("2>&-", ""))


def test_files_take_no_number_of_a_closed_stream(tmp_path: Path) -> None:
    assert shell(f"ociblk export {LAYER} -o {tmp_path}/raw <&- >&- 2>&-").returncode == 0
    done = shell(f"ociblk export {LAYER} -o - <&- | cmp - {tmp_path}/raw")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("words", ["--help", "version", f"inspect {LAYER}", f"inspect {LAYER} --json"])
def test_a_result_that_cannot_be_written_is_one_line(words: str) -> None:
    done = shell(f"ociblk {words} >/dev/full")
    said = "ociblk: writing the result failed: stdout: No space left on device\n"
    assert (done.returncode, done.stderr) == (8, said)


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
def test_an_error_that_cannot_be_said_has_its_code(streams: str) -> None:
    done = shell(f"ociblk inspect /nonexistent {streams}")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"export {LAYER} -o - >&-", "ociblk: exporting failed: stdout: it is closed\n"),
        (f"cat {LAYER} /x >&-", "ociblk: writing files failed: stdout: it is closed\n"),
        ("import - -o /nonexistent/layer <&-", "ociblk: importing failed: stdin: it is closed\n"),
    ],
)
def test_a_closed_stream_for_content_is_refused(words: str, said: str) -> None:
    done = shell(f"ociblk {words}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_what_a_library_of_ours_warns_of_looks_like_a_notice() -> None:
    code = (
        "import logging, sys; from blockdev import cli; from blockdev.cli import version\n"
        "version.run = lambda args: logging.getLogger('blockdev.room').warning('a\\x1b[1m %s', 'b')\n"
        "sys.exit(cli.main(['version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "ociblk: a\\x1b[1m b\n")


def test_names_break_no_line_and_speak_to_no_terminal(tmp_path: Path) -> None:
    name = b"\xff\x1b[2J\nx"
    layer = tmp_path / "layer"
    layer.write_bytes(LAYER.read_bytes())
    for command in ("inspect", "verify"):
        link = f"cd {tmp_path}; name=$'\\xff\\x1b[2J\\nx'; ln -f layer \"$name\""
        done = shell(f'{link}; PYTHONIOENCODING=utf-8:strict ociblk {command} "./$name"')
        assert done.returncode == 0, done.stderr
        assert "./\\xff\\x1b[2J\\nx" in done.stdout
        assert len(done.stdout.splitlines()) == (4 if command == "inspect" else 2)
    (tmp_path / "layer").unlink()
    missing = shell(f"ociblk inspect {tmp_path}/$'\\xff\\x1b[2J\\n?'")
    assert (missing.returncode, missing.stderr.count("\n")) == (3, 1)
    assert "\\xff\\x1b[2J" in missing.stderr
    assert json.loads(shell(f"cd {tmp_path}; ociblk inspect ./* --json").stdout)["image"].encode(
        errors="surrogateescape"
    ) == b"./" + name
