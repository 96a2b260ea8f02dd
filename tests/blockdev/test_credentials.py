# SPDX-License-Identifier: Apache-2.0
"""Where credentials are looked for, which one is taken, and that none shows."""

from __future__ import annotations

import base64
import errno
import json
import os
import select
import time
from pathlib import Path

import pytest

from blockdev.errors import AccessDenied, BlockdevError
from blockdev.registry import credentials
from blockdev.registry.credentials import Credential, LoginUnknown, Provider

SECRET = "Pa55:word"


def packed(user: str, password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, config: object) -> Provider:
    (folder / "config.json").write_text(json.dumps(config))
    return Provider.of_environment({"DOCKER_CONFIG": str(folder), "PATH": f"{folder}:/usr/bin:/bin"})


def helper(folder: Path, name: str, script: str) -> None:
    program = folder / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def users(provider: Provider, registry: str, repository: str = "app") -> list[str]:
    return [found.username for found in provider.find(registry, repository)]


def denied(provider: Provider, kind: type[BlockdevError] = AccessDenied) -> str:
    """The message of a failed look-up; it names what was looked at and shows no secret."""
    with pytest.raises(kind) as caught:
        list(provider.find("a.example", "app"))
    assert type(caught.value) is kind
    assert SECRET not in str(caught.value)
    assert " failed: " in str(caught.value)
    return str(caught.value)


# ---- which file -------------------------------------------------------------------------------


def test_the_auth_file_variable_comes_first_and_alone(folder: Path) -> None:
    write(folder, {"auths": {"a.example": packed("docker")}})
    chosen = folder / "auth.json"
    chosen.write_text(json.dumps({"auths": {"b.example": packed("podman")}}))
    provider = Provider.of_environment({"REGISTRY_AUTH_FILE": str(chosen), "DOCKER_CONFIG": str(folder)})
    assert users(provider, "b.example") == ["podman"]
    assert users(provider, "a.example") == []


def test_an_auth_file_that_is_named_must_exist(folder: Path) -> None:
    assert "no such file" in denied(Provider.of_environment({"REGISTRY_AUTH_FILE": str(folder / "none.json")}))


def test_the_home_directory_is_the_last_place(folder: Path) -> None:
    (folder / ".docker").mkdir()
    write(folder / ".docker", {"auths": {"a.example": packed("ann")}})
    assert users(Provider.of_environment({"HOME": str(folder)}), "a.example") == ["ann"]


def test_no_file_means_no_credentials(folder: Path) -> None:
    assert users(Provider.of_environment({"HOME": str(folder)}), "a.example") == []


def test_the_file_is_read_anew_each_time(folder: Path) -> None:
    provider = write(folder, {"auths": {"a.example": packed("old")}})
    assert users(provider, "a.example") == ["old"]
    write(folder, {"auths": {"a.example": packed("new")}})
    assert users(provider, "a.example") == ["new"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", f'{{"auths": "{SECRET}', "[" * 50_000, '{"auths": [1]}', " " * (credentials.FILE_SIZE_MAX + 1)],
)
def test_a_file_that_makes_no_sense_is_refused(folder: Path, content: str) -> None:
    provider = write(folder, {})
    (folder / "config.json").write_text(content)
    assert str(folder) in denied(provider)


# ---- which entry ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        ("a.example", "a.example"),
        ("A.Example", "a.example"),
        ("https://a.example", "a.example"),
        ("https://a.example/v2/", "a.example"),
        ("http://127.0.0.1:5000/", "127.0.0.1:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
    ],
)
def test_keys_are_known_in_all_their_spellings(folder: Path, key: str, registry: str) -> None:
    assert users(write(folder, {"auths": {key: packed("ann")}}), registry) == ["ann"]


@pytest.mark.parametrize("registry", ["a.example:5000", "b.example", "example", "x.a.example"])
def test_another_host_gets_nothing(folder: Path, registry: str) -> None:
    assert users(write(folder, {"auths": {"a.example": packed("ann")}}), registry) == []


def test_the_longest_path_wins(folder: Path) -> None:
    keys = {"a.example": "host", "a.example/team": "team", "a.example/team/app": "app"}
    provider = write(folder, {"auths": {key: packed(user) for key, user in keys.items()}})
    assert users(provider, "a.example", "team/app") == ["app"]
    assert users(provider, "a.example", "team/app2") == ["team"]
    assert users(provider, "a.example", "team/app/x") == ["app"]
    assert users(provider, "a.example", "teamwork") == ["host"]


def test_a_login_may_be_spelled_out_or_packed(folder: Path) -> None:
    provider = write(
        folder, {"auths": {"a.example": {"username": "ann", "password": SECRET}, "b.example": packed("bob")}}
    )
    assert list(provider.find("a.example", "x")) == [Credential("ann", SECRET)]
    assert list(provider.find("b.example", "x")) == [Credential("bob", SECRET)]


def test_an_identity_token_comes_with_its_login(folder: Path) -> None:
    provider = write(folder, {"auths": {"a.example": {**packed("ann", ""), "identitytoken": SECRET}}})
    assert list(provider.find("a.example", "x")) == [Credential("ann", "", SECRET)]


@pytest.mark.parametrize(
    "entry",
    [SECRET, {"auth": SECRET}, {"auth": 7}, {"auth": "////"}, {"username": [SECRET]}, {"username": "\ud800"}],
)
def test_a_malformed_login_is_refused(folder: Path, entry: object) -> None:
    assert "a.example" in denied(write(folder, {"auths": {"a.example": entry}}))


def test_an_empty_login_is_none(folder: Path) -> None:
    assert users(write(folder, {"auths": {"a.example": {}}}), "a.example") == []


# ---- helpers -----------------------------------------------------------------------------------------


def test_the_hosts_helper_comes_before_the_store_and_the_file(folder: Path) -> None:
    helper(folder, "one", f'read server; echo "{{\\"Username\\": \\"one-$server\\", \\"Secret\\": \\"{SECRET}\\"}}"')
    helper(folder, "two", f'read server; echo "{{\\"Username\\": \\"two-$server\\", \\"Secret\\": \\"{SECRET}\\"}}"')
    config = {"credHelpers": {"a.example": "one"}, "credsStore": "two", "auths": {"a.example": packed("file")}}
    provider = write(folder, config)
    assert users(provider, "a.example") == ["one-a.example", "two-a.example", "file"]
    assert users(provider, "docker.io") == ["two-https://index.docker.io/v1/"]


def test_a_helper_may_have_nothing(folder: Path) -> None:
    helper(folder, "empty", "echo credentials not found in native keychain; exit 1")
    assert users(write(folder, {"credsStore": "empty", "auths": {"a.example": packed("file")}}), "a.example") == [
        "file"
    ]


def test_a_helper_may_give_an_identity_token(folder: Path) -> None:
    helper(folder, "token", f'echo \'{{"Username": "<token>", "Secret": "{SECRET}"}}\'')
    assert list(write(folder, {"credsStore": "token"}).find("a.example", "x")) == [Credential("", "", SECRET)]


def test_a_helper_runs_in_the_callers_environment(folder: Path) -> None:
    helper(folder, "region", f'echo "{{\\"Username\\": \\"$REGION\\", \\"Secret\\": \\"{SECRET}\\"}}"')
    write(folder, {"credsStore": "region"})
    environment = {"DOCKER_CONFIG": str(folder), "PATH": f"{folder}:/bin", "REGION": "mars"}
    assert users(Provider.of_environment(environment), "a.example") == ["mars"]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (f"echo {SECRET}", "not a JSON object"),
        (f'echo \'{{"Username": "{SECRET}"}}\'', "lacks Username or Secret"),
        (r"""echo '{"Username": "\ud800", "Secret": "x"}'""", "lacks Username or Secret"),
        ("head -c 100000 /dev/zero", "more than 65536 bytes"),
        ("exec cat /dev/zero", "more than 65536 bytes"),
    ],
)
def test_a_helper_that_answers_wrongly_is_named_and_not_quoted(folder: Path, script: str, why: str) -> None:
    helper(folder, "bad", script)
    message = denied(write(folder, {"credsStore": "bad"}))
    assert "docker-credential-bad" in message
    assert why in message


def test_a_helper_that_fails_may_work_again(folder: Path) -> None:
    """What it asks for us may be down for a while: readers wait as their policy says."""
    helper(folder, "bad", f"echo {SECRET}; echo {SECRET} >&2; exit 3")
    message = denied(write(folder, {"credsStore": "bad"}), LoginUnknown)
    assert "docker-credential-bad" in message
    assert "status 3" in message


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EMFILE, LoginUnknown), (errno.ENOMEM, LoginUnknown), (errno.EACCES, AccessDenied)]
)
def test_what_this_machine_is_short_of_now_denies_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[BlockdevError]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    provider = write(folder, {"auths": {"a.example": packed("ann")}})
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", fail)
        assert os.strerror(number) in denied(provider, kind)
    helper(folder, "good", "exit 0")
    provider = write(folder, {"credsStore": "good"})
    monkeypatch.setattr(credentials.subprocess, "Popen", fail)
    assert os.strerror(number) in denied(provider, kind)


def test_a_helper_that_hangs_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "HELPER_SECONDS", 0.2)
    helper(folder, "slow", "exec sleep 60")
    begin = time.monotonic()
    assert "no answer within 0.2 s" in denied(write(folder, {"credsStore": "slow"}), LoginUnknown)
    assert time.monotonic() - begin < 5


def test_what_a_helper_that_hangs_has_started_is_ended_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "HELPER_SECONDS", 0.5)
    os.mkfifo(folder / "life")
    life = os.open(folder / "life", os.O_RDONLY | os.O_NONBLOCK)
    helper(folder, "slow", f"exec 3> {folder}/life; sleep 60 &")
    assert "no answer within 0.5 s" in denied(write(folder, {"credsStore": "slow"}), LoginUnknown)
    ended = select.poll()
    ended.register(life, 0)  # its end is always told
    assert ended.poll(20_000)
    os.close(life)


@pytest.mark.parametrize("name", ["missing", "../evil", "", 7])
def test_a_helper_that_is_not_there_or_is_no_name_is_refused(folder: Path, name: object) -> None:
    provider = write(folder, {"credHelpers": {"a.example": name}})
    if name == "":
        assert users(provider, "a.example") == []
    else:
        denied(provider)


# ---- what travels and what shows ------------------------------------------------------------------------


def test_a_provider_travels_as_json(folder: Path) -> None:
    provider = write(folder, {"auths": {"a.example": packed("ann")}})
    copy = Provider.from_json(json.loads(json.dumps(provider.to_json())))
    assert copy == provider
    assert users(copy, "a.example") == ["ann"]


def test_no_repr_shows_a_secret() -> None:
    assert SECRET not in repr(Credential("ann", SECRET, SECRET))
    assert SECRET not in repr(Provider(("f",), False, {"AWS_SECRET": SECRET}))
