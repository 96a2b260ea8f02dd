# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, one line for an error, results on stdout, quick help."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockdev import cli
from blockdev.upper import create_pair
from tests import fixtures

DATA = Path(__file__).parent.parent / "data"
LAYER = DATA / "a-l2.lz4-4k.zlsmt"
HELP_LIMIT = 0.150  # seconds of processor time
COMMANDS = sorted(cli._COMMANDS)


def run(*words: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "blockdev", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, check=False, timeout=60, env={**os.environ, **(environment or {})}
    )


def best_time(*words: str) -> float:
    """Processor seconds of the quickest of several runs: what the machine does besides is not our matter."""
    times = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*words).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_is_quick() -> None:
    assert best_time("--help") < HELP_LIMIT


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_the_engine_or_the_network(command: str) -> None:
    code = (
        "import sys; from blockdev.cli import main; code = main([sys.argv[1], '--help'])\n"
        "heavy = {'blockdev._native', 'cffi', 'requests', '_cffi_backend'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"usage: ociblk " + command.encode() in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "COMMAND"),
        (["frobnicate"], 2, "frobnicate"),
        (["export", "x"], 2, "--output"),
        (["serve", "x"], 2, "--socket"),
        (["serve", "x", "--socket", "a", "--port", "1"], 2, "not allowed"),
        (["serve", "x", "--port", "1", "--on-error", "maybe"], 2, "maybe"),
        (["daemon", "--force"], 2, "--stop"),
        (["inspect", "/nonexistent"], 3, "/nonexistent"),
        (["inspect", "oci:/nonexistent"], 3, "/nonexistent"),
        (["inspect", "Not:A:Reference"], 2, "Not:A:Reference"),
        (["inspect", "/dev/null"], 2, "/dev/null"),
        (["inspect", __file__], 5, __file__),
        (["export", __file__, "-o", "-"], 5, "offset 0"),
        (["umount", "/nonexistent"], 3, "/nonexistent"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(words: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = run(*words, "--root", tmp_path) if words else run()
    assert done.returncode == code
    assert done.stdout == b""
    message = done.stderr.decode()
    assert message.startswith("ociblk: ")
    assert message.count("\n") == 1
    assert said in message
    assert "Traceback" not in message


_LONG = "n" * 300
_LONG_SOCKET = "/".join(["d" * 100] * 2) + "/" + "s" * 120


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["import", ".", "-o", "out"], 2, "."),
        (["import", "raw", "-o", "out", "--jobs", "0"], 2, "'0'"),
        (["import", "raw", "-o", _LONG], 2, _LONG),
        (["commit", ".", "index", "-o", "out"], 2, "."),
        (["commit", "data", ".", "-o", "out"], 2, "."),
        (["commit", "data", "index", "-o", "out", "--jobs", "-1"], 2, "-1"),
        (["compact", ".", "."], 2, "."),
        (["compact", "fifo", "index"], 2, "fifo"),
        (["seal", ".", "index"], 2, "."),
        (["merge", LAYER, "-o", "out", "--jobs", "0"], 2, "'0'"),
        (["export", LAYER, "-o", _LONG], 2, _LONG),
        (["push", ".", "127.0.0.1:1/a:1"], 2, "."),
        (["push", "fifo", "127.0.0.1:1/a:1"], 2, "fifo"),
        (["ps", "--root", _LONG], 2, _LONG),
        (["ps", "--root", f"{_LONG}/root"], 2, _LONG),
        (["serve", LAYER, "--socket", _LONG], 2, _LONG),
        (["serve", LAYER, "--socket", _LONG_SOCKET], 2, _LONG_SOCKET),
        (["serve", LAYER, "--port", "0", "--bind", ""], 2, "''"),
        (["serve", LAYER, "--port", "0", "--bind", "."], 2, "."),
        (["inspect", "/proc/self/mem"], 2, "/proc/self/mem"),
        (["ps", "--root", ""], 2, "empty"),
        (["umount", ""], 2, "empty"),
        (["mount", LAYER, ""], 2, "empty"),
        (["export", LAYER, "-o", ""], 2, "empty"),
        (["commit", "", "index", "-o", "out"], 2, "empty"),
        (["inspect", "oci:"], 2, "oci:DIR"),
        (["cache", "add", "oci:"], 2, "empty"),
        (["verify", "", "."], 2, "reading the image name"),
        (["push", "raw", "127.0.0.1:1/a:1", "--ca", ""], 2, "empty"),
        (["push", "raw", "127.0.0.1:1/a:1", "--ca", "."], 2, "certificates failed: .: "),
        (["push", "raw", "127.0.0.1:1/a:1", "--ca", "raw"], 2, "certificates failed: raw: "),
        (["push", "raw", "127.0.0.1:1/a:1", "--ca", "none"], 3, "certificates failed: none: "),
    ],
)
def test_a_name_that_makes_no_sense_is_the_callers_matter(
    words: list[str], code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "raw").write_bytes(bytes(512))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / _LONG_SOCKET).parent.mkdir(parents=True)
    create_pair(tmp_path / "data", tmp_path / "index", 1 << 20)
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-P", "-m", "blockdev", *map(str, words)]
    environment = {**os.environ, "OCIBLK_ROOT": str(tmp_path / "root")}
    try:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60, env=environment
        )
    finally:
        if (tmp_path / "root").exists():
            assert run("daemon", "--stop", "--root", tmp_path / "root").returncode == 0
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert said in done.stderr
    assert "unexpected" not in done.stderr
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "root"] == before


def test_a_message_is_kept_byte_for_byte(tmp_path: Path) -> None:
    create_pair(tmp_path / "data", tmp_path / "index", 1 << 20)
    command = f"{sys.executable} -m blockdev commit data index -o layer --codec none -m $'\\xff'"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent.parent)}
    subprocess.run(["bash", "-c", command], check=True, timeout=60, cwd=tmp_path, env=environment)
    assert (tmp_path / "layer").read_bytes()[:512].rstrip(b"\0").endswith(b"\xff")


def test_a_defect_is_one_line_and_a_traceback_only_when_asked_for() -> None:
    code = (
        "import sys; from blockdev import cli; from blockdev.cli import version\n"
        "version.run = lambda args: 1 / 0\n"
        "sys.exit(cli.main(['version']))"
    )
    for debug, traceback in (("0", False), ("1", True)):
        environment = {**os.environ, "OCIBLK_DEBUG": debug}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 8
        assert done.stderr.splitlines()[-1].startswith("ociblk: unexpected failure: ZeroDivisionError")
        assert ("Traceback" in done.stderr) is traceback


def test_an_interrupt_is_130() -> None:
    code = (
        "import os, signal, sys; from blockdev import cli; from blockdev.cli import version\n"
        "version.run = lambda args: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.main(['version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m blockdev export {LAYER} -o - | head -c 10 | wc -c"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("10", "")


@pytest.mark.parametrize("words", [("--json", "version"), ("version", "--json")])
def test_common_options_stand_before_or_after_the_command(words: tuple[str, ...]) -> None:
    assert json.loads(run(*words).stdout)["v"] == 1


def test_the_version_is_said_either_way() -> None:
    assert run("version").stdout == run("--version").stdout != b""


def test_inspect_describes_a_layer() -> None:
    found = json.loads(run("inspect", LAYER, "--json").stdout)
    assert (found["v"], found["size"], found["layers"][0]["zfile"]["codec"]) == (1, 16 << 20, "lz4")
    assert b"lz4/4096" in run("inspect", LAYER).stdout


# ---- export ----


def test_an_export_is_sparse_and_equals_the_stream(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    done = run("export", LAYER, "-o", raw)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    found = raw.stat()
    assert (found.st_size, found.st_blocks * 512 < found.st_size // 2) == (16 << 20, True)
    assert run("export", LAYER, "-o", "-").stdout == raw.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_an_export_of_4_tib_takes_no_time(tmp_path: Path) -> None:
    started = time.monotonic()
    assert run("export", DATA / "huge-4t.lsmt", "-o", tmp_path / "raw").returncode == 0
    assert (tmp_path / "raw").stat().st_size == 4 << 40
    assert time.monotonic() - started < 10


def test_an_existing_file_is_replaced_with_its_mode_kept(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"old")
    raw.chmod(0o604)
    link = tmp_path / "link"
    link.symlink_to(raw)
    assert run("export", LAYER, "-o", link).returncode == 0
    assert (raw.stat().st_size, stat.S_IMODE(raw.stat().st_mode), link.is_symlink()) == (16 << 20, 0o604, True)


def test_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    subprocess.run(
        ["bash", "-c", f"umask 027; {sys.executable} -m blockdev export {LAYER} -o {tmp_path}/raw"], check=True
    )
    assert stat.S_IMODE((tmp_path / "raw").stat().st_mode) == 0o640


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    broken = fixtures.folder() / "08-corrupt" / "z-block-crc.zlsmt"
    raw = tmp_path / "raw"
    raw.write_bytes(b"old")
    done = run("export", broken, "-o", raw)
    assert done.returncode == 5
    assert str(broken) in done.stderr.decode()
    assert raw.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(("output", "code"), [("absent/raw", 3), ("file/raw", 3), (".", 2), ("/dev/full", 8)])
def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, output: str, code: int) -> None:
    (tmp_path / "file").touch()
    done = run("export", LAYER, "-o", tmp_path / output)
    assert done.returncode == code
    assert done.stderr.count(b"\n") == 1
    assert str(tmp_path / output) in done.stderr.decode()


def test_an_export_to_a_device_writes_every_byte(tmp_path: Path) -> None:
    assert run("export", LAYER, "-o", "/dev/null").returncode == 0
