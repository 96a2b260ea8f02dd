# SPDX-License-Identifier: Apache-2.0
"""Servers that speak slowly, without end or not quite HTTP: no request waits longer than it may."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev.errors import SourceError
from blockdev.registry import upload
from blockdev.registry.client import Client, Part
from blockdev.registry.exchange import Timeouts
from formats.oci import digest_of
from tests.authority import Authority
from tests.fakes.http_server import Answer, HttpServer
from tests.fakes.raw_server import RawServer, Talk, Visit
from tests.small_image import DIGEST, NOBODY, assert_one_sentence, provider

HASTY = Timeouts(stall=0.3)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def dripping(start: bytes, piece: bytes) -> Talk:
    def talk(visit: Visit) -> None:
        next(visit.requests())
        visit.say(start)
        visit.drip(piece)

    return talk


DRIPS = {
    "status": (b"", b"H"),
    "head": (OK, b"X: y\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100\r\n\r\n"),
    "other interim answers": (b"", b"HTTP/1.1 103\r\n\r\n"),
    "body": (OK + b"Content-Length: 1000000\r\n\r\n", b"x"),
    "chunks": (CHUNKED, b"1\r\nx\r\n"),
    "a chunk's head": (CHUNKED + b"1;", b"x"),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n"),
}


@pytest.mark.parametrize("where", DRIPS)
def test_an_answer_that_drips_is_given_up(where: str) -> None:
    with RawServer(dripping(*DRIPS[where])) as server, pytest.raises(SourceError) as caught:
        Client(server.host, NOBODY, timeouts=HASTY).manifest("app", "v1")
    assert_one_sentence(caught.value, "the answer is too slow")


def test_an_answer_that_drips_over_tls_is_given_up(authority: Authority) -> None:
    context = authority.server("127.0.0.1").server_context()
    with RawServer(dripping(*DRIPS["head"]), context) as server, pytest.raises(SourceError, match="too slow"):
        Client(server.host, NOBODY, ca=authority.root.pem, timeouts=HASTY).manifest("app", "v1")


def test_an_answer_that_is_fast_enough_ends_at_its_deadline() -> None:
    def talk(visit: Visit) -> None:
        next(visit.requests())
        visit.say(CHUNKED + b"1;")
        visit.drip(b"x" * 1000)

    with RawServer(talk) as server:
        client = Client(server.host, NOBODY)
        with (
            client.open_part(Part("app", DIGEST, 0, 10), time.monotonic() + 0.3) as body,
            pytest.raises(SourceError, match=r"the answer is too slow|no answer in time"),
        ):
            body.reply.read_piece(memoryview(bytearray(10)))


@pytest.mark.parametrize("piece", [b"X: " + b"y" * 1000 + b"\r\n", b"HTTP/1.1 103\r\n\r\n" * 100])
def test_a_head_without_end_is_not_read(piece: bytes) -> None:
    def talk(visit: Visit) -> None:
        next(visit.requests())
        visit.say(OK if piece.startswith(b"X") else b"")
        visit.drip(piece, 0)

    with RawServer(talk) as server, pytest.raises(SourceError) as caught:
        Client(server.host, NOBODY).manifest("app", "v1")
    assert_one_sentence(caught.value, "the head of the answer is too long")


@pytest.mark.parametrize(
    ("piece", "why"), [(b"10000\r\n" + b"x" * 0x10000 + b"\r\n", "larger than"), (b"zz\r\n", "failed")]
)
def test_chunks_count_though_the_head_says_that_nothing_comes(piece: bytes, why: str) -> None:
    def talk(visit: Visit) -> None:
        next(visit.requests())
        visit.say(CHUNKED.replace(b"\r\n", b"\r\nContent-Length: 0\r\n", 1))
        visit.drip(piece, 0)

    with RawServer(talk) as server, pytest.raises(SourceError, match=why):
        Client(server.host, NOBODY).manifest("app", "v1")


def test_a_token_service_that_drips_is_given_up(tmp_path: Path) -> None:
    with RawServer(dripping(*DRIPS["head"])) as service:
        challenge = {"WWW-Authenticate": f'Bearer realm="{service.url}/token"'}
        with HttpServer(lambda seen: Answer(401, challenge)) as server, pytest.raises(SourceError) as caught:
            Client(server.host, provider(tmp_path, server.host), timeouts=HASTY).manifest("app", "v1")
    assert_one_sentence(caught.value, "the answer is too slow")


def test_nobody_waits_for_anothers_login_longer_than_he_may() -> None:
    asked = threading.Event()

    def log_in(client: Client) -> None:
        with pytest.raises(SourceError):
            client.blob_size("app", DIGEST)

    def talk(visit: Visit) -> None:
        next(visit.requests())
        asked.set()
        visit.pause(20)

    with RawServer(talk) as service:
        challenge = {"WWW-Authenticate": f'Bearer realm="{service.url}/token"'}
        with HttpServer(lambda seen: Answer(401, challenge)) as server:
            client = Client(server.host, NOBODY)
            first = threading.Thread(target=log_in, args=(client,))
            first.start()
            assert asked.wait(20)
            with pytest.raises(SourceError, match="no time left while another request logs in"):
                client.open_part(Part("app", DIGEST, 0, 10), time.monotonic() + 0.3)
            service.close()
            first.join()


SEVEN = OK + b"Content-Length: 7\r\n\r\n"


def test_a_kept_connection_that_is_closed_without_an_answer_is_replaced() -> None:
    def talk(visit: Visit) -> None:
        requests = visit.requests()
        next(requests)
        visit.say(SEVEN)
        next(requests)

    with RawServer(talk) as server:
        client = Client(server.host, NOBODY)
        assert [client.blob_size("app", DIGEST) for _ in range(3)] == [7, 7, 7]
        assert server.visits == 3
        with pytest.raises(SourceError, match="closed without an answer"):  # it may have arrived
            client.put_manifest("app", "v1", "x/y", b"")


def test_a_new_connection_that_is_closed_without_an_answer_is_an_error() -> None:
    with RawServer(lambda visit: next(visit.requests())) as server:
        with pytest.raises(SourceError, match="closed without an answer"):
            Client(server.host, NOBODY).blob_size("app", DIGEST)
        assert server.visits == 1


def test_interim_answers_are_passed_over() -> None:
    def talk(visit: Visit) -> None:
        for _ in visit.requests():
            visit.say(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + SEVEN)

    with RawServer(talk) as server:
        client = Client(server.host, NOBODY)
        assert [client.blob_size("app", DIGEST) for _ in range(2)] == [7, 7]
        assert server.visits == 1


def storing(take: Callable[[Visit], object]) -> Talk:
    """A registry for an upload of one chunk, taken as `take` does."""
    answers = {
        b"HEAD": b"HTTP/1.1 404 Not Found\r\n",
        b"POST": b"HTTP/1.1 202 Accepted\r\nLocation: /upload\r\n",
        b"PATCH": b"HTTP/1.1 202 Accepted\r\nLocation: /upload\r\n",
        b"PUT": b"HTTP/1.1 201 Created\r\n",
    }

    def talk(visit: Visit) -> None:
        for head in visit.requests():
            method = head.partition(b" ")[0]
            if method == b"PATCH":
                take(visit)
            visit.say(answers[method] + b"Content-Length: 0\r\n\r\n")

    return talk


@pytest.mark.parametrize("tls", [False, True])
def test_a_receiver_may_pause(tls: bool, authority: Authority) -> None:
    content = os.urandom(upload.CHUNK)
    taken = []

    def take(visit: Visit) -> None:
        visit.pause(0.7)
        first = visit.take(upload.CHUNK // 2)
        visit.pause(0.7)
        taken.append(first + visit.take(upload.CHUNK // 2))

    context = authority.server("127.0.0.1").server_context() if tls else None
    with RawServer(storing(take), context) as server:
        timeouts = Timeouts(connect=0.5, stall=0.5)
        client = Client(server.host, NOBODY, ca=authority.root.pem if tls else None, timeouts=timeouts)
        assert client.upload("app", digest_of(content), len(content), io.BytesIO(content))
    assert taken == [content]


def test_a_receiver_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PATIENCE", 0.3)
    content = bytes(upload.CHUNK)
    with RawServer(storing(lambda visit: visit.pause(20))) as server, pytest.raises(SourceError) as caught:
        Client(server.host, NOBODY).upload("app", digest_of(content), len(content), io.BytesIO(content))
    assert_one_sentence(caught.value, "no answer in time")
