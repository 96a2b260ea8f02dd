# SPDX-License-Identifier: Apache-2.0
"""Opened, read and closed over and over, by every way in: the owner is afterwards what it was before.

Descriptors, threads, sockets, loop devices and mounts are counted between rounds, when nothing is
open; resident memory may grow by a tenth (in a full run). Connections to a registry are kept for
a while on purpose: they are counted apart, and their number is bounded.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import pytest

from blockdev import client
from blockdev.root import Root
from tests import leaks, requires
from tests.commands import WAIT, Run, Start, devices, ended, owner_pid, until, uri_of
from tests.registries import Registry
from tests.requires import scaled

MIB = 1 << 20
ROUNDS = scaled(4, 1000)
WARM_UP = scaled(8, 100)  # each way in with each image; then long enough for every thread's heap to have been used
MINUTES = scaled(0, 30)
SAMPLES = 20
KEPT_MAX = 16  # connections: one for each fetch thread, and as many for manifests and tokens
MEMORY_PERCENT = scaled(30, 10)  # a heap that is first used after a short warm-up takes 4 MiB


@dataclass(frozen=True)
class Held:
    """What the owner and the kernel hold; `resident` in KiB. `kept`: connections over TCP, and in no other count."""

    kept: int
    descriptors: int
    sockets: int
    threads: int
    loops: int
    mounts: int
    resident: int

    @property
    def countable(self) -> tuple[int, ...]:
        return self.descriptors, self.sockets, self.threads, self.loops, self.mounts


def held_by(pid: int, run: Path) -> Held:
    kinds = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kinds.append(str(entry.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
    # Not by the table of TCP: a connection that the registry has reset is a socket still, but in no table.
    table = Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    local = {f"socket:[{line.split()[6]}]" for line in table}
    kept = sum(kind.startswith("socket:") and kind not in local for kind in kinds)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Held(
        kept=kept,
        descriptors=len(kinds) - kept,
        sockets=sum(kind.startswith("socket:") for kind in kinds) - kept,
        threads=int(status["Threads"]),
        loops=len(leaks.loops(run)),
        mounts=len(leaks.mounts(run)),
        resident=int(status["VmRSS"].split()[0]),
    )


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory, ociblk: str) -> Path:
    """An EROFS of one small and one larger file."""
    requires.requires_command("mkfs.erofs")
    folder = tmp_path_factory.mktemp("soak")
    tree = folder / "tree"
    tree.mkdir()
    (tree / "small").write_text("a small file\n")
    (tree / "large").write_bytes(os.urandom(4 * MIB))
    subprocess.run(["mkfs.erofs", folder / "raw", tree], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([ociblk, "import", folder / "raw", "-o", folder / "layer", "--tar"], check=True)
    return folder / "layer"


class Rounds:
    """The ways in. Each leaves nothing open."""

    def __init__(self, run: Run, start: Start, folder: Path, reference: str, layer: Path) -> None:
        self.run = run
        self.start = start
        self.folder = folder
        self.images = (reference, str(layer))
        self.reference = reference
        self.mnt = folder / "mnt"
        self.mnt.mkdir()
        self._others: list[Callable[[str], None]] = [self._nbd, self._raw, self._pull, self._export]

    def one(self, number: int) -> None:
        image = self.images[number // len(self._others) % len(self.images)]
        self._mount(image)
        self._others[number % len(self._others)](image)

    def _do(self, *words: str | Path) -> None:
        done = self.run(*words)
        assert (done.returncode, done.stderr) == (0, ""), words

    def _mount(self, image: str) -> None:
        self._do("mount", image, self.mnt)
        assert (self.mnt / "small").read_text() == "a small file\n"
        assert len((self.mnt / "large").read_bytes()) == 4 * MIB
        self._do("umount", self.mnt)

    def _raw(self, image: str) -> None:
        file = self.folder / "file"
        self._do("mount", "--raw", image, file)
        assert len(file.read_bytes()) > 4 * MIB
        self._do("umount", file)

    def _nbd(self, image: str) -> None:
        serving = self.start("serve", image, "--socket", self.folder / "socket")
        subprocess.run(["nbdcopy", uri_of(serving), "null:"], check=True, timeout=WAIT)
        serving.terminate()
        assert ended(serving) == (0, "")

    def _pull(self, image: str) -> None:
        assert until(lambda: devices(self.run) == [])
        self._do("cache", "prune")
        self._do("pull", self.reference, "--complete")

    def _export(self, image: str) -> None:
        self._do("export", image, "-o", self.folder / "raw")
        self._do("inspect", image)


@pytest.mark.timeout(4 * 3600)
def test_nothing_grows(
    tmp_path: Path,
    run: Run,
    start: Start,
    root: Root,
    registry: Registry,
    layer: Path,
    record_measured: Callable[[str, dict[str, object]], None],
) -> None:
    requires.requires_mount()
    requires.requires_command("nbdcopy")
    reference = f"{registry.host}/app:1"
    assert run("push", layer, reference).returncode == 0
    with client.connect(root):  # so that it does not leave between rounds
        figures = soak(Rounds(run, start, tmp_path, reference, layer), owner_pid(root))
    record_measured("soak", figures)


def soak(rounds: Rounds, pid: int) -> dict[str, object]:
    """Do all rounds; the figures, once they have been judged."""
    run_folder = Path(os.environ[leaks.RUN_VARIABLE])

    def idle() -> Held:
        assert until(lambda: devices(rounds.run) == [])
        return held_by(pid, run_folder)

    for number in range(WARM_UP):
        rounds.one(number)
    first, started, number = idle(), time.monotonic(), 0
    samples = [asdict(first)]
    while number < ROUNDS or time.monotonic() - started < 60 * MINUTES:
        rounds.one(number)
        number += 1
        if number % max(1, ROUNDS // SAMPLES) == 0:
            samples.append(asdict(idle()))
    assert until(lambda: idle().countable == first.countable), (idle(), first)
    last = idle()
    assert last.kept <= KEPT_MAX
    # Buffers of 2 MiB come and go, so single samples say little; and memory that the kernel got back is no leak.
    few = len(samples) // 4
    begun, finally_held = (median(int(held["resident"]) for held in some) for some in (samples[:few], samples[-few:]))
    assert 100 * (finally_held - begun) <= MEMORY_PERCENT * begun, json.dumps(samples)
    minutes = round((time.monotonic() - started) / 60, 1)
    return {
        "rounds": number,
        "minutes": minutes,
        "warm_up": WARM_UP,
        "resident_kib": [begun, finally_held],
        "first": asdict(first),
        "last": asdict(last),
        "samples": samples,
    }
