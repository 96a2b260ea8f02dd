# SPDX-License-Identifier: Apache-2.0
"""The owner is killed while its cache fills: whatever it was doing, the next one serves every byte right.

The registry pulls the trigger: when it has sent as many bytes as the round says, it kills the
owner in the middle of an answer, while other answers are on their way to the disk.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import client
from blockdev.client import OwnerGone
from blockdev.origin import locate
from blockdev.registry.credentials import Provider
from blockdev.root import Root
from formats import zfile
from formats.oci import digest_of
from tests.commands import COMMAND_WAIT
from tests.fakes.http_server import Answer, HttpServer, Seen, ranged
from tests.requires import scaled
from tests.stacks import Op, Plan, Stack

ROUNDS = scaled(9, 201)  # a third of each kind
_OPS = tuple(Op(number * 1500, 1400, 2 * number + 1) for number in range(8))  # 5.5 MiB that no codec makes smaller
_SIZE = 12000  # sectors
PLANS = [
    Plan(_SIZE, _OPS),
    Plan(_SIZE, _OPS, zfile=zfile.Options(verify=False)),
    Plan(_SIZE, _OPS, zfile=zfile.Options(verify=True)),
]


class _Trigger(threading.Event):
    """An answer's gate that goes off once it is reached."""

    def __init__(self, fire: Callable[[], object]) -> None:
        super().__init__()
        self._fire = fire

    def wait(self, timeout: float | None = None) -> bool:
        self._fire()
        return True


class _Registry:
    """Serves the blobs, and calls `fire` when it has sent `fuse` more bytes of them."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self._fuse = -1
        self._fire: Callable[[], object] = bool
        self._lock = threading.Lock()
        self.server = HttpServer(self._answer)

    def arm(self, fuse: int, fire: Callable[[], object]) -> None:
        self._fuse, self._fire = fuse, fire

    def _answer(self, seen: Seen) -> Answer:
        answer = ranged(seen, self.blobs[seen.path.rpartition("/")[2]])
        with self._lock:
            before, self._fuse = self._fuse, self._fuse - len(answer.body)
        if self._fuse < 0 <= before:
            answer.gate, answer.hold_at = _Trigger(self._fire), before
        return answer


@pytest.fixture(scope="module")
def registry() -> Iterator[_Registry]:
    registry = _Registry()
    yield registry
    registry.server.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, registry: _Registry) -> list[tuple[Path, str, bytes]]:
    """Of each kind: a config that names its blob, the blob's digest, and the disk."""
    images = []
    for plan in PLANS:
        blob = plan.build()
        digest = digest_of(blob)
        registry.blobs[digest] = blob
        config = tmp_path_factory.mktemp("config") / "config.v1.json"
        url = f"http://{registry.server.host}/v2/app/blobs"
        config.write_text(json.dumps({"repoBlobUrl": url, "lowers": [{"digest": digest, "size": len(blob)}]}))
        images.append((config, digest, Stack((plan,)).model().read_at(0, _SIZE * 512)))
    return images


def _export(owner: client.Connection, config: Path, out: Path) -> None:
    with locate(str(config)) as origin, open(out, "wb") as file:
        image, fds = origin.to_wire()
        access = {"plain_http": False, "ca": "", "credentials": Provider().to_json()}
        body = {"image": image, "policy": "eio:30s", "access": access, "output": str(out), "made": True}
        owner.call("export", body, [*fds, file.fileno()], timeout=COMMAND_WAIT)


def _kill(pid: int) -> None:
    """Return when it is dead: it shall not see another byte."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _killed_while_filling(root: Root, config: Path, registry: _Registry, fuse: int) -> None:
    with client.connect(root) as owner:
        pid = owner.call("hello")["pid"]
        registry.arm(fuse, lambda: _kill(pid))
        with pytest.raises(OwnerGone):
            _export(owner, config, root.path / "cut-off")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL  # our own child: connect() started it


def _read_by_the_next(root: Root, config: Path, out: Path) -> int:
    """Have another owner read it all, and find nothing bad; the bytes that it had to fetch."""
    with client.connect(root) as owner:
        pid = owner.call("hello")["pid"]
        found = owner.call("fsck", {"names": [], "digests": False, "repair": False}, timeout=COMMAND_WAIT)
        assert found["bad"] == []
        _export(owner, config, out)
        (blob,) = owner.call("cache stat")["blobs"]
        owner.call("stop", {"force": True})
    os.waitpid(pid, 0)
    assert blob["present"] <= blob["size"]
    return int(blob["size"] - found["bytes"])


@pytest.mark.timeout(1800)  # seconds: the full count, on a busy machine
def test_every_byte_is_right_after_a_kill(
    root: Root,
    tmp_path: Path,
    registry: _Registry,
    images: list[tuple[Path, str, bytes]],
    record_measured: Callable[[str, dict[str, object]], None],
) -> None:
    kept = 0
    for number in range(ROUNDS):
        config, digest, disk = images[number % len(images)]
        size = len(registry.blobs[digest])
        _killed_while_filling(root, config, registry, random.Random(number).randrange(size))
        missing = _read_by_the_next(root, config, tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == disk, f"round {number}"
        assert missing > 0, f"round {number}: the cache was full"
        kept += size - missing
        shutil.rmtree(root.path)
    assert kept > 0
    record_measured("kill", {"rounds": ROUNDS, "bytes_kept": kept})
