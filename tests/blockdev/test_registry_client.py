# SPDX-License-Identifier: Apache-2.0
"""The client against Debian's docker-registry: what it reads and writes, how it fails, TLS, redirects."""

from __future__ import annotations

import datetime
import email.utils
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.errors import AccessDenied, BlockdevError, CorruptImage, NotFound, SourceError, UsageError
from blockdev.registry.backoff import Backoff, LeftAlone
from blockdev.registry.client import Client, Part
from blockdev.registry.exchange import Timeouts
from formats import oci
from tests.authority import Authority
from tests.fakes.http_server import Answer, HttpServer
from tests.fakes.object_store import ObjectStore
from tests.registries import Registry
from tests.small_image import CONTENT, DIGEST, NOBODY, SECRET, assert_one_sentence, provider, push, read

Registries = Callable[..., Registry]

# ---- reading and writing -------------------------------------------------------------------


def test_what_was_pushed_is_read_back(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    client.ping()
    digest = push(client)
    assert client.resolve("app", "v1") == digest
    by_tag, by_digest = client.manifest("app", "v1"), client.manifest("app", digest)
    assert by_tag == by_digest
    assert by_tag.media_type == oci.OCI_MANIFEST
    manifest = oci.parse_manifest(by_tag.body)
    assert isinstance(manifest, oci.Manifest)
    assert manifest.layers[0].digest == DIGEST
    assert b"diff_ids" in client.blob("app", manifest.config.digest, 4096)
    assert client.blob_size("app", DIGEST) == len(CONTENT)
    assert read(client, 1_000_001, 300_000) == CONTENT[1_000_001:1_300_001]


def test_docker_manifests_are_asked_for_too(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    push(client)
    manifest = oci.parse_manifest(client.manifest("app", "v1").body)
    assert isinstance(manifest, oci.Manifest)
    docker = oci.Manifest(manifest.config, manifest.layers, oci.DOCKER_MANIFEST)
    client.put_manifest("app", "docker", docker.media_type, docker.build())
    assert client.manifest("app", "docker").media_type == oci.DOCKER_MANIFEST


def test_a_blob_that_is_there_is_not_sent_again(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    told: list[int] = []
    assert client.upload("app", DIGEST, len(CONTENT), io.BytesIO(CONTENT), told.append)
    assert told[-1] == len(CONTENT)
    assert not client.upload("app", DIGEST, len(CONTENT), io.BytesIO(CONTENT))
    assert [access.method for access in registry.accesses()].count("PATCH") == 1


def test_a_blob_of_another_repository_is_taken_from_there(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    push(client, "team/first")
    others = ["team/none", "team/first"]
    assert not client.upload("app", DIGEST, len(CONTENT), io.BytesIO(CONTENT), others=others)
    assert client.blob_size("app", DIGEST) == len(CONTENT)
    assert not [access for access in registry.accesses("/app/") if access.method == "PATCH"]
    assert [access.status for access in registry.accesses("/app/") if access.method == "DELETE"] == [204]


def test_a_blob_that_no_repository_gives_is_sent(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    assert client.upload("app", DIGEST, len(CONTENT), io.BytesIO(CONTENT), others=["team/none", "app"])
    assert client.blob_size("app", DIGEST) == len(CONTENT)


@pytest.mark.parametrize("lists", [True, False])
def test_a_registry_says_whether_it_lists_referrers(lists: bool) -> None:
    subject = oci.Descriptor(oci.OCI_MANIFEST, DIGEST, 7)
    referral = oci.Referral(subject, oci.NATIVE_ARTIFACT)
    body = oci.Index((), referral=referral).build()
    with HttpServer(lambda seen: Answer(201, {"OCI-Subject": DIGEST} if lists else {})) as server:
        assert Client(server.host, NOBODY).put_referrer("app", oci.OCI_INDEX, body) == lists
    assert server.seen[-1].path == f"/v2/app/manifests/{oci.digest_of(body)}"
    assert json.loads(server.seen[-1].body)["subject"]["digest"] == DIGEST


def test_an_empty_blob_can_be_pushed(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    assert client.upload("app", oci.digest_of(b""), 0, io.BytesIO())
    assert client.blob_size("app", oci.digest_of(b"")) == 0


def test_a_blob_of_another_content_is_not_stored(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    with pytest.raises(SourceError, match="DIGEST_INVALID"):
        client.upload("app", oci.digest_of(b"other"), 3, io.BytesIO(b"abc"))
    with pytest.raises(CorruptImage):
        client.upload("app", oci.digest_of(b"abcd"), 4, io.BytesIO(b"abc"))


def test_a_connection_is_used_again(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    push(client)
    for start in range(0, 20 * 65536, 65536):
        read(client, start, 65536)
    client.blob_size("app", DIGEST)
    client.manifest("app", "v1")
    assert len(registry.connections()) == 1


def test_a_range_past_the_end_is_an_error_and_is_not_waited_for(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    push(client)
    begin = time.monotonic()
    with pytest.raises(SourceError, match="answered 416"):
        read(client, len(CONTENT) + 5, 10)
    with pytest.raises(SourceError, match="asked for bytes"):
        read(client, len(CONTENT) - 5, 10)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.manifest("app", "v2"),
        lambda client: client.manifest("app", oci.digest_of(b"none")),
        lambda client: client.manifest("other", "v1"),
        lambda client: client.blob_size("app", oci.digest_of(b"none")),
        lambda client: read(client, 0, 1, digest=oci.digest_of(b"none")),
    ],
)
def test_what_is_not_there_is_not_found(registry: Registry, ask: Callable[[Client], object]) -> None:
    client = Client(registry.host, NOBODY)
    push(client)
    with pytest.raises(NotFound) as caught:
        ask(client)
    assert_one_sentence(caught.value, registry.host)


def test_the_registrys_own_words_are_passed_on(registry: Registry) -> None:
    with pytest.raises(NotFound, match="MANIFEST_UNKNOWN"):
        Client(registry.host, NOBODY).manifest("app", "v2")


# ---- hosts that are no registry --------------------------------------------------------------


def test_an_unreachable_registry_is_named(registry: Registry) -> None:
    registry.stop()
    with pytest.raises(SourceError) as caught:
        Client(registry.host, NOBODY).manifest("app", "v1")
    assert_one_sentence(caught.value, f"{registry.host}/app:v1", "connection refused")


def test_a_host_that_does_not_exist_is_named() -> None:
    with pytest.raises(SourceError) as caught:
        Client("registry.invalid", NOBODY).manifest("app", "v1")
    assert_one_sentence(caught.value, "registry.invalid/app:v1", "no such host")


def test_a_registry_that_says_nothing_is_given_up() -> None:
    gate = threading.Event()
    with HttpServer(lambda seen: Answer(body=b"x", gate=gate)) as server:
        client = Client(server.host, NOBODY, timeouts=Timeouts(stall=0.2))
        with pytest.raises(SourceError) as caught:
            client.manifest("app", "v1")
        gate.set()
    assert_one_sentence(caught.value, "no answer in time")


def test_a_registry_that_comes_back_is_used_again(registry: Registry) -> None:
    client = Client(registry.host, NOBODY)
    push(client)
    registry.stop()
    with pytest.raises(SourceError):
        read(client, 0, 10)
    registry.start()
    assert read(client, 0, 10) == CONTENT[:10]


@pytest.mark.parametrize(
    ("status", "kind", "seconds"),
    [
        (429, SourceError, 1.0),
        (503, SourceError, 1.0),
        (500, SourceError, None),
        (403, AccessDenied, None),
        (404, NotFound, None),
    ],
)
def test_a_status_becomes_an_error_once(status: int, kind: type[BlockdevError], seconds: float | None) -> None:
    with HttpServer(lambda seen: Answer(status)) as server, pytest.raises(kind, match=f"answered {status}") as caught:
        Client(server.host, NOBODY).manifest("app", "v1")
    assert getattr(caught.value, "retry_after", None) == seconds


def test_a_host_that_told_us_to_wait_is_asked_by_nobody() -> None:
    backoff = Backoff()
    with HttpServer(lambda seen: Answer(429, {"Retry-After": "50"})) as server:
        first, second = (Client(server.host, NOBODY, backoff=backoff) for _ in range(2))
        with pytest.raises(SourceError, match="answered 429"):
            first.manifest("app", "v1")
        for ask in (
            lambda: first.manifest("app", "v1"),
            lambda: second.blob_size("app", DIGEST),
            lambda: second.ping(),
            lambda: read(second, 0, 10),
        ):
            with pytest.raises(LeftAlone, match="told us to wait") as caught:
                ask()
            assert 0 < caught.value.seconds <= 50
        assert len(server.seen) == 1


def test_what_a_server_says_of_a_signature_is_not_repeated() -> None:
    said = "bad signature of http://cdn/blob?X-Signature=s3cret&b=1"
    body = json.dumps({"errors": [{"code": "NO", "message": said}]}).encode()
    answer = Answer(418, {"Content-Type": "application/json"}, body)
    with HttpServer(lambda seen: answer) as server, pytest.raises(SourceError, match="bad signature") as caught:
        Client(server.host, NOBODY).manifest("app", "v1")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("value", "seconds"), [("7", 7), ("soon", 1), ("-1", 1), ("9" * 50, 1)])
def test_retry_after_is_read(value: str, seconds: float | None) -> None:
    with HttpServer(lambda seen: Answer(503, {"Retry-After": value})) as server, pytest.raises(SourceError) as caught:
        Client(server.host, NOBODY).manifest("app", "v1")
    assert caught.value.retry_after == seconds


def test_retry_after_may_be_a_date() -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    date = email.utils.format_datetime(soon, usegmt=True)
    with HttpServer(lambda seen: Answer(503, {"Retry-After": date})) as server, pytest.raises(SourceError) as caught:
        Client(server.host, NOBODY).manifest("app", "v1")
    assert caught.value.retry_after is not None
    assert 30 < caught.value.retry_after <= 60


def test_a_manifest_must_have_the_digest_it_was_asked_by() -> None:
    with HttpServer(lambda seen: Answer(body=b"{}")) as server, pytest.raises(CorruptImage, match="sha256:44136fa"):
        Client(server.host, NOBODY).manifest("app", DIGEST)


def test_an_endless_manifest_is_cut_off() -> None:
    huge = bytes(oci.DOCUMENT_SIZE_MAX + 1)
    with HttpServer(lambda seen: Answer(body=huge)) as server, pytest.raises(SourceError, match="larger than"):
        Client(server.host, NOBODY).manifest("app", "v1")


@pytest.mark.parametrize(
    "answer",
    [
        Answer(206, {}, b"0123456789"),
        Answer(206, {"Content-Range": "bytes 1-10/100"}, b"0123456789"),
        Answer(206, {"Content-Range": "bytes 0-8/100"}, b"012345678"),
        Answer(206, {"Content-Type": "multipart/byteranges; boundary=x"}, b"--x"),
        Answer(206, {"Content-Range": "bytes 0-9/100", "Content-Encoding": "gzip"}, b"0123456789"),
        Answer(204),
    ],
)
def test_an_answer_that_is_not_the_range_is_an_error(answer: Answer) -> None:
    with HttpServer(lambda seen: answer) as server, pytest.raises(SourceError):
        read(Client(server.host, NOBODY), 0, 10)


def test_where_blobs_are_is_learned_and_forgotten_by_many_at_once() -> None:
    """60 blobs, whose ways end and are found again, as with URLs that expire."""
    client = Client("a.example", NOBODY)
    parts = [Part("app", f"sha256:{number:064x}", 0, 1) for number in range(60)]
    over = threading.Event()

    def forget() -> None:
        while not over.is_set():
            for part in parts:
                client._forget((part.repository, part.digest))

    forgetting = threading.Thread(target=forget)
    forgetting.start()
    try:
        for part in parts * 200:
            client._remember(part, "https://store.example/blob")
    finally:
        over.set()
        forgetting.join()


def test_a_body_that_ends_early_is_an_error() -> None:
    answer = Answer(206, {"Content-Range": "bytes 0-9/100"}, b"0123456789", cut=5)
    with HttpServer(lambda seen: answer) as server, pytest.raises(SourceError, match="ended early"):
        read(Client(server.host, NOBODY), 0, 10)


def test_a_body_that_dribbles_is_given_up_at_its_deadline() -> None:
    gate = threading.Event()
    answer = Answer(206, {"Content-Range": "bytes 0-9/100"}, b"0123456789", gate=gate, hold_at=5)
    with HttpServer(lambda seen: answer) as server:
        client = Client(server.host, NOBODY)
        begin = time.monotonic()
        with client.open_part(Part("app", DIGEST, 0, 10), begin + 0.3) as body:
            buffer = memoryview(bytearray(10))
            assert body.reply.read_piece(buffer) == 5
            with pytest.raises(SourceError, match="no answer in time"):
                body.reply.read_piece(buffer)
        assert time.monotonic() - begin < 5
        gate.set()


# ---- TLS ----------------------------------------------------------------------------------------------


def test_a_private_ca_is_trusted_when_it_is_given(registries: Registries, authority: Authority) -> None:
    registry = registries(tls=authority.server("127.0.0.1"))
    client = Client(registry.host, NOBODY, ca=authority.root.pem)
    push(client)
    assert read(client, 5, 10) == CONTENT[5:15]


def test_a_ca_that_did_not_sign_is_refused(registries: Registries, authority: Authority, tmp_path: Path) -> None:
    registry = registries(tls=authority.server("127.0.0.1"))
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    with pytest.raises(SourceError) as caught:
        Client(registry.host, NOBODY, ca=other.root.pem).manifest("app", "v1")
    assert_one_sentence(caught.value, f"{registry.host}/app:v1", "certificate is not trusted")


def test_a_certificate_for_another_name_is_refused(registries: Registries, authority: Authority) -> None:
    registry = registries(tls=authority.server("registry.example"))
    with pytest.raises(SourceError, match="certificate is not trusted"):
        Client(registry.host, NOBODY, ca=authority.root.pem).manifest("app", "v1")


def test_without_a_ca_tls_on_loopback_is_not_guessed(registries: Registries, authority: Authority) -> None:
    registry = registries(tls=authority.server("127.0.0.1"))
    with pytest.raises(SourceError, match="--ca FILE"):
        Client(registry.host, NOBODY).manifest("app", "v1")


def test_with_a_ca_plain_http_is_no_fallback(registry: Registry, authority: Authority) -> None:
    with pytest.raises(SourceError, match="TLS failed"):
        Client(registry.host, NOBODY, ca=authority.root.pem).manifest("app", "v1")
    Client(registry.host, NOBODY, ca=authority.root.pem, plain_http=True).ping()


def test_what_is_no_certificate_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        Client("localhost", NOBODY, ca="not PEM")


@pytest.mark.parametrize(
    ("host", "plain", "want"),
    [
        ("localhost:5000", False, "http"),
        ("127.3.2.1:5000", False, "http"),
        ("[::1]:5000", False, "http"),
        ("registry.example", False, "https"),
        ("localhost.example", False, "https"),
        ("10.0.0.1:5000", False, "https"),
        ("10.0.0.1:5000", True, "http"),
        ("docker.io", False, "https"),
    ],
)
def test_plain_http_is_for_loopback_or_on_demand(host: str, plain: bool, want: str) -> None:
    assert Client(host, NOBODY, plain_http=plain)._base.startswith(f"{want}://")


# ---- redirects ---------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.server.close()


def test_a_redirect_is_followed_without_authorization(
    registries: Registries, store: ObjectStore, tmp_path: Path
) -> None:
    registry = registries(users={"ann": SECRET}, redirect_to=store.server.url)
    store.folder = registry.storage
    client = Client(registry.host, provider(tmp_path, registry.host))
    push(client)
    asked = len(registry.accesses("/blobs/"))
    for start in (0, 65536, 131072):
        assert read(client, start, 65536) == CONTENT[start : start + 65536]
    assert len(registry.accesses("/blobs/")) - asked <= 2, "the target is remembered"
    assert client.blob_size("app", DIGEST) == len(CONTENT)
    assert [seen.range for seen in store.server.seen if seen.range] == [(0, 65535), (65536, 131071), (131072, 196607)]
    assert not [seen for seen in store.server.seen if "authorization" in seen.headers]


def test_a_redirect_does_not_leave_tls(authority: Authority) -> None:
    with HttpServer(lambda seen: Answer()) as plain:
        context = authority.server("127.0.0.1").server_context()
        with HttpServer(lambda seen: Answer(307, {"Location": f"{plain.url}/x?secret=1"}), context) as server:
            client = Client(server.host, NOBODY, ca=authority.root.pem, plain_http=False)
            with pytest.raises(SourceError, match="not safe to use") as caught:
                read(client, 0, 10)
        assert not plain.seen
    assert "secret" not in str(caught.value)


def test_a_redirect_does_not_leave_tls_even_where_plain_http_is_allowed(authority: Authority) -> None:
    with HttpServer(lambda seen: Answer()) as plain:
        context = authority.server("127.0.0.1").server_context()
        with (
            HttpServer(lambda seen: Answer(307, {"Location": f"{plain.url}/x"}), context) as safe,
            HttpServer(lambda seen: Answer(307, {"Location": f"{safe.url}/x"})) as server,
        ):
            client = Client(server.host, NOBODY, ca=authority.root.pem, plain_http=True)
            with pytest.raises(SourceError, match="not safe to use"):
                read(client, 0, 10)
        assert not plain.seen


def test_redirects_that_never_end_are_an_error() -> None:
    with HttpServer(lambda seen: Answer(307, {"Location": "/again"})) as server:
        with pytest.raises(SourceError, match="redirects more than 5 times"):
            read(Client(server.host, NOBODY), 0, 10)
        assert len(server.seen) == 6
