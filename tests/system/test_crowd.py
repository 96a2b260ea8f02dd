# SPDX-License-Identifier: Apache-2.0
"""More callers than an owner takes, and a forced stop: who is refused is told, and who is at work is not killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from blockdev import client, control, daemon
from blockdev.cli import daemon as stopping
from blockdev.control import Channel
from blockdev.errors import EngineError
from blockdev.root import Root
from tests.commands import WAIT, Run, Start, ended, owner_pid, until, uri_of
from tests.requires import requires_command

CONTENT = os.urandom(1 << 20)
WRITE = "h.connect_uri({0!r})\nh.pwrite(open({1!r}, 'rb').read(), 0)\n"

# An owner that is stuck: it listens, and neither answers nor heeds what would end it in order.
STUCK = """
import signal, sys
from pathlib import Path
from blockdev import control
from blockdev.errors import EngineError
from blockdev.root import Root
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
root = Root(Path(sys.argv[1]))
root.prepare()
root.acquire("ociblk-owner", 1)
listener = control.listen(root.socket)
print(flush=True)
sys.stdin.read()
"""

# In a PID namespace where the owner's number is a bystander's.
STOP_ELSEWHERE = """
mount -t proc proc /proc
echo $(($1 - 1)) > /proc/sys/kernel/ns_last_pid
sleep 60 &
[ $! = $1 ]
"$2" daemon --stop --force --root "$3" || echo code $?
kill $!
"""


@pytest.fixture
def callers(root: Root) -> Iterator[Callable[[int], Channel]]:
    """callers(n) has so many say hello and no more; the last of them."""
    with ExitStack() as stack:

        def call(count: int) -> Channel:
            for _ in range(count):
                channel = stack.enter_context(closing(control.connect(root.socket, WAIT)))
                channel.send({"op": "hello"})
                answer = channel.receive(WAIT)
                assert answer is not None
                control.raise_error(answer.body)
            return channel

        yield call


def test_who_is_one_caller_too_many_is_told(root: Root, run: Run, callers: Callable[[int], Channel]) -> None:
    client.connect(root).close()
    pid = owner_pid(root)
    last = callers(daemon._CALLERS_MAX)
    for command in (["ps"], ["daemon", "--stop", "--force"]):
        refused = run(*command)
        assert (refused.returncode, refused.stderr.count("\n")) == (8, 1)
        assert f"it has {daemon._CALLERS_MAX} callers already" in refused.stderr
    assert owner_pid(root) == pid
    last.close()
    assert until(lambda: run("ps").returncode == 0)


def test_what_ends_things_is_done_when_nothing_new_may_begin(
    root: Root, run: Run, callers: Callable[[int], Channel]
) -> None:
    client.connect(root).close()
    callers(daemon._CALLERS_MAX - daemon._KEPT_FOR_ENDING)
    refused = run("cache", "stat")
    assert refused.returncode == 8
    assert refused.stderr == "ociblk: cache stat failed: the owner has too many callers already\n"
    assert run("ps").returncode == 0
    assert run("daemon", "--stop").returncode == 0
    assert not root.owned()


def test_a_forced_stop_with_many_callers_loses_nothing(
    tmp_path: Path, root: Root, run: Run, start: Start, callers: Callable[[int], Channel]
) -> None:
    requires_command("nbdsh")
    pair, content = [tmp_path / "data", tmp_path / "index"], tmp_path / "content"
    content.write_bytes(CONTENT)
    assert run("create", *pair, "--size", "1M").returncode == 0
    serving = start("serve", "scratch", "--upper", *pair, "--rw", "--socket", tmp_path / "socket")
    uri = uri_of(serving)
    writer = ["nbdsh", "-c", WRITE.format(uri, str(content))]
    subprocess.run(writer, check=True, timeout=WAIT, env={"PATH": "/usr/bin:/bin"})
    callers(daemon._CALLERS_MAX - 1)  # the export's own is not counted
    stopped = run("daemon", "--stop", "--force")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert ended(serving)[0] == 7
    layer, out = tmp_path / "layer", tmp_path / "out"
    assert run("commit", *pair, "-o", layer).returncode == 0
    assert run("export", layer, "-o", out).returncode == 0
    assert out.read_bytes() == CONTENT


def test_who_comes_while_the_queue_is_full_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_BACKLOG", 0)
    path = tmp_path / "socket"
    with control.listen(path) as listener, closing(control.connect(path, WAIT)):
        accept = threading.Timer(0.2, lambda: listener.accept()[0].close())
        accept.start()
        control.connect(path, WAIT).close()
        accept.join()


def test_an_owner_that_is_killed_for_its_silence_is_an_error(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ANSWER_LIMIT", 0.2)
    monkeypatch.setattr(client, "HELLO_LIMIT", 0.5)
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(root.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as stuck:
        assert stuck.stdout
        stuck.stdout.readline()
        with pytest.raises(EngineError, match=f"ociblk-owner {stuck.pid} did not answer and was killed"):
            stopping._stop(root, force=True)
        assert stuck.wait(WAIT) == -signal.SIGKILL


def test_a_forced_stop_from_another_pid_namespace_harms_no_bystander(root: Root, ociblk: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, for a PID namespace")
    client.connect(root).close()
    pid = owner_pid(root)
    os.kill(pid, signal.SIGSTOP)
    try:
        elsewhere = ["unshare", "--pid", "--fork", "--mount", "sh", "-ec", STOP_ELSEWHERE, "-"]
        done = subprocess.run(
            [*elsewhere, str(pid), ociblk, str(root.path)], capture_output=True, text=True, check=False, timeout=WAIT
        )
        assert (done.returncode, done.stdout) == (0, "code 7\n")
        assert f"ociblk-owner {pid} is in another PID namespace" in done.stderr
        assert root.owned()
    finally:
        os.kill(pid, signal.SIGCONT)
