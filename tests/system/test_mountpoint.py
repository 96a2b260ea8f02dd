# SPDX-License-Identifier: Apache-2.0
"""File systems of images in the kernel, and umount whatever became of their server."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev import mountpoint, syscalls
from blockdev.errors import DeviceError, NotFound
from blockdev.fusefile import FuseFile
from blockdev.mountoptions import parse_options
from blockdev.mountpoint import Mounted
from blockdev.root import Root
from tests import leaks
from tests.requires import requires_command, requires_mount
from tests.system.served import Served, served, served_nowhere

requires_mount()
requires_command("mke2fs", "mkfs.erofs", "fusermount3")

IN_TIME = 10.0  # seconds: what umount promises
AT_ONCE = 2.0
WAYS = ["ext4", "erofs from the file", "erofs through loop"]
AS_NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
BIG = 8 << 20  # bytes of a file that read-ahead does not read whole


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file system image of each kind, of the same tree."""
    folder = tmp_path_factory.mktemp("disks")
    tree = folder / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "deep" / "er" / "small").write_text("small\n")
    (tree / "big").write_bytes(random.Random(3).randbytes(BIG))
    found = {kind: folder / f"{kind}.img" for kind in ("ext4", "erofs")}
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, found["ext4"], "24M"], check=True, capture_output=True)
    subprocess.run(["mkfs.erofs", found["erofs"], tree], check=True, capture_output=True)
    return found


def mount_disk(file: FuseFile, directory: Path, folder: Path, options: str = "") -> Mounted:
    """Mounted, and left so."""
    with mountpoint.mount_filesystem(file, directory, parse_options(options), Root(folder)) as mounted:
        return mounted


def mount_file(path: Path) -> int:
    with mountpoint.mount_file(path) as fd:
        return fd


@dataclass
class Mount:
    """A mounted file system, its server, and the tree it was made from."""

    disk: Served
    directory: Path
    mounted: Mounted
    tree: Path


class Mounter:
    """Makes mounts, and undoes them all at the end."""

    def __init__(self, disks: dict[str, Path], folder: Path, patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        self._disks, self._folder, self._patch, self._stack = disks, folder, patch, stack

    def serve(self, raw: Path) -> tuple[Served, Path]:
        directory = self._folder / "mnt"
        directory.mkdir()
        return self._stack.enter_context(served(raw, self._folder)), directory

    def serve_nowhere(self, raw: Path) -> tuple[Served, FuseFile, Path]:
        directory = self._folder / "mnt"
        directory.mkdir()
        return (*self._stack.enter_context(served_nowhere(raw, self._folder)), directory)

    def __call__(self, way: str, options: str = "") -> Mount:
        kind, _, how = way.partition(" ")
        if how == "through loop":
            self._patch.setattr(mountpoint, "erofs_from_file", lambda release: False)
        disk, file, directory = self.serve_nowhere(self._disks[kind])
        with file:  # after that, the file system's own hold is all that is left
            mounted = mount_disk(file, directory, self._folder, options)
        return Mount(disk, directory, mounted, self._disks[kind].parent / "tree")


@pytest.fixture
def mounter(disks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounter]:
    with ExitStack() as stack:
        yield Mounter(disks, tmp_path, monkeypatch, stack)
    assert not leaks.mounts(tmp_path)
    assert not leaks.loops(tmp_path)


def start_reader(path: Path, offset: int = BIG // 2) -> subprocess.Popen[str]:
    """A process that opens path, says "open", waits for go(), reads one block and says what
    came of it. The offset is beyond what read-ahead of the metadata may have brought."""
    code = (
        "import os, sys\n"
        f"fd = os.open({str(path)!r}, os.O_RDONLY)\n"
        "print('open', flush=True)\n"
        "sys.stdin.readline()\n"
        f"try: print(len(os.pread(fd, 512, {offset})))\n"
        "except OSError as error: print(error.errno)\n"
    )
    command = [sys.executable, "-c", code]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout
    assert reader.stdout.readline() == "open\n"
    return reader


def go(reader: subprocess.Popen[str]) -> None:
    """Let it read, and come back when it waits for its bytes."""
    assert reader.stdin
    reader.stdin.write("\n")
    reader.stdin.flush()
    deadline = time.monotonic() + IN_TIME
    while Path(f"/proc/{reader.pid}/stat").read_text().rpartition(")")[2].split()[0] != "D":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(reader: subprocess.Popen[str]) -> int:
    out, _ = reader.communicate("\n", timeout=IN_TIME)
    return int(out)


def open_to_users(folder: Path) -> None:
    """Let everybody pass through to the folder."""
    for path in (folder, *folder.parents):
        if path.stat().st_mode & 0o111 != 0o111:
            path.chmod(0o711)


# ---- mount ----


@pytest.mark.parametrize("way", WAYS)
def test_the_tree_is_as_it_was_made(mounter: Mounter, way: str) -> None:
    mount = mounter(way)
    for path in mount.tree.rglob("*"):
        twin = mount.directory / path.relative_to(mount.tree)
        assert twin.is_dir() == path.is_dir()
        assert path.is_dir() or twin.read_bytes() == path.read_bytes()
    assert mount.mounted.kind == way.split()[0]
    assert (mount.mounted.loop is None) == (way == "erofs from the file")
    assert mountpoint.umount(mount.directory) == mount.mounted
    mount.disk.wait()


def test_mount_options_reach_the_kernel(mounter: Mounter) -> None:
    mount = mounter("ext4", "noexec,suid,errors=continue")
    line = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if str(mount.directory) in line)
    options = line.split()[3].split(",")
    assert {"ro", "nodev", "noexec", "norecovery"} <= set(options)  # norecovery is what noload is listed as
    assert "nosuid" not in options
    mountpoint.umount(mount.directory)


def test_the_loop_device_reads_past_the_page_cache(mounter: Mounter) -> None:
    mount = mounter("ext4")
    assert mount.mounted.loop
    assert Path(f"/sys/block/{Path(mount.mounted.loop).name}/loop/dio").read_text() == "1\n"
    mountpoint.umount(mount.directory)


def test_names_with_spaces_and_links_are_found_again(disks: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "a b\\c\nd"
    (folder / "mnt").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder / "mnt")
    (tmp_path / "parent").symlink_to(folder)
    for name in (folder / "mnt", tmp_path / "link", tmp_path / "parent" / "mnt"):
        with served_nowhere(disks["ext4"], folder) as (disk, file):
            with file:
                mount_disk(file, tmp_path / "link", folder)
            assert mountpoint.umount(name).point == folder / "mnt"
            disk.wait()


def test_a_mount_point_in_use_is_refused(mounter: Mounter) -> None:
    mount = mounter("ext4")
    with pytest.raises(DeviceError, match="already a mount point"):
        mount_file(mount.directory)
    with FuseFile() as file, pytest.raises(DeviceError, match="already a mount point"):
        mount_disk(file, mount.directory, mount.directory.parent)
    mountpoint.umount(mount.directory)


def test_a_mount_point_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with FuseFile() as file:
        with pytest.raises(NotFound, match="nowhere"):
            mount_disk(file, tmp_path / "nowhere", tmp_path)
        with pytest.raises(DeviceError, match="not a directory"):
            mount_disk(file, tmp_path / "file", tmp_path)
    with pytest.raises(DeviceError, match="not a regular file"):
        mount_file(tmp_path)
    with pytest.raises(NotFound, match="nowhere"):
        mount_file(tmp_path / "nowhere")


def test_a_disk_without_a_known_file_system_is_named(mounter: Mounter, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(510) + b"\x55\xaa" + bytes(1 << 20))
    disk, file, directory = mounter.serve_nowhere(raw)
    with file, pytest.raises(DeviceError, match="partition table"):
        mount_disk(file, directory, tmp_path)
    disk.wait()


@pytest.mark.parametrize("size", [0, 1, 1100, 1 << 20])
def test_a_broken_file_system_leaves_nothing_behind(mounter: Mounter, tmp_path: Path, size: int) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes((bytes(1080) + b"\x53\xef" + b"\xff" * 100 + bytes(1 << 20))[:size])
    disk, file, directory = mounter.serve_nowhere(raw)
    with file, pytest.raises(DeviceError, match="mount failed"):
        mount_disk(file, directory, tmp_path)
    disk.wait()


def test_without_fuse_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fuse() -> int:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), "/dev/fuse")

    monkeypatch.setattr(syscalls, "open_fuse", no_fuse)
    (tmp_path / "disk").touch()
    with pytest.raises(DeviceError, match="/dev/fuse"):
        mount_file(tmp_path / "disk")


@pytest.mark.parametrize("way", WAYS)
def test_other_users_read_the_file_system(mounter: Mounter, way: str, tmp_path: Path) -> None:
    mount = mounter(way)
    open_to_users(tmp_path)
    result = subprocess.run([*AS_NOBODY, "cat", mount.directory / "big"], capture_output=True, check=True)
    assert result.stdout == (mount.tree / "big").read_bytes()
    mountpoint.umount(mount.directory)


def test_other_users_do_not_read_the_disk(mounter: Mounter, disks: dict[str, Path], tmp_path: Path) -> None:
    disk, _ = mounter.serve(disks["ext4"])
    open_to_users(tmp_path)
    refused = subprocess.run([*AS_NOBODY, "cat", disk.file], capture_output=True, text=True, check=False)
    assert "Permission denied" in refused.stderr
    mountpoint.umount(disk.file)


# ---- umount ----


def test_umount_of_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not mounted"):
        mountpoint.umount(tmp_path)
    (tmp_path / "foreign").mkdir()
    syscalls.mount("none", tmp_path / "foreign", "tmpfs", flags=0, options="")
    try:
        for umount in (mountpoint.umount, mountpoint.force_umount):
            with pytest.raises(NotFound, match="not a mount of ours: tmpfs"):
                umount(tmp_path / "foreign")
        assert syscalls.mounted_at(tmp_path / "foreign")
    finally:
        syscalls.umount(tmp_path / "foreign", 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_busy_mount_is_refused_at_once_and_stays(mounter: Mounter, way: str) -> None:
    mount = mounter(way)
    reader = start_reader(mount.directory / "big")
    start = time.monotonic()
    with pytest.raises(DeviceError, match="in use"):
        mountpoint.umount(mount.directory)
    assert time.monotonic() - start < AT_ONCE
    assert finish(reader) == 512
    assert (mount.directory / "big").read_bytes() == (mount.tree / "big").read_bytes()
    mountpoint.umount(mount.directory)


def test_a_busy_file_is_refused_at_once_and_stays(mounter: Mounter, disks: dict[str, Path]) -> None:
    disk, _ = mounter.serve(disks["ext4"])
    with disk.file.open("rb"), pytest.raises(DeviceError, match="in use"):
        mountpoint.umount(disk.file)
    assert disk.file.read_bytes() == disks["ext4"].read_bytes()
    assert mountpoint.umount(disk.file).point == disk.file


@pytest.mark.parametrize("fate", ["stop", "kill"])
@pytest.mark.parametrize("way", [*WAYS, "the file alone"])
def test_an_idle_umount_needs_no_server(mounter: Mounter, disks: dict[str, Path], way: str, fate: str) -> None:
    if way == "the file alone":
        disk, point = mounter.serve(disks["ext4"])
        point = disk.file
        disk.file.read_bytes()
    else:
        mount = mounter(way)
        disk, point = mount.disk, mount.directory
        (point / "deep" / "er" / "small").read_text()
    getattr(disk, fate)()
    start = time.monotonic()
    mountpoint.umount(point)
    assert time.monotonic() - start < AT_ONCE


@pytest.mark.parametrize("way", WAYS)
def test_reads_nobody_waits_for_do_not_hold_up_a_umount(mounter: Mounter, way: str) -> None:
    """A reader dies while its read is with a server that will never answer."""
    mount = mounter(way)
    reader = start_reader(mount.directory / "big")
    mount.disk.stop()
    go(reader)
    reader.kill()
    reader.communicate(timeout=IN_TIME)
    start = time.monotonic()
    mountpoint.umount(mount.directory)
    assert time.monotonic() - start < IN_TIME


@pytest.mark.parametrize("way", WAYS)
def test_force_takes_a_busy_mount_away_and_its_users_get_errors(mounter: Mounter, way: str) -> None:
    mount = mounter(way)
    waiting = start_reader(mount.directory / "big")
    later = start_reader(mount.directory / "big", BIG - 4096)
    mount.disk.stop()
    go(waiting)
    start = time.monotonic()
    mountpoint.force_umount(mount.directory)
    assert time.monotonic() - start < IN_TIME
    assert not leaks.mounts(mount.directory.parent)
    assert finish(waiting) == errno.EIO
    assert finish(later) == errno.EIO


def test_force_takes_a_busy_file_away(mounter: Mounter, disks: dict[str, Path]) -> None:
    disk, _ = mounter.serve(disks["ext4"])
    reader = start_reader(disk.file)
    disk.stop()
    assert mountpoint.force_umount(disk.file).point == disk.file
    assert finish(reader) in (errno.ENOTCONN, errno.EIO, errno.ECONNABORTED)


def test_a_mount_bound_elsewhere_keeps_its_file(mounter: Mounter, tmp_path: Path) -> None:
    mount = mounter("ext4")
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", mount.directory, tmp_path / "bound"], check=True)
    mountpoint.umount(mount.directory)
    assert (tmp_path / "bound" / "big").read_bytes() == (mount.tree / "big").read_bytes()
    mountpoint.umount(tmp_path / "bound")
    mount.disk.wait()


def test_a_loop_device_is_known_where_its_number_is_not_its_minor_number(
    mounter: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with loop.max_part, which is set when the kernel starts."""
    mount = mounter("ext4")
    entry = syscalls.mounted_at(mount.directory)
    assert entry
    assert mount.mounted.loop
    minor, name, tree = entry.minor + 16, Path(mount.mounted.loop).name, tmp_path / "sys"
    (tree / "dev/block").mkdir(parents=True)
    (tree / f"dev/block/7:{minor}").symlink_to(f"../../devices/virtual/block/{name}")
    (tree / "block").symlink_to("/sys/block")
    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "_SYS", tree)
        assert mountpoint.connection_of(entry._replace(minor=minor)) == mount.mounted.connection
        assert mountpoint.connection_of(entry) is None
    mountpoint.umount(mount.directory)


def test_a_dead_owner_gives_eio_through_the_file_system(mounter: Mounter) -> None:
    mount = mounter("ext4")
    reader = start_reader(mount.directory / "big")
    mount.disk.kill()
    assert finish(reader) == errno.EIO
    mountpoint.umount(mount.directory)


def test_the_registry_being_dead_does_not_hold_up_a_umount(disks: dict[str, Path], tmp_path: Path) -> None:
    """Nothing of the image is there and nobody fetches: even the superblock read hangs."""
    with served(disks["ext4"], tmp_path, how="cold") as disk:
        reader = start_reader(disk.file)
        go(reader)
        start = time.monotonic()
        mountpoint.force_umount(disk.file)
        assert time.monotonic() - start < IN_TIME
        assert finish(reader) in (errno.ENOTCONN, errno.EIO, errno.ECONNABORTED)
        disk.wait()


@pytest.mark.parametrize("options", [[], ["--lazy"]])
@pytest.mark.parametrize("way", WAYS)
def test_whoever_unmounts_the_directory_ends_the_file(mounter: Mounter, way: str, options: list[str]) -> None:
    """umount(8), systemd and umount --lazy know nothing of what is below a mount."""
    mount = mounter(way)
    reader = start_reader(mount.directory / "big")
    if options:
        subprocess.run(["umount", *options, mount.directory], check=True)
        assert finish(reader) == 512  # who has a file open keeps all that it needs
    else:
        assert finish(reader) == 512
        subprocess.run(["umount", mount.directory], check=True)
    mount.disk.wait()


def test_attributes_are_never_asked_for_again(disks: dict[str, Path], tmp_path: Path) -> None:
    """Who looks for a mount asks its loop device, which asks for them: a stopped server would keep it waiting."""
    with served_nowhere(disks["ext4"], tmp_path) as (disk, file), file:
        file.path.read_bytes()
        disk.stop()
        assert file.path.stat().st_size == disks["ext4"].stat().st_size


def test_force_takes_what_is_mounted_below_along(mounter: Mounter, disks: dict[str, Path], tmp_path: Path) -> None:
    outer = mounter("ext4")
    inner = outer.directory / "deep"
    with served_nowhere(disks["erofs"], tmp_path) as (disk, file):
        with file:
            mount_disk(file, inner, tmp_path)
        with pytest.raises(DeviceError, match="in use"):
            mountpoint.umount(outer.directory)
        assert (inner / "deep" / "er" / "small").read_text() == "small\n"
        reader = start_reader(inner / "big")
        mountpoint.force_umount(outer.directory)
        disk.wait()
        assert finish(reader) == errno.EIO
    outer.disk.wait()


# ---- users ----


# /dev/fuse as distributions set it up, and the switch to end connections; then no longer root.
AS_A_USER = f"""{leaks.FORGET_MOUNTS}
mknod "$1" c 10 229
chmod 666 "$1"
mount --bind "$1" /dev/fuse
mountpoint -q /sys/fs/fuse/connections || mount -t fusectl none /sys/fs/fuse/connections
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$2" -c "$3"
"""


def test_a_user_mounts_a_file_through_fusermount(tmp_path: Path) -> None:
    nobody = 65534
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "disk"
    file.touch()
    for path in (tmp_path / "home", file):
        os.chown(path, nobody, nobody)
    open_to_users(file.parent)
    code = (
        "import sys; from pathlib import Path; from blockdev import mountpoint, root\n"
        f"file, root = Path({str(file)!r}), root.Root(Path('/a root, of \\\\ some'))\n"
        "with mountpoint.mount_file(file, root) as fd: pass\n"
        "print(mountpoint.find(file).point, flush=True)\n"
        "assert mountpoint.find(file).root == root.path, mountpoint.find(file).root\n"
        "mountpoint.umount(file)\n"
        "with mountpoint.mount_file(file) as fd: pass\n"
        "mountpoint.force_umount(file)\n"
    )
    shell = ["unshare", "--mount", "sh", "-ec", AS_A_USER, "sh", str(tmp_path / "fuse"), sys.executable, code]
    result = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{file}\n", "")


def test_what_fusermount_says_of_a_name_need_not_be_text(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "\udcff"
    file.touch()
    open_to_users(file.parent)
    code = (
        "from pathlib import Path; from blockdev import errors, mountpoint\n"
        "try:\n"
        f"  with mountpoint.mount_file(Path({str(file)!r})): pass\n"
        "except errors.DeviceError as error: print(ascii(str(error)))\n"
    )
    shell = ["unshare", "--mount", "sh", "-ec", AS_A_USER, "sh", str(tmp_path / "fuse"), sys.executable, code]
    result = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\\udcff") == 2
