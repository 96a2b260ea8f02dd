# SPDX-License-Identifier: Apache-2.0
"""What an IMAGE argument stands for, and that it survives the trip to the owner."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from blockdev.errors import BlockdevError, CorruptImage, NotFound, UsageError
from blockdev.origin import TABLES_MAX, Origin, block_layers, locate
from formats import layout, oci
from formats.digests import COVERED_MAX, Place
from formats.errors import FormatError
from tests import ordinary

DATA = Path(__file__).parent.parent / "data"
LAYER = DATA / "d-l0.lsmt"
DIGEST = "sha256:" + "a" * 64


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def write_config(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({"lowers": [], **fields}))
    return path


def write_layout(folder: Path, layers: list[bytes], *, tag: str = "1", depth: int = 0, **annotations: str) -> Path:
    """An image layout with one image, `depth` indexes below index.json."""

    def blob(content: bytes, media_type: str = oci.OCI_LAYER, **extra: Any) -> oci.Descriptor:
        digest = oci.digest_of(content)
        path = folder / layout.blob_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return oci.Descriptor(media_type, digest, len(content), **extra)

    described = [blob(layer, annotations=annotations) for layer in layers]
    top = blob(oci.Manifest(blob(b"{}", oci.OCI_CONFIG), tuple(described)).build(), oci.OCI_MANIFEST)
    for _ in range(depth):
        platform = oci.Platform.of_machine(os.uname().machine)
        inner = oci.Descriptor(top.media_type, top.digest, top.size, platform=platform)
        top = blob(oci.Index((inner,)).build(), oci.OCI_INDEX)
    tagged = oci.Descriptor(top.media_type, top.digest, top.size, annotations={layout.REF_NAME: tag})
    (folder / layout.INDEX).write_bytes(oci.Index((tagged,)).build())
    (folder / layout.MARKER).write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def contents(origin: Origin) -> list[bytes]:
    return [os.pread(part.fd, 1 << 20, 0) for part in origin.layers]


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ("redis:7", "docker.io/library/redis:7"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
        (f"127.0.0.1:5000/a@{DIGEST}", f"127.0.0.1:5000/a@{DIGEST}"),
    ],
)
def test_what_is_no_file_is_a_reference(image: str, reference: str) -> None:
    with locate(image) as origin:
        assert (origin.reference, origin.local) == (reference, False)


def test_an_existing_file_is_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("redis").write_bytes(b"content")
    before = open_descriptors()
    with locate("redis") as origin:
        assert (origin.reference, origin.local, contents(origin)) == ("", True, [b"content"])
    assert open_descriptors() == before


def test_a_directory_hides_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("team/app").mkdir(parents=True)
    with locate("team/app") as origin:
        assert origin.reference == "docker.io/team/app:latest"
    with pytest.raises(UsageError, match="image layout is oci:"):
        locate("./team/app")


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        ("/nonexistent/layer", NotFound),
        ("./nonexistent", NotFound),
        (str(LAYER / "below"), NotFound),
        ("/tmp", UsageError),
        ("/dev/null", UsageError),
        ("oci:/nonexistent", NotFound),
        ("oci:/nonexistent:tag", NotFound),
        ("oci:", UsageError),
        ("A:B:C", UsageError),
        ("https://example.org/image", UsageError),
        ("", UsageError),
        ("x" * 5000, UsageError),
        ("/" + "x" * 5000, BlockdevError),
    ],
)
def test_what_cannot_be_opened_is_refused_and_leaks_nothing(image: str, kind: type[BlockdevError]) -> None:
    before = open_descriptors()
    with pytest.raises(kind):
        locate(image)
    assert open_descriptors() == before


def test_a_config_opens_the_first_local_candidate_and_leaves_the_rest_to_the_registry(tmp_path: Path) -> None:
    (tmp_path / "overlaybd.sealed").write_bytes(b"sealed")
    (tmp_path / "file").write_bytes(b"file")
    config = write_config(
        tmp_path / "config.v1.json",
        repoBlobUrl="https://registry.example/v2/a/b/blobs",
        lowers=[
            {"file": str(tmp_path / "file"), "dir": str(tmp_path), "digest": DIGEST},
            {"dir": str(tmp_path)},
            {"dir": str(tmp_path / "absent"), "digest": DIGEST, "size": 12345},
        ],
    )
    with locate(str(config)) as origin:
        assert not origin.local
        file, sealed, remote = origin.layers
        assert os.pread(file.fd, 9, 0) == b"file"
        assert os.pread(sealed.fd, 9, 0) == b"sealed"
        assert file.digest == DIGEST
        assert (remote.fd, remote.size) == (-1, 12345)
        assert remote.url == f"https://registry.example/v2/a/b/blobs/{DIGEST}"


def test_a_config_with_an_upper_opens_both_of_its_files(tmp_path: Path) -> None:
    upper = {"data": str(DATA / "b-upper.data"), "index": str(DATA / "b-upper.index")}
    config = write_config(tmp_path / "c.json", lowers=[{"file": str(LAYER)}], upper=upper)
    with locate(str(config)) as origin:
        assert [part.name for part in origin.upper] == list(upper.values())


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"lowers": [{"file": "/nonexistent"}]}, NotFound),
        ({"lowers": [{"digest": DIGEST}]}, CorruptImage),
        ({"lowers": [{"file": 1}]}, CorruptImage),
        ({"lowers": {}}, CorruptImage),
        ({"lowers": [{"file": "/x", "targetFile": "/y"}]}, UsageError),
        ({"lowers": [], "upper": {"data": "/nonexistent", "index": "/nonexistent"}}, NotFound),
    ],
)
def test_a_config_that_leads_nowhere_is_refused(tmp_path: Path, fields: dict[str, Any], kind: type[Exception]) -> None:
    config = write_config(tmp_path / "c.json", **fields)
    before = open_descriptors()
    with pytest.raises(kind):
        locate(str(config))
    assert open_descriptors() == before


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("suffix", ["", ":1"])
def test_a_layout_opens_the_blobs_of_its_image(tmp_path: Path, depth: int, suffix: str) -> None:
    write_layout(tmp_path / "lay", [b"bottom", b"top"], depth=depth)
    with locate(f"oci:{tmp_path}/lay{suffix}") as origin:
        assert contents(origin) == [b"bottom", b"top"]
        assert [part.digest for part in origin.layers] == [oci.digest_of(b"bottom"), oci.digest_of(b"top")]
        assert origin.local


def test_a_layout_with_a_colon_in_its_name_is_found(tmp_path: Path) -> None:
    write_layout(tmp_path / "a:1", [b"layer"])
    with locate(f"oci:{tmp_path}/a:1") as origin, locate(f"oci:{tmp_path}/a:1:1") as tagged:
        assert contents(origin) == contents(tagged) == [b"layer"]


def test_an_ordinary_image_is_refused_with_what_converts_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ociblk convert makes a block image of it"):
        locate(f"oci:{ordinary.make(tmp_path / 'image', ordinary.lower)}")


def test_an_image_of_too_many_digest_tables_is_refused() -> None:
    def layer(number: int) -> oci.Descriptor:
        place = Place(COVERED_MAX, oci.digest_of(bytes(number)))
        return oci.Descriptor(oci.OCI_LAYER, oci.digest_of(b"blob"), place.blob_size, annotations=place.annotations())

    config = oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(b"{}"), 2)
    assert block_layers("it", oci.Manifest(config, (layer(1),) * 255))
    with pytest.raises(FormatError, match=f"at most {TABLES_MAX}"):
        block_layers("it", oci.Manifest(config, (layer(1), layer(2))))


def test_an_absent_tag_is_not_found(tmp_path: Path) -> None:
    write_layout(tmp_path, [b"layer"])
    with pytest.raises(NotFound, match="'2'"):
        locate(f"oci:{tmp_path}:2")


def test_a_changed_manifest_is_corrupt(tmp_path: Path) -> None:
    write_layout(tmp_path, [b"layer"])
    index = layout.parse_index((tmp_path / layout.INDEX).read_bytes())
    path = tmp_path / layout.blob_path(index.manifests[0].digest)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CorruptImage, match="digest"):
        locate(f"oci:{tmp_path}")


def test_a_shortened_layer_is_corrupt(tmp_path: Path) -> None:
    write_layout(tmp_path, [b"layer"])
    (tmp_path / layout.blob_path(oci.digest_of(b"layer"))).write_bytes(b"lay")
    before = open_descriptors()
    with pytest.raises(CorruptImage, match="3 bytes, 5"):
        locate(f"oci:{tmp_path}")
    assert open_descriptors() == before


def test_an_origin_crosses_the_control_socket(tmp_path: Path) -> None:
    upper = {"data": str(DATA / "b-upper.data"), "index": str(DATA / "b-upper.index")}
    lowers = [{"digest": DIGEST, "size": 7, "dir": "/nonexistent"}, {"file": str(LAYER)}]
    config = write_config(tmp_path / "c", lowers=lowers, upper=upper, repoBlobUrl="https://r.example/v2/a/blobs/")
    with locate(str(config)) as origin:
        body, descriptors = origin.to_wire()
        arrived = Origin.from_wire(json.loads(json.dumps(body)), descriptors)
        assert (arrived.name, arrived.reference, arrived.local) == (origin.name, "", False)
        assert arrived.layers == origin.layers
        assert arrived.upper == origin.upper
