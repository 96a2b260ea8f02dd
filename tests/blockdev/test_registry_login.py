# SPDX-License-Identifier: Apache-2.0
"""Logging in to Debian's docker-registry: htpasswd and tokens, right, wrong and ending."""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.errors import AccessDenied, BlockdevError, SourceError
from blockdev.registry.auth import Challenge, parse_challenge
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from blockdev.source.retrying import patiently
from tests.authority import Authority
from tests.fakes.http_server import Answer, HttpServer, Seen
from tests.fakes.token_server import TokenServer
from tests.registries import Registry
from tests.small_image import CONTENT, DIGEST, NOBODY, SECRET, WRONG, assert_one_sentence, provider, push, read, soon

Registries = Callable[..., Registry]


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def test_basic_login(registries: Registries, tmp_path: Path) -> None:
    registry = registries(users={"ann": SECRET})
    client = Client(registry.host, provider(tmp_path, registry.host))
    client.ping()
    push(client)
    assert read(client, 5, 10) == CONTENT[5:15]


def test_a_wrong_password_is_denied_at_once(
    registries: Registries, tmp_path: Path, everything_logged: pytest.LogCaptureFixture
) -> None:
    registry = registries(users={"ann": SECRET})
    begin = time.monotonic()
    with pytest.raises(AccessDenied) as caught:
        Client(registry.host, provider(tmp_path, registry.host, password=WRONG)).manifest("team/app", "v1")
    assert time.monotonic() - begin < 5
    assert_one_sentence(caught.value, f"{registry.host}/team/app", "refused")
    assert WRONG not in everything_logged.text
    assert len(registry.accesses("/team/app")) <= 3


def test_no_credentials_are_told_from_wrong_ones(registries: Registries) -> None:
    registry = registries(users={"ann": SECRET})
    with pytest.raises(AccessDenied) as caught:
        Client(registry.host, NOBODY).manifest("app", "v1")
    assert_one_sentence(caught.value, f"{registry.host}/app", "no credentials are known")


def test_a_password_that_changes_is_looked_up_again(registries: Registries, tmp_path: Path) -> None:
    registry = registries(users={"ann": SECRET})
    client = Client(registry.host, provider(tmp_path, registry.host))
    push(client)
    registry.stop()
    registry.folder.joinpath("htpasswd").write_text("")
    other = registries(users={"ann": WRONG})
    registry.folder.joinpath("htpasswd").write_text(other.folder.joinpath("htpasswd").read_text())
    registry.start()
    with pytest.raises(AccessDenied):
        read(client, 0, 10)
    provider(tmp_path, registry.host, password=WRONG)
    assert read(client, 0, 10) == CONTENT[:10]


@pytest.fixture
def tokens(authority: Authority) -> Iterator[TokenServer]:
    with TokenServer(authority.root, {"ann": SECRET}) as server:
        yield server


def test_token_login(registries: Registries, tokens: TokenServer, tmp_path: Path) -> None:
    registry = registries(auth=tokens.registry_options())
    client = Client(registry.host, provider(tmp_path, registry.host))
    push(client)
    asked = len(tokens.seen)
    for _ in range(3):
        assert read(client, 5, 10) == CONTENT[5:15]
    assert len(tokens.seen) == asked + 1  # one token to push, one to pull


def test_anonymous_tokens_are_enough_where_they_are_given(registries: Registries, authority: Authority) -> None:
    with TokenServer(authority.root, {}) as tokens:
        registry = registries(auth=tokens.registry_options())
        push(Client(registry.host, NOBODY))
        assert read(Client(registry.host, NOBODY), 5, 10) == CONTENT[5:15]


@pytest.mark.parametrize("never", [set[str](), {"delete"}])
def test_whoever_may_push_need_not_be_allowed_to_delete(
    registries: Registries, tokens: TokenServer, tmp_path: Path, never: set[str]
) -> None:
    """A registry wants more of whoever takes an upload back than of whoever begins one."""
    tokens.never = never
    registry = registries(auth=tokens.registry_options())
    client = Client(registry.host, provider(tmp_path, registry.host))
    client.check_upload("app")
    push(client)
    assert client.blob_size("app", DIGEST) == len(CONTENT)
    assert sum("push" in seen.query for seen in tokens.seen) == 1


def test_an_identity_token_is_exchanged(registries: Registries, tokens: TokenServer, tmp_path: Path) -> None:
    tokens.identity_tokens.add("refresh-me")
    registry = registries(auth=tokens.registry_options())
    client = Client(registry.host, provider(tmp_path, registry.host, password="unused", identitytoken="refresh-me"))
    push(client)
    assert {seen.method for seen in tokens.seen} == {"POST"}


@pytest.mark.parametrize("kind", ["basic", "token"])
def test_a_credential_that_is_refused_gives_way_to_the_next(
    registries: Registries, tokens: TokenServer, tmp_path: Path, kind: str
) -> None:
    registry = registries(auth=tokens.registry_options()) if kind == "token" else registries(users={"ann": SECRET})
    helper = tmp_path / "docker-credential-stale"
    helper.write_text(f'#!/bin/sh\necho \'{{"Username": "ann", "Secret": "{WRONG}"}}\'\n')
    helper.chmod(0o755)
    entry = {"auth": base64.b64encode(f"ann:{SECRET}".encode()).decode()}
    config = {"auths": {registry.host: entry}, "credHelpers": {registry.host: "stale"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment = {"DOCKER_CONFIG": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    client = Client(registry.host, Provider.of_environment(environment))
    push(client)
    assert read(client, 5, 10) == CONTENT[5:15]


@pytest.mark.parametrize("more", [{"password": WRONG}, {"identitytoken": WRONG}])
def test_a_token_service_that_refuses_is_denied(
    registries: Registries,
    tokens: TokenServer,
    tmp_path: Path,
    everything_logged: pytest.LogCaptureFixture,
    more: dict[str, str],
) -> None:
    registry = registries(auth=tokens.registry_options())
    begin = time.monotonic()
    with pytest.raises(AccessDenied) as caught:
        Client(registry.host, provider(tmp_path, registry.host, **more)).manifest("app", "v1")
    assert time.monotonic() - begin < 5
    assert_one_sentence(caught.value, f"{registry.host}/app", "refused")
    assert WRONG not in everything_logged.text


def test_a_token_for_less_than_was_asked_is_denied(registries: Registries, tokens: TokenServer, tmp_path: Path) -> None:
    registry = registries(auth=tokens.registry_options())
    tokens.generous = False
    with pytest.raises(AccessDenied):
        Client(registry.host, provider(tmp_path, registry.host)).manifest("app", "v1")
    assert len(tokens.seen) == 1


def test_a_token_is_renewed_before_it_ends_and_by_one_thread(
    registries: Registries, authority: Authority, tmp_path: Path
) -> None:
    with TokenServer(authority.root, {"ann": SECRET}, life=1) as tokens:
        registry = registries(auth=tokens.registry_options())
        client = Client(registry.host, provider(tmp_path, registry.host))
        push(client)
        begin, asked = time.monotonic(), len(tokens.seen)
        failures: list[BlockdevError] = []

        def reader() -> None:
            try:
                while time.monotonic() < begin + 2:
                    read(client, 0, 10)
            except BlockdevError as error:
                failures.append(error)

        threads = [threading.Thread(target=reader) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert 3 <= len(tokens.seen) - asked <= 4
        refused = [access for access in registry.accesses(f"/blobs/{DIGEST}") if access.status == 401]
        assert len(refused) <= 1 + len(threads), "only who came before the first token was told that one is wanted"


def test_a_token_that_is_no_longer_good_is_replaced(
    registries: Registries, tokens: TokenServer, tmp_path: Path
) -> None:
    registry = registries(auth=tokens.registry_options())
    client = Client(registry.host, provider(tmp_path, registry.host))
    push(client)
    read(client, 0, 10)
    registry.stop()
    (tmp_path / "second").mkdir()
    tokens.signer = Authority(tmp_path / "second").root
    registry.options["auth"] = tokens.registry_options()
    registry.start()
    assert read(client, 0, 10) == CONTENT[:10]


def test_a_token_service_that_is_down_does_not_cost_a_good_token(
    registries: Registries, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with TokenServer(authority.root, {"ann": SECRET}, life=2) as tokens:
        registry = registries(auth=tokens.registry_options())
        client = Client(registry.host, provider(tmp_path, registry.host))
        push(client)
        begin = time.monotonic()
        read(client, 0, 10)
        tokens.well = False

        def read_on() -> None:
            while time.monotonic() < begin + 10:
                assert read(client, 0, 10) == CONTENT[:10]

        with pytest.raises(SourceError, match=r"answered 503|told us to wait"):
            read_on()
        ended = time.monotonic() - begin
        assert tokens.life <= ended < tokens.life + 2, "a token is used to its end, and no longer"
        tokens.well = True
        assert patiently(lambda: read(client, 0, 10), soon()) == CONTENT[:10]
    assert [record for record in caplog.records if "renewing a token failed" in record.message]


# ---- what a registry may ask for ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "scheme", "parameters"),
    [
        ("Basic", "basic", {}),
        ('Basic realm="x"', "basic", {"realm": "x"}),
        ('bearer realm="http://a/t?x=1,2",service="",scope="repository:a/b:pull,push"', "bearer",
         {"realm": "http://a/t?x=1,2", "service": "", "scope": "repository:a/b:pull,push"}),
        ('Basic realm="x", Bearer realm="y" , service=z', "bearer", {"realm": "y", "service": "z"}),
        ('Negotiate, Basic realm="a\\"b"', "basic", {"realm": 'a"b'}),
    ],
)  # fmt: skip
def test_a_challenge_is_understood(header: str, scheme: str, parameters: dict[str, str]) -> None:
    assert parse_challenge(header) == Challenge(scheme, parameters)


@pytest.mark.parametrize("header", ["", "Negotiate", '"', "=", 'Bear"er realm=', "x" * 100_000, 'a="' * 5000])
def test_what_is_no_challenge_is_none(header: str) -> None:
    assert parse_challenge(header) is None


def test_a_login_is_not_sent_to_a_token_service_without_tls(authority: Authority, tmp_path: Path) -> None:
    with HttpServer(lambda seen: Answer(200, {}, b'{"token": "x"}')) as service:
        challenge = {"WWW-Authenticate": f'Bearer realm="{service.url}/token",service="s"'}
        context = authority.server("127.0.0.1").server_context()
        with HttpServer(lambda seen: Answer(401, challenge), context) as server:
            client = Client(server.host, provider(tmp_path, server.host), ca=authority.root.pem)
            with pytest.raises(SourceError, match="not safe to use"):
                client.manifest("app", "v1")
        assert not service.seen


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{}", b'{"token": 7}', b'{"token": "a\\r\\nX: y"}', b'{"token": ""}', b" " * 70_000]
)
def test_a_token_service_that_talks_nonsense_is_an_error(answer: bytes, tmp_path: Path) -> None:
    def reply(seen: Seen) -> Answer:
        if seen.path == "/token":
            return Answer(200, {}, answer)
        return Answer(401, {"WWW-Authenticate": f'Bearer realm="{server.url}/token"'})

    with HttpServer(reply) as server, pytest.raises(SourceError):
        Client(server.host, provider(tmp_path, server.host)).manifest("app", "v1")


def test_a_registry_that_never_lets_us_in_is_not_asked_for_ever(tmp_path: Path) -> None:
    with HttpServer(lambda seen: Answer(401, {"WWW-Authenticate": 'Basic realm="x"'})) as server:
        with pytest.raises(AccessDenied):
            Client(server.host, provider(tmp_path, server.host)).manifest("app", "v1")
        assert len(server.seen) == 2


def test_the_netrc_file_is_nobodys_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login ann password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with HttpServer(lambda seen: Answer(body=b"{}")) as server:
        Client(server.host, NOBODY).manifest("app", "v1")
        assert "authorization" not in server.seen[0].headers
