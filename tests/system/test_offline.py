# SPDX-License-Identifier: Apache-2.0
"""Images without their registry: what the root remembers of them, and serves."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.root import Root
from formats import oci
from tests import requires
from tests.commands import Run, devices, until
from tests.fakes.fault_proxy import forwarded
from tests.fakes.http_server import Answer, HttpServer, Seen
from tests.registries import Registry

MIB = 1 << 20
_NOTICE = r"ociblk: registry {host} unreachable: using {name}@{digest} seen 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\n"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk"
    path.write_bytes(os.urandom(8 * MIB))
    return path


@pytest.fixture
def pushed(registry: Registry, tmp_path: Path, ociblk: str, disk: Path) -> Iterator[tuple[str, str]]:
    """Tag and digest of an image in the registry, pushed from a root of its own."""
    root, layer = tmp_path / "pusher", tmp_path / "layer"
    subprocess.run([ociblk, "import", disk, "-o", layer, "--tar"], check=True)
    command = [ociblk, "push", layer, f"{registry.host}/app:1", "--root", root]
    by_digest = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield f"{registry.host}/app:1", by_digest
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", str(root)], check=True)


def _documents(root: Root) -> list[Path]:
    """Those that are wholly there."""
    return sorted((root.catalog / "sha256").glob("[0-9a-f]*"))


def _whole(run: Run, reference: str, disk: Path, tmp_path: Path) -> str:
    """Export the image, see that it is right; what was said on stderr."""
    done = run("export", reference, "-o", tmp_path / "raw")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw").read_bytes() == disk.read_bytes()
    return done.stderr


def test_a_tag_is_what_it_was_seen_as_last_and_that_is_said(
    run: Run, root: Root, registry: Registry, pushed: tuple[str, str], disk: Path, tmp_path: Path
) -> None:
    tag, by_digest = pushed
    assert _whole(run, tag, disk, tmp_path) == ""
    assert until(lambda: len(_documents(root)) == 2)  # the manifest, and its config
    registry.stop()
    assert run("daemon", "--stop").returncode == 0
    digest = by_digest.partition("@")[2]
    notice = re.compile(_NOTICE.format(host=re.escape(registry.host), name=re.escape(tag), digest=digest))
    assert notice.fullmatch(_whole(run, tag, disk, tmp_path))
    assert _whole(run, by_digest, disk, tmp_path) == ""
    inspected = run("inspect", tag, "--json")
    assert notice.fullmatch(inspected.stderr)
    assert json.loads(inspected.stdout)["size"] == 8 * MIB


def test_a_tag_whose_answer_is_no_image_is_what_it_was_seen_as_last(
    run: Run, registry: Registry, pushed: tuple[str, str]
) -> None:
    digest = pushed[1].partition("@")[2]
    lost = oci.digest_of(b"another manifest")
    indexes = [oci.Index((oci.Descriptor(oci.OCI_MANIFEST, child, 500),)).build() for child in (digest, lost)]
    answers = {"/v2/app/manifests/many": Answer(200, {"Content-Type": oci.OCI_INDEX}, indexes[0])}

    def answer(seen: Seen) -> Answer:
        return answers.get(seen.path) or forwarded(seen, registry.host)

    with HttpServer(answer) as front:
        tag = f"{front.host}/app:many"
        first = run("inspect", tag)
        assert (first.returncode, first.stderr) == (0, "")
        answers["/v2/app/manifests/many"] = Answer(200, {"Content-Type": oci.OCI_INDEX}, indexes[1])
        answers[f"/v2/app/manifests/{lost}"] = Answer(500)
        kept = f"using {tag}@{oci.digest_of(indexes[0])} seen "
        second = run("inspect", tag)
        assert (second.returncode, second.stdout) == (0, first.stdout)
        assert second.stderr.startswith(f"ociblk: registry {front.host} unreachable: {kept}")
        answers["/v2/app/manifests/many"] = Answer(200, {"Content-Type": "text/html"}, b"<html>Please log in")
        third = run("inspect", tag)
        assert (third.returncode, third.stdout) == (0, first.stdout)
        assert third.stderr.startswith(f"ociblk: registry {front.host} answers with no manifest: {kept}")
        assert run("inspect", f"{front.host}/app:other").returncode == 3
        answers["/v2/app/manifests/other"] = answers["/v2/app/manifests/many"]
        assert run("inspect", f"{front.host}/app:other").returncode == 5


def test_what_is_kept_is_named_by_its_digest(
    run: Run, root: Root, registry: Registry, pushed: tuple[str, str], tmp_path: Path
) -> None:
    assert run("inspect", pushed[0]).returncode == 0
    assert until(lambda: len(_documents(root)) == 2)
    for document in _documents(root):
        assert oci.digest_of(document.read_bytes()) == f"sha256:{document.name}"


def test_a_digest_is_asked_for_once(run: Run, registry: Registry, pushed: tuple[str, str]) -> None:
    _, by_digest = pushed
    digest = by_digest.partition("@")[2]
    before = len(registry.accesses(f"/manifests/{digest}"))
    for _ in range(2):
        assert run("inspect", by_digest).returncode == 0
    assert len(registry.accesses(f"/manifests/{digest}")) == before + 1


def test_a_tag_is_asked_at_each_open(
    run: Run, registry: Registry, pushed: tuple[str, str], tmp_path: Path, ociblk: str
) -> None:
    tag, _ = pushed
    assert json.loads(run("inspect", tag, "--json").stdout)["size"] == 8 * MIB
    other, layer = tmp_path / "other", tmp_path / "other-layer"
    other.write_bytes(os.urandom(MIB))
    subprocess.run([ociblk, "import", other, "-o", layer, "--tar"], check=True)
    assert run("push", layer, tag).returncode == 0
    assert json.loads(run("inspect", tag, "--json").stdout)["size"] == MIB
    registry.stop()
    assert json.loads(run("inspect", tag, "--json").stdout)["size"] == MIB


def test_a_tag_that_is_gone_or_refused_is_not_what_it_was(
    run: Run, registry: Registry, pushed: tuple[str, str]
) -> None:
    tag, by_digest = pushed
    assert run("inspect", tag).returncode == 0
    (tags,) = registry.storage.rglob("_manifests/tags")
    tags.rename(tags.with_name("gone"))
    gone = run("inspect", tag)
    assert (gone.returncode, gone.stderr.count("\n")) == (3, 1)
    assert run("inspect", by_digest).returncode == 0


def test_a_lazy_image_serves_what_is_there_and_fails_by_policy(
    run: Run, registry: Registry, pushed: tuple[str, str], disk: Path, tmp_path: Path
) -> None:
    requires.requires_mount()
    tag, _ = pushed
    file = tmp_path / "file"
    assert run("mount", "--raw", tag, file).returncode == 0
    with open(file, "rb", buffering=0) as image:
        assert os.pread(image.fileno(), 4096, 2 * MIB) == disk.read_bytes()[2 * MIB :][:4096]
    assert run("umount", file).returncode == 0
    assert run("daemon", "--stop", "--force").returncode == 0
    registry.stop()
    mounted = run("mount", "--raw", tag, file, "--on-error", "eio:500ms")
    assert mounted.returncode == 0
    assert "unreachable" in mounted.stderr
    with open(file, "rb", buffering=0) as image:
        assert os.pread(image.fileno(), 4096, 2 * MIB) == disk.read_bytes()[2 * MIB :][:4096]
        with pytest.raises(OSError, match="Input/output"):
            os.pread(image.fileno(), 4096, 5 * MIB)
        assert os.pread(image.fileno(), 4096, 2 * MIB) == disk.read_bytes()[2 * MIB :][:4096]
    (device,) = devices(run)
    assert device["mode"] == "lazy"
    assert device["remark"] in mounted.stderr
    assert registry.host in run("ps").stdout
    assert run("umount", file).returncode == 0


def test_a_pull_says_it_as_every_command_does(
    run: Run, registry: Registry, pushed: tuple[str, str], disk: Path, tmp_path: Path
) -> None:
    tag, by_digest = pushed
    _whole(run, tag, disk, tmp_path)
    registry.stop()
    pulled = run("pull", tag)
    assert pulled.returncode == 0
    digest = by_digest.partition("@")[2]
    assert re.fullmatch(_NOTICE.format(host=registry.host, name=tag, digest=digest), pulled.stderr)


def test_an_image_never_seen_is_the_registrys_failure(run: Run, registry: Registry, pushed: tuple[str, str]) -> None:
    registry.stop()
    failed = run("inspect", pushed[0])
    assert (failed.returncode, failed.stderr.count("\n")) == (6, 1)


def test_a_prune_forgets_images_without_blobs_and_no_others(
    run: Run, root: Root, registry: Registry, pushed: tuple[str, str], disk: Path, tmp_path: Path
) -> None:
    requires.requires_mount()
    tag, _ = pushed
    file = tmp_path / "file"
    _whole(run, tag, disk, tmp_path)
    assert until(lambda: len(_documents(root)) == 2)
    assert run("mount", "--raw", tag, file).returncode == 0
    assert run("cache", "prune").returncode == 0
    assert len(_documents(root)) == 2
    assert run("umount", file).returncode == 0
    assert until(lambda: devices(run) == [])
    registry.stop()
    assert "unreachable" in _whole(run, tag, disk, tmp_path)
    assert run("cache", "prune").returncode == 0
    assert [path for path in root.catalog.rglob("*") if path.is_file()] == []
    assert run("inspect", tag).returncode == 6


def test_a_config_without_sizes_opens_offline(
    run: Run, registry: Registry, pushed: tuple[str, str], disk: Path, tmp_path: Path
) -> None:
    tag, _ = pushed
    (layer,) = json.loads(run("inspect", tag, "--json").stdout)["layers"]
    url = f"http://{registry.host}/v2/app/blobs"
    config = tmp_path / "config.v1.json"
    config.write_text(json.dumps({"repoBlobUrl": url, "lowers": [{"digest": layer["name"]}]}))
    _whole(run, str(config), disk, tmp_path)
    registry.stop()
    assert run("daemon", "--stop").returncode == 0
    assert _whole(run, str(config), disk, tmp_path) == ""


def test_a_read_only_root_is_one_clear_error(run: Run, root: Root, pushed: tuple[str, str]) -> None:
    requires.requires_root()
    root.path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,mode=0700", "tmpfs", root.path], check=True)
    try:
        for words in (["inspect", pushed[0]], ["cache", "stat"], ["cache", "prune"], ["fsck", "--repair"]):
            refused = run(*words)
            assert (refused.returncode, refused.stderr.count("\n")) == (4, 1), refused.stderr
            assert str(root.path) in refused.stderr
    finally:
        subprocess.run(["umount", root.path], check=True)


def test_a_full_root_is_one_clear_error(run: Run, root: Root, pushed: tuple[str, str]) -> None:
    requires.requires_root()
    root.path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", root.path], check=True)
    try:
        root.version.write_text("1\n")
        with open(root.path / "filler", "wb") as filler, pytest.raises(OSError, match="No space"):
            filler.write(bytes(1 << 20))
        refused = run("inspect", pushed[0])
        assert (refused.returncode, refused.stderr.count("\n")) == (8, 1), refused.stderr
        assert "No space left" in refused.stderr
        assert run("daemon", "--stop", "--force").returncode == 0
    finally:
        subprocess.run(["umount", "--lazy", root.path], check=True)
