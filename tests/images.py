# SPDX-License-Identifier: Apache-2.0
"""Ordinary container images, made of Debian packages and wheels: what convert is judged by.

An image is an OCI layout directory, tagged TAG. Its layers are tars as image builders write
them: packages' files layer by layer, then one of what few packages have (hard links, xattrs,
capabilities, devices, odd names, ids and times), then one that changes, replaces and deletes
(whiteouts, an opaque directory). Equal packages give equal images. What was downloaded and made
stays in build/images/.

Usually the images have a few packages each; under OCIBLK_FULL=1, what they would have in earnest.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from formats import oci
from formats.layout import INDEX, MARKER, REF_NAME, blob_path
from tests import requires

TAG = "1"
FOLDER = requires.ROOT / "build" / "images"
TIME = 1_700_000_000.0  # seconds since 1970, of what is no package's
DOWNLOAD_SECONDS = 600
DOCUMENTATION = "usr/share/doc"
PYTHON_PACKAGES = "usr/lib/python3/dist-packages"
_MERGED = ("bin", "sbin", "lib", "lib64")  # in Debian 12, links into /usr
_GZIP_LEVEL = 1  # the least time

_LIBC = ("base-files", "libc6", "libgcc-s1", "gcc-12-base")
_PYTHON = ("libpython3.11-minimal", "python3.11-minimal", "libpython3.11-stdlib", "libexpat1", "zlib1g")


@dataclass(frozen=True)
class Shape:
    """What an image is made of. `programs` run in it and exit with 0."""

    name: str
    packages: tuple[str, ...]
    programs: tuple[tuple[str, ...], ...]
    wheels: tuple[str, ...] = ()
    layers: int = 2  # that the packages' files are spread over
    closed: bool = False  # the packages that these depend on, too


_IMPORT = ("usr/bin/python3.11", "-c")
USUAL = (
    Shape("shell", (*_LIBC, "dash", "passwd", "busybox-static"), (("bin/dash", "-c", "echo"), ("bin/busybox", "true"))),
    Shape("python", (*_LIBC, *_PYTHON), ((*_IMPORT, "import lz4.frame, json, zlib"),), wheels=("lz4",)),
    Shape(
        "server",
        (*_LIBC, "nginx", "nginx-common", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g"),
        (("sbin/nginx", "-V"),),
    ),
    Shape("large", (*_LIBC, *_PYTHON, "perl-base", "libssl3", "libcrypt1"), (("bin/perl", "-v"),), layers=8),
)
FULL = (
    Shape(
        "shell",
        ("dash", "bash", "coreutils", "findutils", "base-files", "passwd", "busybox-static"),
        (("bin/dash", "-c", "echo"), ("bin/bash", "-c", "true"), ("bin/ls", "/")),
        closed=True,
    ),
    Shape(
        "python",
        ("python3", "base-files", "libstdc++6"),
        ((*_IMPORT, "import numpy, scipy.linalg, pandas; print(scipy.linalg.inv(numpy.eye(3)))"),),
        wheels=("numpy", "scipy", "pandas"),
        closed=True,
    ),
    Shape(
        "server",
        ("nginx-light", "redis-server"),
        (("sbin/nginx", "-V"), ("usr/bin/redis-server", "--version")),
        layers=4,
        closed=True,
    ),
    Shape(
        "large",
        ("git", "gcc", "g++", "golang-go", "openjdk-17-jdk-headless", "libboost-dev", "base-files"),
        (("usr/bin/git", "--version"), ("usr/bin/x86_64-linux-gnu-gcc-12", "--version")),
        layers=8,
        closed=True,
    ),
)
SHAPES = {shape.name: shape for shape in (FULL if requires.FULL else USUAL)}


def image(name: str) -> str:
    """The image of a shape, as an oci: reference; made if it is not there."""
    shape = SHAPES[name]
    key = hashlib.sha256(repr(shape).encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    place = FOLDER / f"{name}-{key}"
    if not place.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as unfinished:
            _make(shape, Path(unfinished) / "layout")
            try:
                (Path(unfinished) / "layout").rename(place)
            except OSError:  # another run was faster
                assert place.exists()
    return f"oci:{place}:{TAG}"


def push(source: str, registry_host: str, repository: str) -> str:
    """Copy an oci: image into a registry without TLS, with skopeo; the reference there."""
    reference = f"{registry_host}/{repository}:{TAG}"
    command = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", source, f"docker://{reference}"]
    subprocess.run(command, check=True)
    return reference


# ---- a layout ----


class Layout:
    """An image layout directory with one image, layer by layer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layers: list[oci.Descriptor] = []
        self._diff_ids: list[str] = []
        (folder / "blobs" / "sha256").mkdir(parents=True)

    @contextmanager
    def layer(self) -> Iterator[tarfile.TarFile]:
        """A layer to be written. Every other one is compressed."""
        packed = len(self._layers) % 2 == 0
        plain = self._folder / "layer"
        with open(plain, "wb") as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            yield tar
        self._diff_ids.append(_sha256(plain))
        blob, media_type = plain, oci.OCI_LAYER
        if packed:
            blob, media_type = self._folder / "layer.gz", f"{oci.OCI_LAYER}+gzip"
            _compress(plain, blob)
            plain.unlink()
        digest = _sha256(blob)
        self._layers.append(oci.Descriptor(media_type, digest, blob.stat().st_size))
        blob.rename(self._folder / blob_path(digest))

    def finish(self) -> None:
        """Write config, manifest and index."""
        history = [{"created": "2023-11-14T22:13:20Z", "created_by": f"layer {n}"} for n in range(len(self._layers))]
        config = {
            "architecture": oci.Platform.of_machine(os.uname().machine).architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/usr/bin:/bin"], "Labels": {"made": "for tests"}},
            "rootfs": {"type": "layers", "diff_ids": self._diff_ids},
            "history": history,
        }
        manifest = oci.Manifest(self._document(oci.OCI_CONFIG, oci.canonical(config)), tuple(self._layers))
        found = self._document(oci.OCI_MANIFEST, manifest.build())
        tagged = oci.Descriptor(found.media_type, found.digest, found.size, {REF_NAME: TAG})
        (self._folder / INDEX).write_bytes(oci.Index((tagged,)).build())
        (self._folder / MARKER).write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))

    def _document(self, media_type: str, body: bytes) -> oci.Descriptor:
        digest = oci.digest_of(body)
        (self._folder / blob_path(digest)).write_bytes(body)
        return oci.Descriptor(media_type, digest, len(body))


def _compress(plain: Path, blob: Path) -> None:
    """gzip, with nothing in its head that would differ the next time."""
    with (
        open(plain, "rb") as file,
        open(blob, "wb") as target,
        gzip.GzipFile("", "wb", _GZIP_LEVEL, target, mtime=0) as zipped,
    ):
        shutil.copyfileobj(file, zipped, 1 << 20)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _make(shape: Shape, folder: Path) -> None:
    layout = Layout(folder)
    packages = _packages(shape)
    names: set[str] = set()
    for number in range(shape.layers):
        part = packages[len(packages) * number // shape.layers : len(packages) * (number + 1) // shape.layers]
        with layout.layer() as tar:
            if number == 0:
                _merge_usr(tar)
            names |= _add_packages(tar, part)
            if number == shape.layers - 1:
                for wheel in _wheels(shape):
                    _add_wheel(tar, wheel)
    with layout.layer() as tar:
        _add_oddities(tar)
    with layout.layer() as tar:
        _add_changes(tar, names)
    layout.finish()


# ---- what is in the layers ----


def _member(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **more: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.mtime = kind, mode, TIME
    for attribute, value in more.items():
        setattr(member, attribute, value)
    return member


def _add_file(tar: tarfile.TarFile, member: tarfile.TarInfo, content: bytes) -> None:
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _merge_usr(tar: tarfile.TarFile) -> None:
    tar.addfile(_member("./", tarfile.DIRTYPE, 0o755))  # without it, unpackers give the root the time of their run
    tar.addfile(_member("usr", tarfile.DIRTYPE, 0o755))
    for name in _MERGED:
        tar.addfile(_member(f"usr/{name}", tarfile.DIRTYPE, 0o755))
        tar.addfile(_member(name, tarfile.SYMTYPE, 0o777, linkname=f"usr/{name}"))


def _add_packages(tar: tarfile.TarFile, packages: list[Path]) -> set[str]:
    """The files of packages; the names that they have. A directory is there once a layer."""
    names: set[str] = set()
    for package in packages:
        unpacking = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
        assert unpacking.stdout
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as files:
            for member in files:
                member.name = _merged(member.name)
                if member.name in ("", "usr", *_MERGED) or member.name in names:
                    continue
                member.linkname = _merged(member.linkname) if member.islnk() else member.linkname
                names.add(member.name)
                tar.addfile(member, files.extractfile(member) if member.isreg() else None)
        unpacking.stdout.close()
        assert unpacking.wait() == 0, package
    return names


def _merged(name: str) -> str:
    name = name.removeprefix(".").strip("/")
    return f"usr/{name}" if name.partition("/")[0] in _MERGED else name


def _add_wheel(tar: tarfile.TarFile, wheel: Path) -> None:
    folders: set[str] = set()
    with zipfile.ZipFile(wheel) as files:
        for info in sorted(files.infolist(), key=lambda info: info.filename):
            name = f"{PYTHON_PACKAGES}/{info.filename}"
            for parent in reversed(Path(name).parents[:-1]):
                if str(parent) not in folders and str(parent) != "usr":
                    folders.add(str(parent))
                    tar.addfile(_member(str(parent), tarfile.DIRTYPE, 0o755))
            if not info.is_dir():
                _add_file(tar, _member(name), files.read(info))


def _add_oddities(tar: tarfile.TarFile) -> None:
    """What an image may have and few packages do."""
    tar.addfile(_member("odd", tarfile.DIRTYPE, 0o1777, pax_headers={"mtime": "1600000000.123456789"}))
    capability = b"\x01\0\0\x02\0\x20\0\0" + bytes(12)  # cap_net_raw=ep, as setcap writes it
    xattrs = {"user.note": "two\nlines", "security.capability": capability.decode("latin-1")}
    headers = {f"SCHILY.xattr.{name}": value for name, value in xattrs.items()}
    _add_file(tar, _member("odd/capable", mode=0o755, pax_headers=headers), b"#!/bin/dash\n")
    _add_file(tar, _member("odd/incapable", mode=0o755, pax_headers=headers), b"#!/bin/dash\n")
    _add_file(tar, _member("odd/linked", mode=0o6755), b"three names\n" * 1000)
    for name in ("odd/second", "usr/third"):
        tar.addfile(_member(name, tarfile.LNKTYPE, linkname="odd/linked"))
    _add_file(tar, _member("odd/big-ids", uid=3_000_000, gid=4_000_000), b"")
    _add_file(tar, _member("odd/before-1970", pax_headers={"mtime": "-1.5"}), b"old")
    _add_file(tar, _member("odd/" + "long" * 50, pax_headers={"mtime": "1700000000.000000001"}), b"long name")
    _add_file(tar, _member("odd/sp ace\n\\tab\t"), b"white")
    _add_file(tar, _member("odd/zeros"), bytes(1 << 20))
    tar.addfile(_member("odd/dangling", tarfile.SYMTYPE, 0o777, linkname="../no//where"))
    tar.addfile(_member("odd/fifo", tarfile.FIFOTYPE, 0o620))
    tar.addfile(_member("dev", tarfile.DIRTYPE, 0o755))
    for name, kind, major, minor in (
        ("null", tarfile.CHRTYPE, 1, 3),
        ("disk", tarfile.BLKTYPE, 8, 70_000),
    ):
        tar.addfile(_member(f"dev/{name}", kind, 0o666, devmajor=major, devminor=minor))
    deep = "/".join(["deep"] * 100)
    for depth in range(1, 101):
        tar.addfile(_member("odd/" + deep[: 5 * depth - 1], tarfile.DIRTYPE, 0o700 + depth % 8))
    tar.addfile(_member("odd/goes", tarfile.DIRTYPE, 0o755))
    for name in ("a", "b"):
        _add_file(tar, _member(f"odd/goes/{name}"), b"deleted one by one, or all at once")
    tar.addfile(_member("odd/hidden", tarfile.DIRTYPE, 0o755))
    _add_file(tar, _member("odd/hidden/below"), b"hidden by an opaque directory")


def _add_changes(tar: tarfile.TarFile, names: set[str]) -> None:
    """Changed modes and contents, replaced types, one name of three gone, deletions, an opaque directory."""
    tar.addfile(_member("odd", tarfile.DIRTYPE, 0o755))
    _add_file(tar, _member("odd/incapable", mode=0o700), b"without capabilities\n")
    tar.addfile(_member("odd/.wh.second"))
    tar.addfile(_member("odd/.wh.goes"))
    tar.addfile(_member("odd/hidden", tarfile.DIRTYPE, 0o711))
    tar.addfile(_member("odd/hidden/.wh..wh..opq"))
    _add_file(tar, _member("odd/hidden/above"), b"there")
    tar.addfile(_member("odd/zeros", tarfile.DIRTYPE, 0o755))
    _add_file(tar, _member("odd/fifo"), b"no fifo any more")
    documents = sorted(name for name in names if name.startswith(f"{DOCUMENTATION}/"))
    for package in sorted({name.split("/")[3] for name in documents})[::2]:
        tar.addfile(_member(f"{DOCUMENTATION}/.wh.{package}"))


# ---- what they are made of ----


def _packages(shape: Shape) -> list[Path]:
    """The archives of the shape's packages, in apt's order."""
    cache = FOLDER / "packages"
    (cache / "partial").mkdir(parents=True, exist_ok=True)
    (cache / "none").touch()  # no package counts as installed, so that dependencies come along
    apt = ["apt-get", "-q", "-y", "-o", f"Dir::Cache::archives={cache}", "-o", "APT::Sandbox::User=root"]
    apt += ["-o", "Debug::NoLocking=1", "-o", "Acquire::Retries=3"]
    how = ["download", *shape.packages]
    if shape.closed:
        apt += ["-o", f"Dir::State::status={cache}/none", "--no-install-recommends"]
        how = ["--download-only", "install", *shape.packages]
    with tempfile.TemporaryDirectory(dir=FOLDER) as empty:
        listing = [*apt, "--print-uris", "-o", f"Dir::Cache::archives={empty}", *how]
        found = subprocess.run(listing, cwd=empty, check=False, capture_output=True, text=True)
        if found.returncode:  # no lists yet
            subprocess.run(["apt-get", "-q", "update"], check=True, timeout=DOWNLOAD_SECONDS, stdout=subprocess.DEVNULL)
            found = subprocess.run(listing, cwd=empty, check=True, capture_output=True, text=True)
    names = re.findall(r"^'[^']+' (\S+\.deb) ", found.stdout, re.MULTILINE)
    assert len(names) >= len(shape.packages)
    if not all((cache / name).exists() for name in names):
        subprocess.run([*apt, *how], cwd=cache, check=True, timeout=DOWNLOAD_SECONDS, stdout=subprocess.DEVNULL)
    return [cache / name for name in names]


def _wheels(shape: Shape) -> list[Path]:
    """The archives of the shape's wheels and of what they need, for Debian's Python."""
    if not shape.wheels:
        return []
    cache = FOLDER / f"wheels-{'-'.join(shape.wheels)}"
    if not cache.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as unfinished:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
            command += ["--only-binary=:all:", "--dest", unfinished, *shape.wheels]
            subprocess.run(command, check=True, timeout=DOWNLOAD_SECONDS)
            shutil.copytree(unfinished, cache)
    return sorted(cache.glob("*.whl"))
