# SPDX-License-Identifier: Apache-2.0
"""What registries and token services say wrongly: URLs that are none, numbers without measure, our own secrets."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest

from blockdev.errors import SourceError, UsageError
from blockdev.origin import Part
from blockdev.registry.client import Client
from blockdev.remote import _split_url
from tests.fakes.http_server import Answer, HttpServer, Seen
from tests.small_image import CONTENT, DIGEST, NOBODY, SECRET, assert_one_sentence, provider, read

BAD_URLS = ["http://[::1", "http://[x]/", "http://127.0.0.1:99999/", "http://a..b/"]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_redirect_to_what_is_no_url_is_the_registrys_fault(url: str) -> None:
    with (
        HttpServer(lambda seen: Answer(307, {"Location": url})) as server,
        pytest.raises(SourceError) as caught,
    ):
        Client(server.host, NOBODY, plain_http=True).blob_size("app", DIGEST)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_place_to_upload_to_that_is_no_url_is_the_registrys_fault(url: str) -> None:
    def answer(seen: Seen) -> Answer:
        return Answer(202, {"Location": url}) if seen.method == "POST" else Answer(404)

    with HttpServer(answer) as server, pytest.raises(SourceError) as caught:
        Client(server.host, NOBODY, plain_http=True).upload("app", DIGEST, len(CONTENT), io.BytesIO(CONTENT))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_token_service_that_is_no_url_is_the_registrys_fault(url: str) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="{url}"'}
    with HttpServer(lambda seen: Answer(401, challenge)) as server, pytest.raises(SourceError) as caught:
        Client(server.host, NOBODY, plain_http=True).blob_size("app", DIGEST)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("url", ["http://[::1/v2/x/blobs", "http://h:99999/v2/x/blobs"])
def test_a_config_with_what_is_no_url_is_the_callers_fault(url: str) -> None:
    with pytest.raises(UsageError, match="want http"):
        _split_url(Part(DIGEST, digest=DIGEST, url=f"{url}/{DIGEST}"))


@pytest.mark.parametrize("life", ["1" * 400, "1e400", "-1", "true", '"x"'])
def test_a_token_may_be_said_to_live_for_ever(life: str) -> None:
    def answer(seen: Seen) -> Answer:
        if seen.path == "/token":
            return Answer(200, {}, f'{{"token": "t", "expires_in": {life}}}'.encode())
        if "authorization" in seen.headers:
            return Answer(200, {}, b"{}")
        return Answer(401, {"WWW-Authenticate": f'Bearer realm="{server.url}/token"'})

    with HttpServer(answer) as server:
        assert Client(server.host, NOBODY).manifest("app", "v1").body == b"{}"


@pytest.mark.parametrize("status", [404, 410, 418, 503])
def test_a_token_service_in_disorder_is_named_and_says_nothing_of_the_image(status: int) -> None:
    with HttpServer(lambda seen: Answer(status)) as service:
        challenge = {"WWW-Authenticate": f'Bearer realm="{service.url}/token"'}
        with HttpServer(lambda seen: Answer(401, challenge)) as server, pytest.raises(SourceError) as caught:
            Client(server.host, NOBODY).blob_size("app", DIGEST)
    assert_one_sentence(caught.value, f"the token service {service.url}: answered {status}")


def echo(seen: Seen, code: str = "OTHER") -> Answer:
    """An error whose words are all that was sent, and what that stands for."""
    said = f"{seen.headers.get('authorization')} {seen.body!r} {seen.query} {SECRET}"
    body = json.dumps({"errors": [{"code": code, "message": said}]}).encode()
    return Answer(418, {"Content-Type": "application/json"}, body)


@pytest.mark.parametrize("code", ["DENIED", SECRET])
def test_a_registry_that_repeats_a_login_is_not_quoted(code: str, tmp_path: Path) -> None:
    def answer(seen: Seen) -> Answer:
        if "authorization" not in seen.headers:
            return Answer(401, {"WWW-Authenticate": 'Basic realm="x"'})
        return echo(seen, code)

    with HttpServer(answer) as server, pytest.raises(SourceError) as caught:
        Client(server.host, provider(tmp_path, server.host)).manifest("app", "v1")
    assert_one_sentence(caught.value, "answered 418 (DENIED)" if code == "DENIED" else "answered 418")


def test_a_registry_that_calls_a_login_a_range_is_not_quoted(tmp_path: Path) -> None:
    def answer(seen: Seen) -> Answer:
        login = seen.headers.get("authorization")
        if login is None:
            return Answer(401, {"WWW-Authenticate": 'Basic realm="x"'})
        return Answer(206, {"Content-Range": login}, b"0123456789")

    with HttpServer(answer) as server, pytest.raises(SourceError) as caught:
        read(Client(server.host, provider(tmp_path, server.host)), 0, 10)
    assert_one_sentence(caught.value, "sends an unnamed part")


@pytest.mark.parametrize("more", [{}, {"identitytoken": SECRET}])
def test_a_token_service_that_repeats_a_login_is_not_quoted(more: dict[str, str], tmp_path: Path) -> None:
    with HttpServer(echo) as service:
        challenge = {"WWW-Authenticate": f'Bearer realm="{service.url}/token"'}
        with HttpServer(lambda seen: Answer(401, challenge)) as server, pytest.raises(SourceError) as caught:
            Client(server.host, provider(tmp_path, server.host, **more)).manifest("app", "v1")
    assert_one_sentence(caught.value, "answered 418")


def test_the_log_has_no_password_of_a_url(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with HttpServer(lambda seen: Answer(200, {}, CONTENT)) as store:
        url = f"http://ann:{SECRET.replace(':', '%3A')}@{store.host}/blob?signature=s1gnature#{SECRET}"
        with HttpServer(lambda seen: Answer(307, {"Location": url})) as server:
            assert Client(server.host, NOBODY).blob_size("app", DIGEST) == len(CONTENT)
    assert f"HEAD http://{store.host}/blob: 200" in caplog.text
    assert "and-more" not in caplog.text
    assert "s1gnature" not in caplog.text
