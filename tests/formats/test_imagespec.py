# SPDX-License-Identifier: Apache-2.0
"""config.v1.json: what the snapshotter writes is understood, wrong types are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import imagespec
from formats.errors import FormatError
from formats.imagespec import ImageConfig, Lower, Upper
from tests import fixtures
from tests.mutations import damaged, value_or_format_error

CONFIGS = sorted((fixtures.locate() or Path("/nowhere")).glob("*/*.config.json"))
DIGEST = "sha256:" + "ab" * 32
FULL = ImageConfig(
    lowers=(Lower(digest=DIGEST, size=4737695, dir="/snapshots/1"), Lower("/f", target_file="/t", gzip_index="/g")),
    repo_blob_url="https://registry.example/v2/team/app/blobs",
    upper=Upper("/w/data", "/w/index"),
    result_file="/r",
    record_trace_path="/trace",
)


def parsed(document: object) -> ImageConfig:
    return imagespec.parse(json.dumps(document).encode())


def test_what_the_snapshotter_writes_is_understood() -> None:
    document = {
        "repoBlobUrl": FULL.repo_blob_url,
        "lowers": [
            {"digest": DIGEST, "size": 4737695, "dir": "/snapshots/1"},
            {"file": "/f", "targetFile": "/t", "gzipIndex": "/g"},
        ],
        "upper": {"data": "/w/data", "index": "/w/index", "vsize": 64},
        "resultFile": "/r",
        "recordTracePath": "/trace",
        "download": {"enable": True},
        "some": {"later": "key"},
    }
    assert parsed(document) == FULL
    assert imagespec.parse(FULL.build()) == FULL


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_reference_configs_survive_a_round_trip(path: Path) -> None:
    config = imagespec.parse(path.read_bytes())
    assert config.lowers
    assert imagespec.parse(config.build()) == config


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
lowers = st.builds(Lower, texts, texts, texts, st.integers(0, (1 << 63) - 1), texts, texts, texts)
uppers = st.builds(Upper, texts.filter(bool), texts.filter(bool), texts, texts)


@given(st.builds(ImageConfig, st.lists(lowers).map(tuple), texts, st.none() | uppers, texts))
def test_a_config_survives_a_round_trip(config: ImageConfig) -> None:
    assert imagespec.parse(config.build()) == config


def test_the_local_file_wins_then_the_directory_in_order() -> None:
    in_dir = ("/d/overlaybd.commit", "/d/.commit", "/d/overlaybd.sealed")
    assert Lower(file="/f", dir="/d").candidates() == ("/f", *in_dir)
    assert Lower(dir="/d").candidates() == in_dir
    assert Lower(file="/f").candidates() == ("/f",)
    assert Lower(digest=DIGEST).candidates() == (), "an empty dir must not mean the root of the file system"


def test_a_blob_url_has_one_slash() -> None:
    lower = Lower(digest=DIGEST)
    for url in ("http://r/v2/a/blobs", "http://r/v2/a/blobs/"):
        assert ImageConfig((lower,), url).blob_url(lower) == f"http://r/v2/a/blobs/{DIGEST}"
    for config, bare in ((ImageConfig((lower,)), lower), (ImageConfig((), "http://r"), Lower())):
        with pytest.raises(FormatError):
            config.blob_url(bare)


def test_an_upper_needs_both_files() -> None:
    for upper in ({}, {"data": "/d"}, {"index": "/i"}, {"data": "", "index": "/i"}):
        assert parsed({"lowers": [], "upper": upper}).upper is None


def test_an_acceleration_layer_holds_no_blocks() -> None:
    config = parsed({"lowers": [{"file": "a"}, {"dir": "b"}], "accelerationLayer": True})
    assert config.block_lowers == (Lower("a"),)
    assert len(config.lowers) == 2


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"lowers": None},
        {"lowers": {}},
        {"lowers": ["layer"]},
        {"lowers": [{"file": 1}]},
        {"lowers": [{"file": None}]},
        {"lowers": [{"size": "1"}]},
        {"lowers": [{"size": True}]},
        {"lowers": [{"size": 1.0}]},
        {"lowers": [{"size": -1}]},
        {"lowers": [{"size": 1 << 64}]},
        {"lowers": [{"file": "a\0b"}]},
        {"lowers": [{"file": "\ud800"}]},
        {"lowers": [], "upper": []},
        {"lowers": [], "upper": {"data": 1}},
        {"lowers": [], "repoBlobUrl": 1},
        {"lowers": [], "accelerationLayer": "yes"},
        {"lowers": [], "accelerationLayer": 1},
        {"lowers": [], "accelerationLayer": True},
        {"lowers": [{}], "accelerationLayer": True, "recordTracePath": "/t"},
        {"lowers": [], "download": True},
    ],
    ids=str,
)
def test_wrong_types_and_impossible_values_are_refused(document: object) -> None:
    with pytest.raises(FormatError):
        parsed(document)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"lowers":[' + b"9" * 5000 + b"]}",
        b" " * (imagespec.CONFIG_SIZE_MAX + 1),
    ],
    ids=["empty", "cut", "no-text", "deep", "digits", "large"],
)
def test_what_is_no_json_is_refused(document: bytes) -> None:
    assert value_or_format_error(lambda: imagespec.parse(document)) is None


@given(damaged([FULL.build()]))
def test_any_bytes_give_a_config_or_a_format_error(document: bytes) -> None:
    value_or_format_error(lambda: imagespec.parse(document))
