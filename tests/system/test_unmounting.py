# SPDX-License-Identifier: Apache-2.0
"""Mounts that end in other ways than by `ociblk umount`, and umount where there is nothing, or more than one mount."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockdev.fusefile import FuseFile
from blockdev.root import Root
from blockdev.transport.fuse import FuseTransport
from tests import fixtures, leaks, requires
from tests.commands import WAIT, Run, devices, mounted, owner_pid, until

LAYER = fixtures.DATA / "a-l2.lz4-4k.zlsmt"


def test_umount_8_undoes_a_mount_whole(tmp_path: Path, run: Run, ext4: Path) -> None:
    """fstab and systemd mount by mount.ociblk, and unmount by umount(8)."""
    (target := tmp_path / "mnt").mkdir()
    assert run("mount", ext4, target).returncode == 0
    subprocess.run(["umount", target], check=True)
    assert until(lambda: devices(run) == [])
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert run("daemon", "--stop").returncode == 0


def test_a_writable_mount_that_umount_8_undoes_gives_its_pair_back(tmp_path: Path, run: Run, ext4: Path) -> None:
    (target := tmp_path / "mnt").mkdir()
    pair = (tmp_path / "data", tmp_path / "index")
    assert run("create", *pair, "--size", "64m").returncode == 0
    assert run("mount", ext4, target, "--rw", "--upper", *pair).returncode == 0
    (target / "new").write_text("new")
    subprocess.run(["umount", target], check=True)
    assert until(lambda: devices(run) == [])
    assert run("mount", ext4, target, "--rw", "--upper", *pair).returncode == 0
    assert (target / "new").read_text() == "new"
    assert run("umount", target).returncode == 0


def test_umount_8_undoes_the_mount_of_a_killed_owner(tmp_path: Path, root: Root, run: Run, ext4: Path) -> None:
    (target := tmp_path / "mnt").mkdir()
    assert run("mount", ext4, target).returncode == 0
    os.kill(owner_pid(root), signal.SIGKILL)
    subprocess.run(["umount", target], check=True)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert run("mount", ext4, target).returncode == 0
    assert run("umount", target).returncode == 0


def test_a_stop_by_force_takes_a_mount_that_has_moved(tmp_path: Path, root: Root, run: Run, ext4: Path) -> None:
    target = tmp_path / "one" / "mnt"
    target.mkdir(parents=True)
    assert run("mount", ext4, target).returncode == 0
    target.parent.rename(tmp_path / "two")
    assert mounted(tmp_path / "two" / "mnt")
    assert run("daemon", "--stop", "--force").returncode == 0
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_a_mount_outlives_a_root_that_moves(tmp_path: Path, root: Root, run: Run, ext4: Path, kind: str) -> None:
    (target := tmp_path / "mnt").mkdir()
    image = ext4 if kind == "ext4" else erofs_layer(tmp_path, run)
    assert run("mount", image, target).returncode == 0
    root.path.rename(tmp_path / "moved")
    try:
        assert run("umount", target).returncode == 0
        assert not mounted(target)
    finally:
        (tmp_path / "moved").rename(root.path)
    assert until(lambda: devices(run) == [])


def erofs_layer(folder: Path, run: Run) -> Path:
    requires.requires_command("mkfs.erofs")
    (folder / "tree").mkdir()
    (folder / "tree" / "file").write_text("file")
    subprocess.run(["mkfs.erofs", folder / "disk", folder / "tree"], check=True, capture_output=True)
    assert run("import", folder / "disk", "-o", folder / "layer").returncode == 0
    return folder / "layer"


def test_a_forced_umount_ends_the_mounts_below(tmp_path: Path, run: Run, ext4: Path) -> None:
    (target := tmp_path / "mnt").mkdir()
    assert run("mount", ext4, target).returncode == 0
    assert run("mount", ext4, target / "etc").returncode == 0
    assert run("umount", target).returncode == 7
    assert len(devices(run)) == 2
    assert run("umount", "--force", target).returncode == 0
    assert until(lambda: devices(run) == [])


@pytest.mark.parametrize("step", ["fuse", "mounted"])
def test_a_mount_killed_between_its_steps_leaves_no_device(
    tmp_path: Path, root: Root, run: Run, ext4: Path, step: str
) -> None:
    (target := tmp_path / "mnt").mkdir()
    killed = (
        "import os, signal, sys\n"
        "from blockdev import cli, client\n"
        "call = client.Connection.call\n"
        "def kill(self, op, *rest, **named):\n"
        f"    if op == {step!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return call(self, op, *rest, **named)\n"
        "client.Connection.call = kill\n"
        "cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", killed, "mount", str(ext4), str(target), "--root", str(root.path)]
    assert subprocess.run(command, check=False, timeout=WAIT).returncode == -signal.SIGKILL
    assert until(lambda: devices(run) == [])
    if mounted(target):  # it got so far; what is there gives errors, and can be taken away
        assert run("umount", target).returncode == 0
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("way", ["ext4", "erofs", "raw"])
def test_a_mount_interrupted_in_the_kernel_is_undone(
    tmp_path: Path, root: Root, run: Run, ext4: Path, way: str
) -> None:
    """mount(2) cannot be interrupted: what arrives meanwhile is raised when the mount is there."""
    (target := tmp_path / "mnt").mkdir()
    image = erofs_layer(tmp_path, run) if way == "erofs" else ext4
    words = ["--raw", str(image), str(tmp_path / "file")] if way == "raw" else [str(image), str(target)]
    interrupted = (
        "import signal, sys\n"
        "from blockdev import cli, syscalls\n"
        "mount, abort = syscalls.mount, syscalls.abort_fuse\n"
        "def mount_slowly(*rest, **named):\n"
        "    mount(*rest, **named)\n"
        "    print('mounted', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "def abort_slowly(connection):\n"  # timeout(1) sends its signal twice
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    abort(connection)\n"
        "syscalls.mount, syscalls.abort_fuse = mount_slowly, abort_slowly\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", interrupted, "mount", *words, "--root", str(root.path)]
    done = subprocess.run(command, check=False, timeout=WAIT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "mounted\n", "")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert not (tmp_path / "file").exists()
    assert until(lambda: devices(run) == [])


def test_without_sys_there_are_mounts_all_the_same(tmp_path: Path, root: Root, ociblk: str, ext4: Path) -> None:
    """As in a chroot."""
    (target := tmp_path / "mnt").mkdir()
    script = f"""{leaks.FORGET_MOUNTS}
umount --lazy --recursive /sys
export OCIBLK_ROOT={root.path}
{ociblk} mount {ext4} {target}
ls {target}/etc > {tmp_path}/listed
{ociblk} umount {target}
{ociblk} create {tmp_path}/data {tmp_path}/index --size 64m
{ociblk} mount --rw --upper {tmp_path}/data {tmp_path}/index {ext4} {target}
touch {target}/new
{ociblk} umount {target}
{ociblk} daemon --stop
! grep {tmp_path} /proc/self/mountinfo
"""
    done = subprocess.run(["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "listed").read_text()


def test_a_file_that_is_mounted_is_refused_without_asking_its_server(tmp_path: Path, root: Root, run: Run) -> None:
    file = tmp_path / "file"
    assert run("mount", "--raw", LAYER, file).returncode == 0
    for fate in (lambda: None, lambda: os.kill(owner_pid(root), signal.SIGKILL)):
        fate()
        refused = run("mount", "--raw", LAYER, file)
        assert (refused.returncode, refused.stderr) == (7, f"ociblk: mount failed: {file}: already a mount point\n")
    assert run("umount", file).returncode == 0


@pytest.mark.parametrize("words", [("mount", LAYER), ("umount",)])
@pytest.mark.parametrize("target", ["", "x" * 300, "loop", "loop/x"])
def test_a_place_that_cannot_be_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, words: tuple[str | Path, ...], target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    refused = run(*words, target)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert run("mount", "--raw", LAYER, target).returncode == 2


def test_what_is_not_mounted_is_unmounted_already(tmp_path: Path, run: Run, ext4: Path) -> None:
    (target := tmp_path / "mnt").mkdir()
    assert run("mount", ext4, target).returncode == 0
    assert run("umount", target).returncode == 0
    again = run("umount", target)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", f"ociblk: {target}: not mounted\n")
    assert run("umount", tmp_path / "absent").returncode == 3
    assert run("umount", "/proc").returncode == 3


def test_a_transport_knows_at_once_that_its_file_is_gone() -> None:
    """`umount` and then `daemon --stop`: the owner must not take for live what it has not come to end yet."""
    requires.requires_mount()
    with FuseFile() as file:
        transport = FuseTransport(os.dup(file.fuse_fd), id=1)
        file.passed()
        assert not transport.gone()
    assert transport.gone()
    transport.detach(timeout=0)
    assert transport.gone()


def test_a_line_of_fstab_mounts_a_writable_layer(tmp_path: Path, root: Root, ociblk: str, run: Run, ext4: Path) -> None:
    (target := tmp_path / "mnt").mkdir()
    pair = (tmp_path / "data", tmp_path / "index")
    assert run("create", *pair, "--size", "64m").returncode == 0
    half = f"rw,ociblk.rw,ociblk.root={root.path},ociblk.upper-data={pair[0]}"
    for options, code in ((half, 2), (f"{half},ociblk.upper-index={pair[1]}", 0)):
        command = [str(Path(ociblk).with_name("mount.ociblk")), str(ext4), str(target), "-o", options]
        assert subprocess.run(command, capture_output=True, check=False, timeout=WAIT).returncode == code
    (target / "new").write_text("new")
    subprocess.run(["umount", target], check=True)
    assert until(lambda: devices(run) == [])


def test_a_user_is_told_that_file_systems_are_for_root(tmp_path: Path, ociblk: str) -> None:
    """Without fusectl and without rights: an error of one line, and nothing stays."""
    nobody = 65534
    requires.requires_mount()
    (home := tmp_path / "home").mkdir()
    (home / "mnt").mkdir()
    (home / "layer").write_bytes(LAYER.read_bytes())
    for path in (home, home / "mnt", home / "layer"):
        os.chown(path, nobody, nobody)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o111 != 0o111:
            path.chmod(0o711)
    users = f"""{leaks.FORGET_MOUNTS}
mknod {tmp_path}/fuse c 10 229
chmod 666 {tmp_path}/fuse
mount --bind {tmp_path}/fuse /dev/fuse
! mountpoint -q /sys/fs/fuse/connections || umount /sys/fs/fuse/connections
exec setpriv --reuid {nobody} --regid {nobody} --clear-groups env OCIBLK_ROOT={home}/root HOME={home} sh -c '
{ociblk} mount {home}/layer {home}/mnt && exit 90
{ociblk} mount --raw {home}/layer {home}/disk || exit 91
{ociblk} umount --force {home}/disk || exit 92
grep {home} /proc/self/mountinfo && exit 93
{ociblk} daemon --stop --force'
"""
    done = subprocess.run(["unshare", "--mount", "sh", "-ec", users], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    why = "Operation not permitted (only root can; --raw shows the disk as a file)"
    assert done.stderr == f"ociblk: mount failed: FUSE: {why}\n"
