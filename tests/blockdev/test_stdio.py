# SPDX-License-Identifier: Apache-2.0
"""Standard streams that are closed, full, or not what names can be said on."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """What a terminal shows, and what is written to."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("head -c 2000001 raw | ociblk import - -o out", 2, "ociblk: import disk: -: "),
        ("ociblk import raw -o out", 0, ""),
        ("ociblk import raw -o out --json", 0, '{"v": 1, "layer": "out", '),
        ("ociblk stuck", 0, ""),
        ("ociblk stuck --json", 0, '{"v": 1}'),
    ],
)
def test_nothing_is_said_behind_progress(
    tmp_path: Path, terminal: tuple[int, int], words: str, code: int, said: str
) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(3 << 20))
    quick = (
        "import sys; from blockdev.cli import main, text, version; text._PROGRESS_AFTER = text._PROGRESS_EVERY = 0\n"
        "def stuck(args):\n"
        "    text.progress('read')(1, 2)\n"
        "    args.json and text.print_json({})\n"
        "version.run = stuck\n"
        "sys.exit(main([word.replace('stuck', 'version') for word in sys.argv[1:]]))"
    )
    command = f'ociblk() {{ {sys.executable} -c "$QUICK" "$@"; }}; cd {tmp_path}; {words}'
    environment = {**os.environ, "QUICK": quick, "PYTHONPATH": str(DATA.parent.parent)}
    ours, theirs = terminal
    done = subprocess.run(
        ["bash", "-c", command], stdout=theirs, stderr=theirs, check=False, timeout=60, env=environment
    )
    os.write(theirs, b"END")
    shown = b""
    while not shown.endswith(b"END"):
        shown += os.read(ours, 65536)
    lines = [line.rpartition("\033[K")[2] for line in shown.decode().removesuffix("END").split("\r\n")]
    assert b"read " in shown
    assert (done.returncode, lines.pop()) == (code, "")
    told = [line for line in lines if not line.startswith("read ")]
    assert len(told) == bool(said)
    assert len(lines) - len(told) <= 1  # the last line of progress, which stays
    assert all(line.startswith(said) for line in told)
