# SPDX-License-Identifier: Apache-2.0
"""serve, mount, umount, ps and daemon --stop on local images, with real owners and a real kernel."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from blockdev.root import Root
from tests import fixtures, leaks, requires
from tests.commands import WAIT, Run, Start, devices, ended, mounted, owner_pid, until, uri_of

DATA = fixtures.DATA
LAYER = DATA / "a-l2.lz4-4k.zlsmt"
SIZE = 16 << 20


def greets(sock: socket.socket) -> bool:
    """Whether an NBD server is at the other end."""
    sock.settimeout(WAIT)
    return sock.recv(8) == b"NBDMAGIC"


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def exported(run: Run, image: str | Path, to: Path) -> bytes:
    assert run("export", image, "-o", to).returncode == 0
    return to.read_bytes()


# ---- serve ----


def test_serve_prints_one_uri_that_is_usable_at_once_and_ends_well(tmp_path: Path, run: Run, start: Start) -> None:
    requires.requires_command("nbdcopy")
    serving = start("serve", LAYER, "--socket", tmp_path / "s", "--export", "name")
    assert uri_of(serving) == f"nbd+unix:///name?socket={tmp_path}/s"
    for uri in (f"nbd+unix:///name?socket={tmp_path}/s", f"nbd+unix:///?socket={tmp_path}/s"):
        subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True, timeout=60)
        assert (tmp_path / "copy").read_bytes() == exported(run, LAYER, tmp_path / "raw")
    assert [(device["front_end"], device["state"], device["mode"]) for device in devices(run)] == [
        ("nbd", "live", "local")
    ]
    serving.send_signal(signal.SIGTERM)
    assert ended(serving) == (0, "")
    assert not (tmp_path / "s").exists()
    assert devices(run) == []


def test_a_path_that_is_no_text_breaks_neither_the_uri_nor_ps(tmp_path: Path, run: Run, start: Start) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b\n")
    Path(folder).mkdir()
    layer = Path(folder, "layer")
    layer.write_bytes(LAYER.read_bytes())
    serving = start("serve", layer, "--socket", f"{folder}/s")
    assert uri_of(serving) == f"nbd+unix:///?socket={tmp_path}/%FF%1B%0A/s"
    shown = run("ps", PYTHONIOENCODING="utf-8:strict")
    assert (shown.returncode, len(shown.stdout.splitlines())) == (0, 2)
    assert f"{tmp_path}/\\xff\\x1b\\n/layer" in shown.stdout
    assert devices(run)[0]["image"] == str(layer)
    serving.terminate()
    assert ended(serving) == (0, "")


def test_an_export_whose_name_is_no_text_is_refused(tmp_path: Path, run: Run) -> None:
    refused = run("serve", LAYER, "--socket", tmp_path / "s", "--export", os.fsdecode(b"ex\xffp"))
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "not UTF-8" in refused.stderr


def test_serve_says_the_uri_as_json_too(tmp_path: Path, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s", "--json")
    assert json.loads(uri_of(serving)) == {"v": 1, "uri": f"nbd+unix:///?socket={tmp_path}/s"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_client_that_stays_connected_does_not_keep_serve(
    tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        assert greets(client)
        serving.send_signal(number)
        assert ended(serving) == (0, "")


def test_serve_on_tcp_is_on_loopback_and_picks_a_port(start: Start) -> None:
    serving = start("serve", LAYER, "--port", "0", "--export", "a b")
    uri = uri_of(serving)
    assert uri.startswith("nbd://127.0.0.1:")
    assert uri.endswith("/a%20b")
    port = int(uri.removeprefix("nbd://127.0.0.1:").partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as client:
        assert greets(client)
    serving.terminate()
    assert ended(serving) == (0, "")


def test_a_port_in_use_is_refused(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = run("serve", LAYER, "--port", str(taken.getsockname()[1]))
    assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (7, 1, "")


@pytest.mark.parametrize("words", [("--port", "70000"), ("--port", "1", "--bind", "no.such.host.invalid")])
def test_an_address_that_is_none_is_refused(run: Run, words: tuple[str, ...]) -> None:
    assert run("serve", LAYER, *words).returncode == 2


def test_a_socket_left_behind_is_replaced(tmp_path: Path, start: Start) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    serving.terminate()
    assert ended(serving) == (0, "")


def test_a_socket_in_use_is_refused_and_left_alone(tmp_path: Path, run: Run, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    refused = run("serve", LAYER, "--socket", tmp_path / "s")
    assert (refused.returncode, refused.stderr.count("\n")) == (7, 1)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        assert greets(client)


def test_a_socket_is_not_taken_for_stale_that_another_has_just_made(tmp_path: Path, start: Start) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    turn = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    files = Path(f"/proc/{serving.pid}/fd")
    assert until(lambda: any(file.resolve() == tmp_path for file in files.iterdir()))  # it waits for its turn
    (tmp_path / "s").unlink()
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(tmp_path / "s"))
        live.listen()
        os.close(turn)
        code, errors = ended(serving)
        assert (code, errors) == (7, f"ociblk: listening failed: {tmp_path / 's'}: a server listens there\n")
    assert (tmp_path / "s").exists()


def test_a_file_in_the_place_of_the_socket_is_refused_and_left_alone(tmp_path: Path, run: Run) -> None:
    (tmp_path / "s").write_text("mine")
    assert run("serve", LAYER, "--socket", tmp_path / "s").returncode == 7
    assert (tmp_path / "s").read_text() == "mine"


def test_serve_works_at_a_path_too_long_for_a_socket(tmp_path: Path, start: Start) -> None:
    place = tmp_path.joinpath(*["d" * 60] * 3)
    place.mkdir(parents=True)
    serving = start("serve", LAYER, "--socket", place / "s")
    assert uri_of(serving).endswith("/s")
    serving.terminate()
    assert ended(serving) == (0, "")
    assert not (place / "s").exists()


def test_an_export_ends_with_the_command_that_made_it(tmp_path: Path, run: Run, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    serving.kill()
    assert until(lambda: devices(run) == [])
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(tmp_path / "s"))


def test_serve_ends_with_one_line_when_its_owner_dies(tmp_path: Path, root: Root, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    os.kill(owner_pid(root), signal.SIGKILL)
    code, errors = ended(serving)
    assert (code, errors.count("\n")) == (7, 1)
    assert not (tmp_path / "s").exists()


def test_stop_with_a_live_export_needs_force(tmp_path: Path, root: Root, run: Run, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    uri = uri_of(serving)
    refused = run("daemon", "--stop")
    assert refused.returncode == 7
    assert uri in refused.stderr
    assert len(devices(run)) == 1
    assert run("daemon", "--stop", "--force").returncode == 0
    assert not root.owned()
    code, errors = ended(serving)
    assert (code, "stopped" in errors) == (7, True)


def test_a_broken_image_is_refused_before_anything_is_served(tmp_path: Path, run: Run) -> None:
    (tmp_path / "broken").write_bytes(b"x" * 100_000)
    refused = run("serve", tmp_path / "broken", "--socket", tmp_path / "s")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (5, "", 1)
    assert not (tmp_path / "s").exists()


def test_each_further_image_takes_little_memory(tmp_path: Path, root: Root, start: Start) -> None:
    def resident() -> int:
        status = Path(f"/proc/{owner_pid(root)}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) << 10

    assert uri_of(start("serve", LAYER, "--socket", tmp_path / "first"))
    one = resident()
    for number in range(10):
        assert uri_of(start("serve", LAYER, "--socket", tmp_path / str(number)))
    assert one <= 40 << 20
    assert (resident() - one) / 10 <= 2 << 20


# ---- mount ----


def test_a_mount_is_usable_when_the_command_returns_and_leaves_nothing(
    tmp_path: Path, root: Root, run: Run, ext4: Path
) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    done = run("mount", ext4, target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (target / "etc").is_dir()
    flags = os.statvfs(target).f_flag
    assert flags & os.ST_RDONLY
    assert flags & os.ST_NODEV
    assert flags & os.ST_NOSUID
    (device,) = devices(run)
    assert (device["where"], device["front_end"], device["state"]) == (str(target), "fuse", "live")
    assert str(device["how"]).startswith("ext4")
    assert run("umount", target).returncode == 0
    assert not mounted(target)
    assert until(lambda: devices(run) == [])
    assert list(root.mounts.glob("*")) == []


def test_a_busy_mount_is_kept_unless_forced(tmp_path: Path, run: Run, ext4: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    assert run("mount", ext4, target).returncode == 0
    with open(next(path for path in (target / "etc").iterdir() if path.is_file()), "rb"):
        refused = run("umount", target)
        assert (refused.returncode, refused.stderr.count("\n")) == (7, 1)
        assert mounted(target)
        assert run("umount", "--force", target).returncode == 0
    assert not mounted(target)
    assert until(lambda: devices(run) == [])


def test_a_busy_mount_point_is_refused(tmp_path: Path, run: Run, ext4: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    assert run("mount", ext4, target).returncode == 0
    refused = run("mount", ext4, target)
    assert (refused.returncode, refused.stderr.count("\n")) == (7, 1)
    assert until(lambda: len(devices(run)) == 1)
    assert run("umount", target).returncode == 0


@pytest.mark.parametrize(("image", "target", "code"), [("ext4", "absent", 3), ("ext4", "file", 7), ("none", "mnt", 7)])
def test_a_mount_that_fails_leaves_nothing(
    tmp_path: Path, root: Root, run: Run, ext4: Path, image: str, target: str, code: int
) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "file").touch()
    failed = run("mount", ext4 if image == "ext4" else LAYER, tmp_path / target)
    assert (failed.returncode, failed.stderr.count("\n"), failed.stdout) == (code, 1, "")
    assert until(lambda: devices(run) == [])
    assert list(root.mounts.glob("*")) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_without_fuse_a_mount_is_refused_in_one_line(tmp_path: Path, ociblk: str, root: Root, ext4: Path) -> None:
    requires.requires_mount()
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    # A mount namespace whose /dev has what every program needs, and no fuse.
    empty_dev = f"{leaks.FORGET_MOUNTS}mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3 && exec \"$@\""
    command = [ociblk, "mount", str(ext4), str(mnt), "--root", str(root.path)]
    failed = subprocess.run(
        ["unshare", "-m", "sh", "-c", empty_dev, "-", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT,
    )
    assert (failed.returncode, failed.stderr.count("\n"), failed.stdout) == (7, 1, "")
    assert "/dev/fuse" in failed.stderr
    assert list(root.mounts.glob("*")) == []


def test_mount_raw_shows_the_disk_as_a_file(tmp_path: Path, run: Run) -> None:
    requires.requires_mount()
    disk = tmp_path / "disk"
    assert run("mount", "--raw", LAYER, disk).returncode == 0
    found = disk.stat()
    assert (found.st_size, stat.S_ISREG(found.st_mode)) == (SIZE, True)
    assert sha256_of(disk.read_bytes()) == sha256_of(exported(run, LAYER, tmp_path / "raw"))
    with pytest.raises(OSError, match=r"[Rr]ead-only|denied"):
        disk.open("r+b")
    assert run("umount", disk).returncode == 0
    assert until(lambda: devices(run) == [])


def test_mount_options_reach_the_kernel_and_nonsense_is_refused(tmp_path: Path, run: Run, ext4: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    assert run("mount", ext4, target, "-o", "noexec").returncode == 0
    assert os.statvfs(target).f_flag & os.ST_NOEXEC
    assert run("umount", target).returncode == 0
    assert run("mount", ext4, target, "-o", "rw").returncode == 2
    assert run("mount", ext4, target, "-o", "frobnicate").returncode == 7
    assert run("mount", "--raw", ext4, target, "-o", "noexec").returncode == 2


def test_the_helper_of_mount_8_mounts_too(tmp_path: Path, ociblk: str, root: Root, run: Run, ext4: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    helper = Path(ociblk).with_name("mount.ociblk")
    options = f"rw,noexec,ociblk.root={root.path},ociblk.on-error=hang"
    command = [str(helper), str(ext4), str(target), "-n", "-o", options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.statvfs(target).f_flag & os.ST_NOEXEC
    assert run("umount", target).returncode == 0


def test_a_mount_outlives_neither_a_forced_stop_nor_its_files(tmp_path: Path, root: Root, run: Run, ext4: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    assert run("mount", ext4, target).returncode == 0
    refused = run("daemon", "--stop")
    assert refused.returncode == 7
    assert str(target) in refused.stderr
    assert run("daemon", "--stop", "--force").returncode == 0
    assert not mounted(target)
    assert list(root.mounts.glob("*")) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_umount_needs_no_owner(tmp_path: Path, root: Root, run: Run, ext4: Path, number: signal.Signals) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    assert run("mount", ext4, target).returncode == 0
    owner = owner_pid(root)
    os.kill(owner, number)
    started = time.monotonic()
    done = run("umount", target)
    if number == signal.SIGSTOP:
        os.kill(owner, signal.SIGCONT)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 10
    assert not mounted(target)


def test_an_owner_stays_while_something_is_mounted(tmp_path: Path, root: Root, run: Run, ext4: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    assert run("mount", ext4, target).returncode == 0
    assert not until(lambda: not root.owned(), limit=12)
    assert run("umount", target).returncode == 0
