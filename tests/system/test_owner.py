# SPDX-License-Identifier: Apache-2.0
"""Real owner processes: one a root, started on demand, stopped in order, survivable."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockdev import client, control
from blockdev.errors import AccessDenied, DeviceError
from blockdev.root import LAYOUT_VERSION, Root
from tests.commands import WAIT, Run, Start, until


def asked_pid(root: Root) -> int:
    """Of the owner, which is started if there is none."""
    with client.connect(root) as connection:
        return int(connection.call("hello")["pid"])


def status(pid: int, field: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    raise KeyError(field)


def test_the_first_command_starts_an_owner_and_the_next_finds_it(root: Root) -> None:
    assert client.connect_to_live(root) is None
    pid = asked_pid(root)
    assert asked_pid(root) == pid
    assert root.holder() == f"ociblk-owner {pid}"


def test_an_owner_stands_on_its_own(root: Root) -> None:
    pid = asked_pid(root)
    assert os.getsid(pid) == pid
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert status(pid, "Umask") == "0077"


def test_an_idle_owner_is_small(root: Root) -> None:
    assert int(status(asked_pid(root), "RssAnon").split()[0]) <= 40 << 10


def test_clients_that_start_together_share_one_owner(root: Root) -> None:
    with ThreadPoolExecutor(8) as pool:
        processes = [
            pool.submit(
                subprocess.run,
                [sys.executable, "-m", "blockdev", "cache", "stat", "--root", str(root.path)],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            for _ in range(8)
        ]
    for process in processes:
        done = process.result()
        assert (done.returncode, done.stderr) == (0, "")
    assert root.log.read_text().count("owner started") == 1


def test_a_second_owner_is_refused_by_name_and_pid(root: Root, run: Run) -> None:
    pid = asked_pid(root)
    second = run("daemon")
    assert second.returncode == 7
    assert second.stderr.count("\n") == 1
    assert f"ociblk-owner {pid}" in second.stderr
    assert asked_pid(root) == pid


def test_a_root_of_a_newer_version_is_refused(root: Root, run: Run) -> None:
    root.prepare()
    root.version.write_text(f"{LAYOUT_VERSION + 1}\n")
    refused = run("cache", "stat")
    assert refused.returncode == 7
    assert refused.stderr.startswith("ociblk: ")
    assert "newer version" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_layout_named_as_the_root_keeps_its_blobs(root: Root, run: Run) -> None:
    (root.blobs / "sha256").mkdir(parents=True)
    (root.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    before = sorted(root.path.rglob("*"))
    refused = run("cache", "stat")
    assert (refused.returncode, refused.stderr.count("\n")) == (7, 1)
    assert "it is no root" in refused.stderr
    assert sorted(root.path.rglob("*")) == before


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_why_the_log_cannot_be_written_reaches_the_command(root: Root, run: Run, make: Callable[[Path], None]) -> None:
    root.prepare()
    make(root.log)
    refused = run("cache", "stat")
    assert refused.returncode == 8
    assert refused.stderr.startswith(f"ociblk: writing the log failed: {root.log}: ")
    assert refused.stderr.count("\n") == 1


def test_a_root_that_cannot_be_written_is_denied_in_one_line(tmp_path: Path, ociblk: str) -> None:
    (tmp_path / "file").touch()
    command = [ociblk, "cache", "stat", "--root", str(tmp_path / "file" / "root")]
    denied = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert denied.returncode == 4
    assert denied.stderr.count("\n") == 1
    assert str(tmp_path / "file") in denied.stderr


def test_what_an_owner_fails_at_reaches_the_command_that_started_it(root: Root) -> None:
    root.prepare()
    root.lock.mkdir()  # only the owner opens it
    with pytest.raises(AccessDenied, match="lock"):
        client.connect(root)
    root.lock.rmdir()


def test_a_root_with_a_long_path_works(tmp_path: Path) -> None:
    root = Root(tmp_path.joinpath(*["d" * 60] * 4))
    assert len(str(root.socket)) > 200
    try:
        assert asked_pid(root) == asked_pid(root)
    finally:
        command = [sys.executable, "-m", "blockdev", "daemon", "--stop", "--root", str(root.path)]
        subprocess.run(command, check=True, timeout=WAIT)


def test_after_a_killed_owner_the_next_command_starts_another(root: Root) -> None:
    pid = asked_pid(root)
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: not root.owned())
    assert root.socket.exists()
    assert asked_pid(root) != pid


def test_an_owner_that_dies_during_a_call_is_an_error_of_one_line(root: Root) -> None:
    with client.connect(root) as connection:
        pid = int(connection.call("hello")["pid"])
        os.kill(pid, signal.SIGSTOP)
        connection.send("ps")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DeviceError, match=f"{root.path}.*ended during ps"):
            connection.answer("ps", timeout=WAIT)


def test_ps_starts_no_owner(run: Run, root: Root) -> None:
    listed = run("ps", "--json")
    assert (listed.returncode, json.loads(listed.stdout)) == (0, {"v": 1, "devices": []})
    assert not root.path.exists()


def test_an_owner_that_leaves_takes_its_own_socket_only(root: Root) -> None:
    first = asked_pid(root)
    shutil.rmtree(root.path)
    second = asked_pid(root)
    assert second != first
    os.kill(first, signal.SIGTERM)
    assert until(lambda: not Path(f"/proc/{first}/cmdline").exists() or status(first, "State").startswith("Z"))
    assert asked_pid(root) == second


def test_an_owner_that_lives_and_cannot_be_reached_is_an_error(root: Root, run: Run) -> None:
    with client.connect(root) as kept:  # else it is idle, and leaves
        pid = kept.call("hello")["pid"]
        root.socket.unlink()
        listed = run("ps")
    assert (listed.returncode, listed.stderr.count("\n")) == (7, 1)
    assert f"ociblk-owner {pid} owns it and does not listen" in listed.stderr
    os.kill(pid, signal.SIGTERM)
    assert until(lambda: not root.owned())


def test_an_owner_that_hangs_up_without_an_answer_is_an_error(root: Root, run: Run) -> None:
    root.prepare()
    holder = subprocess.Popen(["flock", "--exclusive", str(root.lock), "cat"], stdin=subprocess.PIPE)
    assert until(root.owned)
    listener = control.listen(root.socket)
    with ThreadPoolExecutor(1) as pool:
        listing = pool.submit(run, "ps")
        while not listing.done():
            listener.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()
        assert listing.result().returncode == 7
    listener.close()
    holder.communicate(timeout=WAIT)


def test_an_owner_starts_for_a_caller_without_standard_streams(root: Root, ociblk: str) -> None:
    command = ["sh", "-c", 'exec "$0" cache stat --root "$1" <&- >&- 2>&-', ociblk, str(root.path)]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    assert root.owned()
    assert "ready" not in root.log.read_text()


def test_stop_without_an_owner_succeeds(run: Run, root: Root) -> None:
    assert run("daemon", "--stop").returncode == 0
    assert not root.path.exists()


def test_stop_returns_once_the_owner_has_gone(root: Root, run: Run) -> None:
    pid = asked_pid(root)
    stopped = run("daemon", "--stop")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert not root.owned()
    assert not root.socket.exists()
    assert not Path(f"/proc/{pid}/cmdline").exists() or status(pid, "State").startswith("Z")


def test_a_forced_stop_ends_an_owner_that_does_not_answer(root: Root, run: Run) -> None:
    os.kill(asked_pid(root), signal.SIGSTOP)
    started = time.monotonic()
    assert run("daemon", "--stop", "--force").returncode == 0
    assert time.monotonic() - started < 10
    assert not root.owned()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_foreground_owner_in_order(root: Root, ociblk: str, number: signal.Signals) -> None:
    owner = subprocess.Popen([ociblk, "daemon", "--root", str(root.path)], stderr=subprocess.PIPE, text=True)
    assert until(root.socket.exists)
    assert asked_pid(root) == owner.pid
    owner.send_signal(number)
    _, log = owner.communicate(timeout=WAIT)
    assert owner.returncode == 0
    assert "owner left" in log
    assert not root.socket.exists()
    assert root.holder() is None


def test_a_foreground_owner_ignores_what_it_was_started_to_ignore(root: Root, ociblk: str) -> None:
    deaf = ["sh", "-c", 'trap "" HUP INT; exec "$0" daemon --root "$1"', ociblk, str(root.path)]
    owner = subprocess.Popen(deaf, stderr=subprocess.PIPE, text=True)
    assert until(root.socket.exists)
    assert asked_pid(root) == owner.pid
    owner.send_signal(signal.SIGHUP)
    owner.send_signal(signal.SIGINT)
    assert asked_pid(root) == owner.pid
    owner.send_signal(signal.SIGTERM)
    _, log = owner.communicate(timeout=WAIT)
    assert log.count("owner stopping") == 1


@pytest.mark.parametrize("prefix", ["@", "/"])
def test_a_service_manager_is_told_when_callers_are_heard(
    tmp_path: Path, root: Root, start: Start, prefix: str
) -> None:
    address = prefix + str(tmp_path / "notify").lstrip("/")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))
        manager.settimeout(WAIT)
        owner = start("daemon", NOTIFY_SOCKET=address)
        assert manager.recv(100) == b"READY=1"
    assert asked_pid(root) == owner.pid


def test_an_owner_on_demand_leaves_when_idle_and_not_before(root: Root) -> None:
    with client.connect(root):
        assert not until(lambda: not root.owned(), limit=11.0)
    left = time.monotonic()
    assert until(lambda: not root.owned())
    assert time.monotonic() - left > 8


def test_an_owner_waits_for_the_one_that_is_leaving(root: Root) -> None:
    root.prepare()
    leaving = subprocess.Popen(
        ["flock", "--exclusive", str(root.lock), "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert until(root.owned)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(asked_pid, root)
        assert not until(starting.done, limit=1.0)
        leaving.communicate(timeout=WAIT)
        assert starting.result(timeout=WAIT) > 0


def test_a_caller_that_talks_nonsense_leaves_the_owner_well(root: Root) -> None:
    pid = asked_pid(root)
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b'{"v":99,"op":"ps"}\n', b'{"v":1}\n', b'{"v":1,"op":["ps"]}\n', b"{"):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(WAIT)
            caller.connect(str(root.socket))
            caller.sendall(nonsense)
            caller.shutdown(socket.SHUT_WR)
            answer = caller.makefile("rb").readline()
        assert not answer or "error" in json.loads(answer)
    assert asked_pid(root) == pid
