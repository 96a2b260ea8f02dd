# SPDX-License-Identifier: Apache-2.0
"""Image layouts and repositories keep images alike; what is read from them is checked, and goes on where it broke."""

from __future__ import annotations

import io
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.build.depot import BlobFile, Depot
from blockdev.build.layout import Layout
from blockdev.build.repository import Repository
from blockdev.errors import AccessDenied, CorruptImage, NotFound, SourceError, UsageError
from blockdev.registry import backoff, exchange
from blockdev.registry import client as client_module
from blockdev.registry.client import Client, Document
from blockdev.registry.exchange import Timeouts
from formats import oci
from tests.fakes.http_server import Answer, Ending, HttpServer, Seen, ranged
from tests.registries import Registry
from tests.requires import requires_command
from tests.small_image import CONTENT, DIGEST, NOBODY

BLOB = oci.Descriptor(oci.OCI_LAYER, DIGEST, len(CONTENT))
INDEX = oci.Index((), annotations={"a": "b"}).build()
DOCUMENT = Document(oci.OCI_INDEX, oci.digest_of(INDEX), INDEX)


@pytest.fixture(params=["layout", "repository"])
def depot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Depot]:
    if request.param == "layout":
        yield Layout.parse(f"{tmp_path}/images:one")
        return
    registry: Registry = request.getfixturevalue("registry")
    client = Client(registry.host, NOBODY)
    yield Repository(client, oci.Reference.parse(f"{registry.host}/team/app:one"))
    client.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file that holds CONTENT, read to its end."""
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    os.lseek(fd, 0, os.SEEK_END)
    yield fd
    os.close(fd)


def _all(depot: Depot, blob: oci.Descriptor = BLOB, step: int = 70_000) -> bytes:
    with depot.opened(blob) as read:
        return b"".join(iter(lambda: read(step), b""))


def _found(registry: Registry, index: str) -> list[dict[str, object]]:
    client = Client(registry.host, NOBODY)
    found: list[dict[str, object]] = json.loads(client.manifest("team/app", index).body)["manifests"]
    client.close()
    return found


# ---- both -----------------------------------------------------------------------------------


def test_a_blob_that_was_put_is_read_back_and_not_put_twice(depot: Depot, file: int) -> None:
    told: list[int] = []
    assert depot.put_blob(BlobFile(DIGEST, len(CONTENT), file), told.append)
    assert told[-1] == len(CONTENT)
    assert oci.digest_of(_all(depot)) == DIGEST
    assert not depot.put_blob(BlobFile(DIGEST, len(CONTENT), file), told.append)


def test_a_document_is_found_by_its_tag_and_its_digest(depot: Depot) -> None:
    depot.put_document(DOCUMENT)
    assert depot.document(DOCUMENT.digest) == DOCUMENT
    with pytest.raises(NotFound):
        depot.document("")
    depot.tag(DOCUMENT)
    assert depot.document("") == DOCUMENT
    assert depot.document("one") == DOCUMENT
    other = oci.Index(()).build()
    depot.tag(Document(oci.OCI_INDEX, oci.digest_of(other), other))
    assert depot.document("").body == other
    assert depot.document(DOCUMENT.digest).body == INDEX


def test_what_is_not_there_is_not_found(depot: Depot) -> None:
    with pytest.raises(NotFound):
        depot.document("")
    with pytest.raises(NotFound):
        _all(depot)


# ---- layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "folder", "tag"),
    [
        ("dir", "dir", "latest"),
        ("dir:1", "dir", "1"),
        ("some/dir:v1.0", "some/dir", "v1.0"),
        ("with:colon/dir", "with:colon/dir", "latest"),
        ("with:colon/dir:x", "with:colon/dir", "x"),
    ],
)
def test_a_layouts_name_is_a_folder_and_a_tag(place: str, folder: str, tag: str) -> None:
    found = Layout.parse(place)
    assert (str(found.folder), found.place) == (folder, f"oci:{folder}:{tag}")


@pytest.mark.parametrize("place", ["", ":tag"])
def test_a_layout_without_a_folder_is_refused(place: str) -> None:
    with pytest.raises(UsageError, match="want oci:DIR"):
        Layout.parse(place)


def test_a_folder_may_be_named_like_one_with_a_tag(tmp_path: Path) -> None:
    (tmp_path / "dir:1").mkdir()
    assert Layout.parse(f"{tmp_path}/dir:1").folder == tmp_path / "dir:1"


def test_a_blob_whose_content_has_changed_is_refused(tmp_path: Path, file: int) -> None:
    layout = Layout(tmp_path / "images", None)
    layout.put_blob(BlobFile(DIGEST, len(CONTENT), file), lambda done: None)
    path = tmp_path / "images" / "blobs" / "sha256" / DIGEST.removeprefix("sha256:")
    for wrong in (CONTENT[:-1], CONTENT + b"x", bytes([CONTENT[0] ^ 1]) + CONTENT[1:]):
        path.write_bytes(wrong)
        with pytest.raises(CorruptImage, match="reading a blob failed"):
            _all(layout)


@pytest.mark.parametrize("name", ["oci-layout", "index.json", "blobs/sha256/" + DIGEST.removeprefix("sha256:")])
def test_nobody_is_waited_for_to_write_to_a_file_of_a_layout(tmp_path: Path, file: int, name: str) -> None:
    layout = Layout(tmp_path / "images", "one")
    layout.put_blob(BlobFile(DIGEST, len(CONTENT), file), lambda done: None)
    layout.tag(DOCUMENT)
    (tmp_path / "images" / name).unlink()
    os.mkfifo(tmp_path / "images" / name)
    with pytest.raises(UsageError, match="neither a file"):
        _ = layout.document("one"), _all(layout)


def test_writers_of_one_layout_lose_nothing(tmp_path: Path) -> None:
    def tag(number: int) -> None:
        for turn in range(5):
            Layout(tmp_path / "images", f"{number}-{turn}").tag(DOCUMENT)

    threads = [threading.Thread(target=tag, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads((tmp_path / "images" / "index.json").read_bytes())["manifests"]) == 20


def test_tagging_in_a_layout_keeps_all_that_is_said_of_others(tmp_path: Path) -> None:
    Layout(tmp_path, "one").tag(DOCUMENT)
    index = json.loads((tmp_path / "index.json").read_bytes())
    index |= {"artifactType": "x"}
    index["manifests"][0] |= {"urls": ["http://registry/x"], "data": "e30="}
    (tmp_path / "index.json").write_text(json.dumps(index))
    Layout(tmp_path, "two").tag(DOCUMENT)
    found = json.loads((tmp_path / "index.json").read_bytes())
    index["manifests"].append(found["manifests"][1])
    assert found == index


def test_a_layout_is_read_by_skopeo(tmp_path: Path, file: int) -> None:
    """As far as its documents go: what is in the layer is no matter."""
    layout = Layout(tmp_path / "images", "one")
    config = oci.build_config(oci.Platform("linux", "amd64"), [DIGEST])
    described = oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(config), len(config))
    with io.FileIO(os.memfd_create("config"), "w+") as small:
        small.write(config)
        layout.put_blob(BlobFile(described.digest, described.size, small.fileno()), lambda done: None)
    layout.put_blob(BlobFile(DIGEST, len(CONTENT), file), lambda done: None)
    body = oci.Manifest(described, (BLOB,)).build()
    layout.tag(Document(oci.OCI_MANIFEST, oci.digest_of(body), body))
    requires_command("skopeo")
    command = ["skopeo", "copy", "--quiet", f"oci:{tmp_path}/images:one", f"dir:{tmp_path}/copy"]
    subprocess.run(command, check=True, timeout=60)


def test_a_referrer_does_not_make_a_layouts_only_image_ambiguous(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "images", "one")
    layout.tag(DOCUMENT)
    body = oci.Index((), annotations={"c": "d"}).build()
    referrer = oci.Descriptor(oci.OCI_INDEX, oci.digest_of(body), len(body), artifact_type=oci.NATIVE_ARTIFACT)
    layout.refer(DOCUMENT.digest, Document(oci.OCI_INDEX, oci.digest_of(body), body), referrer)
    assert Layout(tmp_path / "images", None).document("") == DOCUMENT


# ---- repositories ---------------------------------------------------------------------------


def test_a_registry_without_a_list_of_referrers_gets_one_under_a_tag(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    repository = Repository(client, oci.Reference.parse(f"{registry.host}/team/app:one"))
    repository.tag(DOCUMENT)
    tag = DOCUMENT.digest.replace(":", "-")
    known = oci.Descriptor(oci.OCI_INDEX, DOCUMENT.digest, len(INDEX), more={"urls": ["http://registry/x"]})
    client.put_manifest("team/app", tag, oci.OCI_INDEX, oci.Index((known,)).build())
    referrers = []
    for name in ("x", "y", "x"):
        body = oci.Index((), annotations={"name": name}).build()
        referrer = oci.Descriptor(oci.OCI_INDEX, oci.digest_of(body), len(body), artifact_type=oci.NATIVE_ARTIFACT)
        referrers.append(referrer.build())
        repository.refer(DOCUMENT.digest, Document(oci.OCI_INDEX, oci.digest_of(body), body), referrer)
    client.close()
    assert _found(registry, tag) == [known.build(), referrers[1], referrers[0]]


def test_a_digest_is_nothing_to_tag(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    with pytest.raises(UsageError, match="want a tag"):
        Repository(client, oci.Reference.parse(f"{registry.host}/team/app@{DIGEST}")).tag(DOCUMENT)
    client.close()


def _breaking(after: int) -> HttpServer:
    """A registry whose every answer breaks after so many bytes."""

    def answer(seen: Seen) -> Answer:
        found = ranged(seen, CONTENT)
        return Answer(found.status, found.headers, found.body, cut=after, ending=Ending.CLOSE)

    return HttpServer(answer)


def _stream(server: HttpServer) -> bytes:
    client = Client(server.host, NOBODY, timeouts=Timeouts(stall=2.0))
    try:
        return _all(Repository(client, oci.Reference.parse(f"{server.host}/app:one")))
    finally:
        client.close()


def test_a_stream_goes_on_where_its_connection_broke() -> None:
    with _breaking(1_000_000) as server:
        assert oci.digest_of(_stream(server)) == DIGEST
    starts = [seen.range[0] for seen in server.seen if seen.range]
    assert starts == [0, 1_000_000, 2_000_000, 3_000_000]


def test_a_stream_that_gets_no_further_is_given_up() -> None:
    with _breaking(0) as server, pytest.raises(SourceError):
        _stream(server)
    assert len(server.seen) == 2


def test_a_registry_without_ranges_is_read_again_and_passed_over() -> None:
    answers = iter([1_000_000, None])

    def answer(seen: Seen) -> Answer:
        return Answer(200, {"Content-Length": str(len(CONTENT))}, CONTENT, cut=next(answers), ending=Ending.RESET)

    with HttpServer(answer) as server:
        assert oci.digest_of(_stream(server)) == DIGEST


def test_what_a_registry_refuses_is_not_asked_again() -> None:
    with HttpServer(lambda seen: Answer(403)) as server, pytest.raises(AccessDenied):
        _stream(server)


class Taking:
    """A registry that takes one blob in chunks. It is busy, once, at each request that it has not seen yet.

    `lossy`: what it is asked to commit it does before it says that it is busy.
    """

    def __init__(self, *, lossy: bool = False) -> None:
        self.content = b""
        self.done = False
        self.asked: list[str] = []
        self._lossy = lossy
        self._known: set[tuple[str, str]] = set()
        self.server = HttpServer(self._answer)

    def _answer(self, seen: Seen) -> Answer:
        self.asked.append(seen.method)
        step = seen.method, seen.headers.get("content-range", "")
        busy = step not in self._known
        self._known.add(step)
        if busy and not (self._lossy and seen.method == "PUT"):
            return Answer(429, {"Retry-After": "0"})
        if seen.method == "HEAD":
            return Answer(200 if self.done else 404, {"Content-Length": "0"})
        if seen.method == "PUT":
            if self.done:
                return Answer(404)
            self.done = True
            return Answer(503 if busy else 201)
        self.content += seen.body
        return Answer(202, {"Location": f"/v2/app/blobs/uploads/{len(self.content)}"})


@pytest.mark.parametrize("lossy", [False, True])
def test_a_busy_registry_is_waited_for_at_each_step_of_an_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, lossy: bool
) -> None:
    monkeypatch.setattr(client_module, "CHUNK", len(CONTENT) // 2)
    monkeypatch.setattr(backoff, "LIMITED_INTERVAL", 0.01)
    monkeypatch.setattr(exchange, "BUSY_SECONDS", 0.01)
    registry = Taking(lossy=lossy)
    (tmp_path / "content").write_bytes(CONTENT)
    client = Client(registry.server.host, NOBODY)
    with registry.server, open(tmp_path / "content", "rb") as file:
        depot = Repository(client, oci.Reference.parse(f"{registry.server.host}/app:one"))
        assert depot.put_blob(BlobFile(DIGEST, len(CONTENT), file.fileno()), lambda arrived: None)
    client.close()
    assert oci.digest_of(registry.content) == DIGEST
    twice = [step for step in ("HEAD", "POST", "PATCH", "PATCH") for _ in range(2)]
    assert registry.asked == [*twice, "PUT", "HEAD", *([] if lossy else ["PUT"])]
