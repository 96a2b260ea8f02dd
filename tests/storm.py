# SPDX-License-Identifier: Apache-2.0
"""Readers and a pull through an owner of its own, while the registry's front misbehaves; and what was asked of it.

    storm.round(seconds)   cold cache: mount, 8 readers and a pull, umount, prune
    storm.requested        accounts of all rounds so far
    storm.left()           what the owner still holds

The owner runs in a mount namespace whose /etc/hosts is ours and whose resolver asks nothing
else, so that a name can be gone: getaddrinfo() then says what it says for an unknown host.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockdev import client
from blockdev.engine import EXTENT_SIZE
from blockdev.fetch.pool import THREADS
from blockdev.root import Root
from tests.commands import COMMAND_WAIT, WAIT, until
from tests.fakes.fault_proxy import CALM, LOSING, Fault, FaultProxy, Plan, Served
from tests.leaks import FORGET_MOUNTS
from tests.registries import Registry
from tests.requires import scaled

READERS = 8
READ_MAX = 128 << 10  # bytes of one read
POLICY = f"eio:{scaled(3, 15)}s"  # a stall ends after 10
PULL_SECONDS = scaled(3, 30)
LOGIN = "ann:Pa55word-of-the-storm"
NAMES = ("registry.storm.test", "tokens.storm.test", "store.storm.test")
ALLOWANCE = THREADS + 3  # requests on their way while the first refusal is: fetch threads, the probe, two commands
OPEN_FAILURES = {4, 5, 6}  # denied, corrupt, not delivered: what an open may end with while faults are on
CUT_OFF = {-signal.SIGTERM, 128 + signal.SIGTERM}
READ_WAIT = 90.0  # seconds that one read may take: its policy, and a stall or two that began before
_PRIVATE = f"""{FORGET_MOUNTS}
mount --bind "$1" /etc/hosts
mount --bind "$2" /etc/nsswitch.conf
shift 2
exec "$@"
"""
_DROPPED = re.compile(r"blob dropped digest=\S+ extents=(\d+)")


@dataclass
class Account:
    """Bytes of blobs: asked for, needed (different ones), and lost to faults."""

    requested: int = 0
    needed: int = 0
    lost: int = 0

    def add(self, other: Account) -> None:
        self.requested += other.requested
        self.needed += other.needed
        self.lost += other.lost


@dataclass
class Readings:
    """What readers saw."""

    right: int = 0
    failed: int = 0  # with EIO
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Readings) -> None:
        self.right += other.right
        self.failed += other.failed
        self.wrong += other.wrong


@dataclass
class Left:
    """What a process holds."""

    threads: int
    descriptors: int
    sockets: int
    anonymous: int  # bytes of RSS


class Storm:
    """One owner, one image of one blob, one proxy. close() it."""

    def __init__(self, folder: Path, ociblk: str, registry: Registry, disk: Path, layer: Path) -> None:
        self.disk = disk.read_bytes()
        self.outputs: list[str] = []
        self.readings = Readings()
        self.account = Account()
        self.opens = self.opens_failed = self.pulls = self.pulls_failed = self.rounds = 0
        self._ociblk = ociblk
        self._root = folder / "root"
        self._file = folder / "file"
        self._log_path = folder / "owner.log"
        self._log_read = 0
        self._served = 0
        self._hosts = folder / "hosts"
        self._resolve(True)
        self.proxy = FaultProxy(registry.host, login=LOGIN, redirects=True, names=NAMES, resolve=self._resolve)
        self.reference = f"{self.proxy.host}/app:1"
        push = [ociblk, "push", str(layer), f"{registry.host}/app:1", "--root", str(folder / "pusher")]
        subprocess.run(push, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", str(folder / "pusher")], check=True)
        login = {"auth": base64.b64encode(LOGIN.encode()).decode()}
        (folder / "auth.json").write_text(json.dumps({"auths": {self.proxy.host: login}}))
        self._environment = {**os.environ, "REGISTRY_AUTH_FILE": str(folder / "auth.json")}
        self._owner = self._start_owner(folder)
        self.begin = self.left()

    def _start_owner(self, folder: Path) -> subprocess.Popen[bytes]:
        switch = folder / "nsswitch.conf"
        switch.write_text("hosts: files\n")
        command = ["unshare", "--mount", "sh", "-e", "-c", _PRIVATE, "sh", str(self._hosts), str(switch)]
        command += [self._ociblk, "daemon", "--debug", "--root", str(self._root)]
        with open(self._log_path, "wb") as log:
            owner = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        assert until(lambda: "owner started" in self._log_path.read_text())  # it has opened all that it keeps open
        return owner

    def _resolve(self, known: bool) -> None:
        """In place: it is this very file that the owner's /etc/hosts is."""
        lines = [f"127.0.0.1 {name}\n" for name in NAMES] if known else ["# nobody\n"]
        self._hosts.write_text("".join(lines))

    def close(self) -> None:
        subprocess.run([self._ociblk, "daemon", "--stop", "--force", "--root", str(self._root)], check=True)
        self._owner.wait(WAIT)
        self.proxy.close()

    # ---- rounds ----

    def round(self, seconds: float, seed: int, plan: Plan = CALM, *, rough_open: bool = False) -> Readings:
        """Open the image with a cold cache; read and pull for so long under the plan's faults; close.

        An open that fails, as under faults it may, is a round without readers.
        """
        self.rounds += 1
        self.ask("cache prune")
        readings = Readings()
        self.proxy.plan = plan if rough_open else CALM
        mounted = self.run("mount", "--raw", self.reference, str(self._file), "--plain-http", "--on-error", POLICY)
        self.proxy.plan = plan
        if mounted.returncode == 0:
            self.opens += 1
            self._read(readings, seconds, seed)
            assert self.run("umount", str(self._file)).returncode == 0, self.outputs[-1]
        else:
            assert mounted.returncode in OPEN_FAILURES, self.outputs[-1]
            self.opens_failed += 1
        self.proxy.plan = CALM
        assert until(lambda: not self.ask("ps")["devices"], READ_WAIT), self._state()
        assert until(lambda: not any(blob["in_use"] for blob in self.ask("cache stat")["blobs"]), READ_WAIT), (
            self._state()
        )
        self.readings.add(readings)
        self.account.add(self._take_account())
        return readings

    def _read(self, readings: Readings, seconds: float, seed: int) -> None:
        end = time.monotonic() + seconds
        seen = [Readings() for _ in range(READERS)]
        threads = [
            threading.Thread(target=self._reader, args=(seen[number], random.Random(f"{seed}/{number}"), end))
            for number in range(READERS)
        ]
        threads.append(threading.Thread(target=self._pull))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + READ_WAIT)
            assert not thread.is_alive(), "a read never ends"
        for one in seen:
            readings.add(one)

    def _reader(self, seen: Readings, chance: random.Random, end: float) -> None:
        with open(self._file, "rb", buffering=0) as file:
            while time.monotonic() < end:
                offset = chance.randrange(len(self.disk))
                length = min(chance.randrange(1, READ_MAX), len(self.disk) - offset)
                try:
                    content = os.pread(file.fileno(), length, offset)
                except OSError as error:
                    seen.failed += 1
                    if error.errno != errno.EIO:
                        seen.wrong.append(f"{offset}+{length}: {error}")
                    continue
                if content != self.disk[offset : offset + len(content)]:
                    seen.wrong.append(f"{offset}+{length}: wrong bytes")
                elif len(content) == length:
                    seen.right += 1
                else:  # the kernel has read up to a page that failed
                    seen.failed += 1

    def _pull(self) -> None:
        """Everything, once; cut off if it takes too long."""
        self.pulls += 1
        words = ("pull", "--complete", self.reference, "--plain-http", "--on-error", POLICY)
        pulled = self.run(*words, seconds=PULL_SECONDS)
        self.pulls_failed += pulled.returncode != 0
        if pulled.returncode not in (0, *OPEN_FAILURES, *CUT_OFF) or (
            pulled.returncode == 0 and "verified" not in pulled.stdout
        ):
            self.readings.wrong.append(self.outputs[-1])

    def _state(self) -> str:
        """For whoever has to find out why something does not end."""
        log = self._log_path.read_text().splitlines()[-40:]
        return "\n".join([json.dumps(self.ask("ps")), json.dumps(self.ask("cache stat")), *self.outputs[-6:], *log])

    def ask(self, op: str) -> dict[str, Any]:
        """The owner's answer, without a process for it."""
        connection = client.connect_to_live(Root(self._root))
        assert connection, "the owner has gone"
        with connection:
            return connection.call(op)

    def run(self, *words: str, seconds: float = COMMAND_WAIT + READ_WAIT) -> subprocess.CompletedProcess[str]:
        """A command of ours on the owner, terminated after so long; what it said is kept."""
        command = [self._ociblk, *words, "--root", str(self._root)]
        pipe = subprocess.PIPE
        running = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self._environment)
        try:
            said = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            running.terminate()
            said = running.communicate(timeout=WAIT)
        self.outputs.append(f"{words[0]}: {running.returncode}: {''.join(said)}")
        return subprocess.CompletedProcess(command, running.returncode, *said)

    # ---- accounts ----

    def _take_account(self) -> Account:
        """Of what was served since the last time: one cold cache."""
        served = self.proxy.served[self._served :]
        self._served += len(served)
        log = self._log_path.read_text()
        dropped = sum(int(extents) for extents in _DROPPED.findall(log[self._log_read :]))
        self._log_read = len(log)
        asked = [one for one in served if one.length]
        needed: set[int] = set()
        for one in asked:
            assert one.range
            needed.update(range(one.range[0] // EXTENT_SIZE, one.range[1] // EXTENT_SIZE + 1))
        lost = sum(one.length for one in asked if one.fault in LOSING)
        return Account(sum(one.length for one in asked), len(needed) * EXTENT_SIZE, lost + dropped * EXTENT_SIZE)

    def tally(self) -> dict[str, int]:
        """Figures so far."""
        return {
            "rounds": self.rounds,
            "reads_right": self.readings.right,
            "reads_eio": self.readings.failed,
            "opens": self.opens,
            "opens_failed": self.opens_failed,
            "pulls": self.pulls,
            "pulls_failed": self.pulls_failed,
            "requests": len(self.proxy.served),
            "requested_bytes": self.account.requested,
            "needed_bytes": self.account.needed,
            "lost_bytes": self.account.lost,
        }

    def secrets_told(self) -> list[str]:
        """Secrets that stand in the owner's log or in what a command said."""
        said = [self._log_path.read_text(), *self.outputs]
        return [secret for secret in self.proxy.secrets if any(secret in text for text in said)]

    def left(self) -> Left:
        """What the owner holds now."""
        process = Path(f"/proc/{self._owner.pid}")
        targets = []
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                targets.append(str(descriptor.readlink()))
        anonymous = int((process / "status").read_text().partition("RssAnon:")[2].split()[0]) << 10
        sockets = sum(target.startswith("socket:") for target in targets)
        return Left(len(list((process / "task").iterdir())), len(targets), sockets, anonymous)


def impatience(served: list[Served]) -> list[str]:
    """Where a host that had told us to wait was asked more than once a second all the same.

    The host's own time counts, from its first refusal to the end of what it said. What was on its
    way to it then cannot be called back: ALLOWANCE requests.
    """
    found = []
    for host in {one.host for one in served}:
        asked = sorted((one for one in served if one.host == host), key=lambda one: one.at)
        start, end, count = 0.0, 0.0, 0
        for one in asked:
            if one.at < end:
                count += 1
            if one.told and one.at >= end:
                start, end, count = one.at, one.at + one.told, 0
            if count > ALLOWANCE + (end - start):
                found.append(f"{host}: {count} requests within {end - start:.1f} s")
    return found


def met(served: list[Served], faults: set[Fault]) -> set[Fault]:
    """Which of the faults some request has met."""
    return faults & {one.fault for one in served if one.fault}
