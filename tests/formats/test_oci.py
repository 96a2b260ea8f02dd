# SPDX-License-Identifier: Apache-2.0
"""References, manifests and layouts: what is read, what is refused, and the bytes that are built."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import layout, oci
from formats.errors import FormatError
from formats.oci import Descriptor, Index, Manifest, Platform, Reference

DIGEST = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32
AMD64 = Platform("linux", "amd64")


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag"),
    [
        ("redis", "docker.io", "library/redis", "latest"),
        ("redis:7", "docker.io", "library/redis", "7"),
        ("user/tool", "docker.io", "user/tool", "latest"),
        ("docker.io/redis", "docker.io", "library/redis", "latest"),
        ("index.docker.io/a/b", "docker.io", "a/b", "latest"),
        ("localhost/app", "localhost", "app", "latest"),
        ("localhost:5000/app:v1", "localhost:5000", "app", "v1"),
        ("127.0.0.1:5000/a/b_c/d--e:T.1-x", "127.0.0.1:5000", "a/b_c/d--e", "T.1-x"),
        ("[::1]:5000/app", "[::1]:5000", "app", "latest"),
        ("example.org/app", "example.org", "app", "latest"),
        ("EXAMPLE/app", "EXAMPLE", "app", "latest"),
    ],
)
def test_a_reference_is_split_the_way_docker_does(text: str, registry: str, repository: str, tag: str) -> None:
    reference = Reference.parse(text)
    assert reference == Reference(registry, repository, tag, None)
    assert Reference.parse(str(reference)) == reference


def test_a_digest_wins_over_a_tag_and_needs_none() -> None:
    assert Reference.parse(f"a.b/c@{DIGEST}") == Reference("a.b", "c", None, DIGEST)
    both = Reference.parse(f"a.b:1/c:tag@{DIGEST}")
    assert (both.tag, both.identifier, str(both)) == ("tag", DIGEST, f"a.b:1/c:tag@{DIGEST}")


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "/", "a.b/", "/a", "a//b", "a.b/C", "a.b/c:", "a.b/c:bad tag", "a.b/c@", "a.b/c@sha256:12", "a.b/c\n",
        "[::1/c", "-a.b/c", "a.b/c:" + "t" * 129, "a.b/" + "c" * 300, "https://a.b/c", "a.b:0/c", "a.b:99999/c",
        "a.b:/c", f"a.b/c@{DIGEST}@{DIGEST}", "a.b/c@sha256:" + "AB" * 32, "a.b/ü", "a.b:٣/c",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        Reference.parse(text)


@given(st.text(alphabet="aZ0._-/:@[] \n", max_size=40))
def test_every_text_is_a_reference_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except FormatError:
        return
    assert Reference.parse(str(reference)) == reference


def test_a_digest_is_compared_with_the_whole_content() -> None:
    assert oci.digest_of(b"x") == "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert oci.matches(oci.digest_of(b"x"), b"x")
    assert not oci.matches(oci.digest_of(b"x"), b"y")


@pytest.mark.parametrize("media_type", oci.MANIFEST_TYPES)
def test_a_manifest_survives_build_and_parse(media_type: str) -> None:
    layer = Descriptor(oci.OCI_LAYER, OTHER, 7, oci.layer_annotations(OTHER, 7, "ext4"))
    manifest = Manifest(Descriptor(oci.OCI_CONFIG, DIGEST, 3), (layer, layer), media_type, {"k": "é"})
    assert oci.parse_manifest(manifest.build()) == manifest


def test_an_index_survives_build_and_parse() -> None:
    image = Descriptor(oci.OCI_MANIFEST, DIGEST, 3, {}, Platform("linux", "arm", "v7"))
    index = Index((image,), oci.DOCKER_INDEX)
    assert oci.parse_manifest(index.build()) == index


def test_an_index_keeps_what_is_not_known_of_it_and_its_entries() -> None:
    entry = Descriptor(oci.OCI_MANIFEST, DIGEST, 1).build() | {"urls": ["http://r/x"], "data": "eA=="}
    subject = Descriptor(oci.OCI_MANIFEST, OTHER, 1).build()
    document = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [entry], "subject": subject, "x": [1.5]}
    assert json.loads(oci.parse_manifest(oci.canonical(document)).build()) == document


@pytest.mark.parametrize("deep", [oci.NESTING_MAX, oci.NESTING_MAX + 1, 900, 100_000])
def test_what_is_nested_too_deep_to_be_written_again_is_refused(deep: int) -> None:
    index = Index((Descriptor(oci.OCI_MANIFEST, DIGEST, 7, platform=AMD64),)).build()
    lists = deep - 1  # beside the document itself
    nested = index[:-1] + b',"x":' + b"[" * lists + b"]" * lists + b"}"
    if deep > oci.NESTING_MAX:
        with pytest.raises(FormatError):
            oci.parse_manifest(nested)
    else:
        parsed = oci.parse_manifest(nested)
        assert oci.parse_manifest(parsed.build()) == parsed


def test_built_documents_are_canonical() -> None:
    manifest = Manifest(Descriptor(oci.OCI_CONFIG, DIGEST, 3), ())
    assert (
        manifest.build()
        == (
            f'{{"config":{{"digest":"{DIGEST}","mediaType":"{oci.OCI_CONFIG}","size":3}},"layers":[],'
            f'"mediaType":"{oci.OCI_MANIFEST}","schemaVersion":2}}'
        ).encode()
    )
    config = b'{"architecture":"amd64","config":{},"os":"linux","rootfs":{"diff_ids":["%s"],"type":"layers"}}'
    assert oci.build_config(AMD64, [DIGEST]) == config % DIGEST.encode()


def test_a_manifest_without_a_media_type_is_known_by_its_content() -> None:
    document = json.loads(Manifest(Descriptor(oci.OCI_CONFIG, DIGEST, 3), ()).build())
    del document["mediaType"]
    assert isinstance(oci.parse_manifest(json.dumps(document).encode()), Manifest)


GOOD = json.loads(Manifest(Descriptor(oci.OCI_CONFIG, DIGEST, 3), (Descriptor("x", OTHER, 1),)).build())


@pytest.mark.parametrize(
    "change",
    [
        {"schemaVersion": 1},
        {"schemaVersion": None},
        {"manifests": []},
        {"mediaType": oci.OCI_INDEX},
        {"mediaType": 7},
        {"layers": None},
        {"layers": {}},
        {"layers": [None]},
        {"layers": [GOOD["config"]] * (oci.LAYERS_MAX + 1)},
        {"config": None},
        {"config": {**GOOD["config"], "digest": "sha256:00"}},
        {"config": {**GOOD["config"], "size": -1}},
        {"config": {**GOOD["config"], "size": 1 << 63}},
        {"config": {**GOOD["config"], "size": 3.0}},
        {"config": {**GOOD["config"], "size": True}},
        {"config": {**GOOD["config"], "annotations": {"a": 1}}},
        {"config": {**GOOD["config"], "platform": {"os": 1}}},
    ],
)
def test_a_manifest_that_is_wrong_in_one_place_is_refused(change: dict[str, object]) -> None:
    oci.parse_manifest(json.dumps(GOOD).encode())
    with pytest.raises(FormatError):
        oci.parse_manifest(json.dumps(GOOD | change).encode())


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b" " * (oci.DOCUMENT_SIZE_MAX + 1)],
)
def test_what_is_no_json_object_is_refused(document: bytes) -> None:
    with pytest.raises(FormatError):
        oci.parse_manifest(document)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_what_could_not_be_written_again_is_no_number(number: str) -> None:
    with pytest.raises(FormatError, match="is no number"):
        oci.load(f'{{"a": [{number}]}}'.encode(), "config")


_KEYS = st.sampled_from(["digest", "size", "mediaType", "annotations", "platform", "os"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(DIGEST),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


_DOCUMENT = dict.fromkeys(("config", "layers", "manifests"), _JSON)


@given(st.fixed_dictionaries({"schemaVersion": st.just(2)}, optional=_DOCUMENT))
def test_any_json_is_a_manifest_or_a_format_error(document: dict[str, object]) -> None:
    with contextlib.suppress(FormatError):
        oci.parse_manifest(json.dumps(document).encode())


def _image(digest: str, *platform: str) -> Descriptor:
    return Descriptor(oci.OCI_MANIFEST, digest, 1, {}, Platform(*platform) if platform else None)


def test_an_index_gives_the_image_of_the_platform() -> None:
    attestation, arm = _image(OTHER, "unknown", "unknown"), _image(OTHER, "linux", "arm64", "v8")
    index = Index((attestation, arm, _image(DIGEST, "linux", "amd64")))
    assert index.choose(AMD64).digest == DIGEST
    assert index.choose(Platform.of_machine("aarch64")).digest == OTHER
    with pytest.raises(FormatError, match="linux/s390x"):
        index.choose(Platform.of_machine("s390x"))


def test_an_exact_variant_is_preferred() -> None:
    index = Index((_image(OTHER, "linux", "arm", "v6"), _image(DIGEST, "linux", "arm", "v7")))
    assert index.choose(Platform("linux", "arm", "v7")).digest == DIGEST


def test_a_sole_image_without_a_platform_fits_any() -> None:
    assert Index((_image(DIGEST),)).choose(AMD64).digest == DIGEST
    with pytest.raises(FormatError):
        Index((_image(DIGEST), _image(OTHER))).choose(AMD64)


def test_overlaybd_annotations_say_which_blob_to_read() -> None:
    plain = Descriptor(oci.OCI_LAYER, DIGEST, 5)
    assert (oci.layer_digest(plain), oci.layer_size(plain), oci.is_overlaybd(plain)) == (DIGEST, 5, False)
    pointing = Descriptor(oci.OCI_LAYER, DIGEST, 5, oci.layer_annotations(OTHER, 9))
    assert (oci.layer_digest(pointing), oci.layer_size(pointing), oci.is_overlaybd(pointing)) == (OTHER, 9, True)


@pytest.mark.parametrize("size", ["", "-1", "9" * 19, "1e3", "٣"])
def test_an_annotated_size_must_be_a_size(size: str) -> None:
    with pytest.raises(FormatError):
        oci.layer_size(Descriptor(oci.OCI_LAYER, DIGEST, 5, {oci.BLOB_DIGEST: OTHER, oci.BLOB_SIZE: size}))


def test_an_annotated_digest_must_be_a_digest() -> None:
    with pytest.raises(FormatError):
        oci.layer_digest(Descriptor(oci.OCI_LAYER, DIGEST, 5, {oci.BLOB_DIGEST: "../../etc/passwd"}))


def test_turbo_and_acceleration_layers_are_told_apart() -> None:
    assert oci.turbo_target(Descriptor("", DIGEST, 1, {oci.TURBO_TARGET_DIGEST: OTHER})) == OTHER
    assert oci.turbo_target(Descriptor("", DIGEST, 1, {oci.FASTOCI_TARGET_DIGEST: OTHER})) == OTHER
    assert oci.turbo_target(Descriptor("", DIGEST, 1)) is None
    assert oci.is_acceleration(Descriptor("", DIGEST, 1, {oci.ACCELERATION_LAYER: "yes"}))


def test_a_layout_is_read_by_tag() -> None:
    layout.check_marker(b'{"imageLayoutVersion": "1.0.0"}')
    one = Descriptor(oci.OCI_MANIFEST, DIGEST, 1, {layout.REF_NAME: "v1"})
    two = Descriptor(oci.OCI_MANIFEST, OTHER, 1, {layout.REF_NAME: "latest"})
    assert layout.choose_tag(Index((one,)), None) == one
    assert layout.choose_tag(Index((one, two)), None) == two
    assert layout.choose_tag(layout.parse_index(Index((one, two)).build()), "v1") == one
    with pytest.raises(FormatError, match="it has latest, v1"):
        layout.choose_tag(Index((one, two)), "v2")
    assert layout.blob_path(DIGEST) == "blobs/sha256/" + "ab" * 32


@pytest.mark.parametrize("marker", [b"{}", b"[]", b'{"imageLayoutVersion": 1}', b'{"imageLayoutVersion": "2.0.0"}'])
def test_an_unknown_layout_is_refused(marker: bytes) -> None:
    with pytest.raises(FormatError):
        layout.check_marker(marker)


def test_a_manifest_is_no_layout_index() -> None:
    with pytest.raises(FormatError):
        layout.parse_index(json.dumps(GOOD).encode())
