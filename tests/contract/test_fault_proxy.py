# SPDX-License-Identifier: Apache-2.0
"""The fault proxy does what it is told, seen by a client that knows nothing of us."""

from __future__ import annotations

import email.utils
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from tests.fakes.fault_proxy import CALM, Fault, FaultProxy, Plan
from tests.registries import Registry
from tests.small_image import CONTENT, DIGEST, SECRET, push

BLOB = f"/v2/app/blobs/{DIGEST}"
RANGE = {"Range": "bytes=1000-70999"}
RIGHT = CONTENT[1000:71000]


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultProxy]:
    client = Client(registry.host, Provider())
    push(client)
    client.close()
    with FaultProxy(registry.host) as proxy:
        yield proxy


def get(proxy: FaultProxy, seconds: float = 20) -> tuple[http.client.HTTPResponse, bytes]:
    """What comes, until it ends or breaks; the reply and the part of its body."""
    connection = http.client.HTTPConnection(proxy.host, timeout=seconds)
    try:
        connection.request("GET", BLOB, headers=RANGE)
        reply = connection.getresponse()
        body = b""
        try:
            while piece := reply.read1(1 << 16):
                body += piece
        except (OSError, http.client.IncompleteRead) as error:
            body += getattr(error, "partial", b"")
            reply.broken = error  # type: ignore[attr-defined]
        return reply, body
    finally:
        connection.close()


def broken(reply: http.client.HTTPResponse) -> object:
    return getattr(reply, "broken", None)


def test_without_faults_it_is_the_registry(proxy: FaultProxy) -> None:
    reply, body = get(proxy)
    assert (reply.status, body) == (206, RIGHT)
    proxy.plan = Plan(tuple(Fault), 1, 1)
    proxy.plan = CALM
    assert get(proxy)[1] == RIGHT
    assert [(served.length, served.fault) for served in proxy.served] == [(len(RIGHT), None)] * 2


@pytest.mark.parametrize(("fault", "status"), [(Fault.LIMITED, 429), (Fault.BUSY, 503)])
def test_it_tells_how_long_to_wait_and_keeps_to_it(proxy: FaultProxy, fault: Fault, status: int) -> None:
    forms = set()
    for seed in range(12):
        proxy.plan = Plan((fault,), seed, 1)
        reply, _ = get(proxy)
        proxy.plan = CALM
        assert reply.status == status == get(proxy)[0].status
        value = reply.headers.get("Retry-After", "")
        forms.add("" if not value else "seconds" if value.isdigit() else "date")
        if "GMT" in value:
            assert email.utils.parsedate_to_datetime(value).timestamp() > time.time()
        first, second = proxy.served[-2:]
        assert first.at + first.told == pytest.approx(second.at + second.told)
        assert first.length == second.length == 0
        proxy._told.clear()
    assert forms == {"", "seconds", "date"}


def test_it_ignores_a_range(proxy: FaultProxy) -> None:
    proxy.plan = Plan((Fault.IGNORED_RANGE,), 1, 1)
    reply, body = get(proxy)
    assert (reply.status, body) == (200, CONTENT)
    assert proxy.served[-1].length == len(RIGHT)


def test_it_cannot_satisfy_a_range(proxy: FaultProxy) -> None:
    proxy.plan = Plan((Fault.NOT_SATISFIABLE,), 1, 1)
    reply, body = get(proxy)
    assert (reply.status, reply.headers["Content-Length"], len(body)) == (416, str(len(CONTENT)), 14)


def test_it_resets(proxy: FaultProxy) -> None:
    proxy.plan = Plan((Fault.RESET,), 1, 1)
    reply, body = get(proxy)
    assert isinstance(broken(reply), ConnectionResetError)
    assert RIGHT.startswith(body)


def test_it_ends_early(proxy: FaultProxy) -> None:
    proxy.plan = Plan((Fault.SHORT,), 1, 1)
    reply, body = get(proxy)
    assert int(reply.headers["Content-Length"]) == len(RIGHT) > len(body)
    assert RIGHT.startswith(body)


@pytest.mark.parametrize("fault", [Fault.STALL, Fault.TRICKLE])
def test_it_stops_or_nearly(proxy: FaultProxy, fault: Fault) -> None:
    proxy.plan = Plan((fault,), 1, 10)
    proxy_seed = next(seed for seed in range(100) if _sends_a_head(proxy, fault, seed))
    proxy.plan = Plan((fault,), proxy_seed, 10)
    reply, body = get(proxy, seconds=0.5)
    assert isinstance(broken(reply), TimeoutError)
    assert RIGHT.startswith(body)
    assert len(body) < len(RIGHT)


def _sends_a_head(proxy: FaultProxy, fault: Fault, seed: int) -> bool:
    proxy.plan = Plan((fault,), seed, 10)
    _, chance = proxy.plan.draw(1)
    chance.randrange(len(RIGHT))
    return fault is not Fault.STALL or chance.random() >= 0.5


def test_it_sends_wrong_bytes(proxy: FaultProxy) -> None:
    proxy.plan = Plan((Fault.WRONG_BYTES,), 1, 1)
    reply, body = get(proxy)
    assert (reply.status, len(body)) == (206, len(RIGHT))
    assert sum(one != other for one, other in zip(body, RIGHT, strict=True)) == 1


def test_it_names_another_range(proxy: FaultProxy) -> None:
    proxy.plan = Plan((Fault.WRONG_RANGE,), 1, 1)
    reply, _ = get(proxy)
    assert reply.headers["Content-Range"] == f"bytes 1512-71511/{len(CONTENT)}"


def test_tokens_and_signatures_end(registry: Registry, tmp_path: Path) -> None:
    client = Client(registry.host, Provider())
    push(client)
    client.close()
    with FaultProxy(registry.host, login=f"ann:{SECRET}", redirects=True) as proxy:
        assert "Bearer" in ask(proxy.host, BLOB)[1]["WWW-Authenticate"]
        basic = {"Authorization": f"Basic {proxy.secrets[1]}"}
        token = json.loads(ask(proxy.token_host, "/token", basic)[2])["token"]
        login = {"Authorization": f"Bearer {token}"}
        status, headers, _ = ask(proxy.host, BLOB, login)
        assert status == 307
        signed = headers["Location"].removeprefix(f"http://{proxy.store_host}")
        assert ask(proxy.store_host, signed, RANGE)[2] == RIGHT
        assert ask(proxy.store_host, signed, login)[0] == 403, "a login is not for the store"
        proxy.plan = Plan((Fault.EXPIRED_REDIRECT,), 1, 1)
        assert ask(proxy.store_host, signed, RANGE)[0] == 403
        proxy.plan = Plan((Fault.EXPIRED_TOKEN,), 1, 1)
        assert ask(proxy.host, BLOB, login)[0] == 401


def ask(host: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(host, timeout=20)
    connection.request("GET", path, headers=headers or {})
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply.status, reply.headers, body


def test_names_go_and_return(registry: Registry) -> None:
    known: list[bool] = []
    with FaultProxy(registry.host, resolve=known.append) as proxy:
        proxy.plan = Plan((Fault.NO_DNS,), 1, 10)
        with pytest.raises((OSError, http.client.HTTPException)):
            get(proxy)
    assert known == [False, True]
