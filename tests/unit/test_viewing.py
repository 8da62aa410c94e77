"""Layers for a viewer, as our own reader finds them through the server, and what the server refuses."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.places import using_options
from nrrn_pipeline.viewing import Layer, Level, find_layers, layers, public_url, server, serving, viewer_state
from nrrn_pipeline.volume import Volume, open_volume, read_box
from tests.support import bare_zarr, image_like, ome_image

SHAPE = (5, 70, 90)
ALL = ("uint8", "uint16", "float32", "int16", "int32")


def read(url: str, level: int = 0) -> NDArray[Any]:
    volume = open_volume(url, level, ALL)
    return read_box(volume, volume.box)


def got(address: str, path: str = "", method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content; `path` is sent as it stands."""
    parts = urlsplit(address)
    connection = HTTPConnection(parts.hostname or "", parts.port)
    try:
        connection.request(method, parts.path + path if not path.startswith("/") else path)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    "make",
    [
        lambda path, voxels: bare_zarr(path, voxels, (4, 32, 32), zarr_format=2),
        lambda path, voxels: bare_zarr(path, voxels, (2, 16, 48), shards=(4, 64, 48)),
        lambda path, voxels: bare_zarr(path, voxels.astype(voxels.dtype.newbyteorder(">")), (3, 70, 17)),
        lambda path, voxels: ome_image(path, voxels[None, None], zarr_format=2),
    ],
    ids=["v2", "sharded", "big endian", "OME-Zarr 0.4, t and c"],
)
def test_a_volume_of_any_kind_is_served_voxel_by_voxel(
    make: Callable[[Path, NDArray[Any]], Path], dtype: str, tmp_path: Path
) -> None:
    voxels = image_like(SHAPE, dtype)
    with serving(find_layers(make(tmp_path / "raw.zarr", voxels))) as address:
        np.testing.assert_array_equal(read(f"{address}0"), voxels)


def test_levels_are_served_with_their_voxel_sizes(tmp_path: Path) -> None:
    voxels = image_like(SHAPE)
    path = ome_image(tmp_path / "raw.zarr", voxels, levels=3, scale=(8.0, 4.0, 4.0))
    with serving(find_layers(path)) as address:
        for level in range(3):
            stored, served = open_volume(path, level), open_volume(f"{address}0", level)
            assert (served.voxel_nm, served.origin) == (stored.voxel_nm, stored.origin)
            np.testing.assert_array_equal(read(f"{address}0", level), read(str(path), level))


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [("uint8", "uint8", "int16"), ("uint16", "uint16", "int32"), ("uint8", "float32", "float32")],
)
def test_removed_noise_is_the_difference_in_a_type_that_holds_it(
    before: str, after: str, difference: str, tmp_path: Path
) -> None:
    noisy, denoised = image_like(SHAPE, before), image_like(SHAPE, after, seed=1)
    found = find_layers(bare_zarr(tmp_path / "a.zarr", noisy), bare_zarr(tmp_path / "b.zarr", denoised, (2, 64, 20)))
    assert [layer.name for layer in found] == ["noisy", "denoised", "removed noise"]
    with serving(found) as address:
        np.testing.assert_array_equal(read(f"{address}0"), noisy)
        np.testing.assert_array_equal(read(f"{address}1"), denoised)
        removed = read(f"{address}2")
    assert removed.dtype == difference
    np.testing.assert_array_equal(removed, noisy.astype(difference) - denoised.astype(difference))


def part_of(path: Path, voxels: NDArray[Any], origin: tuple[float, float, float]) -> Path:
    """An OME-Zarr of voxels of 4 nm that begins at an origin in nm."""
    ome_image(path, voxels)
    document = json.loads((path / "zarr.json").read_text())
    dataset = document["attributes"]["ome"]["multiscales"][0]["datasets"][0]
    dataset["coordinateTransformations"].append({"type": "translation", "translation": list(origin)})
    (path / "zarr.json").write_text(json.dumps(document))
    return path


def test_a_part_lies_where_its_origin_says(tmp_path: Path) -> None:
    noisy = image_like(SHAPE)
    source = ome_image(tmp_path / "a.zarr", noisy)
    part = part_of(tmp_path / "b.zarr", noisy[2:4, 10:50, 20:80] // 2, (8, 40, 80))
    found = find_layers(source, part)
    with serving(found) as address:
        removed = read(f"{address}2")
        assert open_volume(f"{address}2", 0, ALL).origin == (8, 40, 80)
    expected = noisy[2:4, 10:50, 20:80].astype("int16")
    np.testing.assert_array_equal(removed, expected - expected // 2)
    assert viewer_state(found, "abc")["position"] == [20 + 30, 10 + 20, 2 + 1]


@pytest.mark.parametrize("origin", [(8, 40, 84), (-4, 0, 0), (2, 0, 0)], ids=["beyond", "before", "between voxels"])
def test_what_is_no_part_of_the_source_is_refused(origin: tuple[float, float, float], tmp_path: Path) -> None:
    source = ome_image(tmp_path / "a.zarr", image_like(SHAPE))
    part = part_of(tmp_path / "b.zarr", image_like((2, 40, 70)), origin)
    with pytest.raises(InputError, match=r"b\.zarr/0 cannot be laid over .*a\.zarr/0: voxels of"):
        find_layers(source, part)


def test_a_source_is_believed_of_two_of_the_same_shape(tmp_path: Path) -> None:
    source = ome_image(tmp_path / "a.zarr", image_like(SHAPE))
    found = find_layers(source, bare_zarr(tmp_path / "b.zarr", image_like(SHAPE, seed=1)))
    assert [layer.volume.voxel_nm for layer in found] == [(4, 4, 4)] * 3


def test_levels_of_removed_noise_end_where_voxels_no_longer_meet(tmp_path: Path) -> None:
    voxels = image_like(SHAPE)
    source, output = (ome_image(tmp_path / name, voxels, levels=2) for name in ("a.zarr", "b.zarr"))
    assert [len(layer.levels) for layer in find_layers(source, output)] == [2, 2, 2]
    odd = part_of(tmp_path / "c.zarr", voxels[:, 1:], (0, 4, 0))
    assert [len(layer.levels) for layer in find_layers(source, odd)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("shape", "chunk", "expected"),
    [
        ((64, 1000, 1000), (16, 256, 256), (16, 256, 256)),
        ((64, 1000, 1000), (1, 64, 100), (1, 256, 200)),
        ((64, 100, 100), (8, 64, 64), (8, 100, 100)),
        ((128, 2048, 2048), (128, 1024, 1024), (128, 256, 512)),
    ],
)
def test_pieces_are_whole_chunks_unless_those_are_large(shape: Any, chunk: Any, expected: Any) -> None:
    assert Level(Volume("/v", shape, "uint8", chunk, chunk)).piece == expected


def test_contrast_is_that_of_the_data_and_never_nothing(tmp_path: Path) -> None:
    noisy, denoised = (np.zeros(SHAPE, "uint8") for _ in range(2))
    noisy[:, :, ::2], noisy[:, :, 1::2], denoised[:] = 90, 110, 100
    shown = find_layers(bare_zarr(tmp_path / "a.zarr", noisy), bare_zarr(tmp_path / "b.zarr", denoised))
    assert [layer.contrast for layer in shown] == [(90, 110), (90, 110), (-10, 10)]
    flat = find_layers(bare_zarr(tmp_path / "c.zarr", np.zeros(SHAPE, "float32")))
    assert [layer.contrast for layer in flat] == [(0.0, 1.0)]


def test_what_is_removed_of_infinite_voxels_is_no_number(tmp_path: Path) -> None:
    path = bare_zarr(tmp_path / "a.zarr", np.full(SHAPE, np.inf, "float32"))
    assert find_layers(path, path)[2].contrast == (-1.0, 1.0)


def test_measuring_contrast_reads_little_however_large_the_volume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(layers, "read_box", lambda _, box: asked.append(box.size) or np.zeros(box.shape, "uint8"))
    path = bare_zarr(tmp_path / "raw.zarr", np.zeros((1, 1, 1), "uint8"))
    document = json.loads((path / "zarr.json").read_text())
    document["shape"] = [10000, 20000, 20000]
    (path / "zarr.json").write_text(json.dumps(document))
    find_layers(path)
    assert sum(asked) == 9 * 256 * 256


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_zarr(tmp_path_factory.mktemp("shown") / "raw.zarr", image_like(SHAPE))


@pytest.fixture(scope="module")
def address(volume: Path) -> Iterator[str]:
    with serving(find_layers(volume)) as address:
        yield address


@pytest.mark.parametrize(
    "path",
    [
        *("../0/zarr.json", "..", "/", "/0/zarr.json", "//0/zarr.json", "/etc/passwd", "%2e%2e/0/zarr.json"),
        *("v/nrrn/../../0/zarr.json", "v/nrrn/..", "v/nrrn//etc/passwd", "v/other/index.html", "v/nrrn/__init__.py"),
        *("1/zarr.json", "-1/zarr.json", "00/zarr.json", "0", "0/1/zarr.json", "0/0/.zarray", "0/0/nrrn/plan.json"),
        *("0/0/c/5/0/0", "0/0/c/0/0", "0/0/c/-1/0/0", "0/0/c/0/0/99999999999999999999", "0/0/c/%30/0/0"),
        *("0/0/c/0/0/0/..", "0/0/c/../c/0/0/0", "events/other", "/favicon.ico/../0/zarr.json"),
    ],
)
def test_only_what_is_shown_is_there(path: str, address: str) -> None:
    status, _, content = got(address, path)
    assert (status, content) == (404, b"nothing is here\n")


def test_another_token_opens_nothing(address: str) -> None:
    token = urlsplit(address).path.strip("/")
    assert len(token) >= 16
    assert got(address, f"/{token}/0/zarr.json")[0] == 200
    for other in (token[:-1], token.swapcase(), f"x/{token}"):
        assert got(address, f"/{other}/0/zarr.json")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_written(method: str, address: str) -> None:
    assert got(address, "0/zarr.json", method)[0] == 501


@pytest.mark.parametrize("path", ["", "0/zarr.json", "0/0/c/0/0/0", "v/nrrn/", "events/nrrn", "7"])
def test_head_answers_as_get_without_the_content(path: str, address: str) -> None:
    status, headers, content = got(address, path, "HEAD")
    assert content == b""
    if path != "events/nrrn":  # that never ends
        by_get = got(address, path)
        assert (status, headers["Content-Length"]) == (by_get[0], str(len(by_get[2])))


def test_pages_from_elsewhere_are_not_let_in(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    assert not [name for name in got(address, "0/zarr.json")[1] if name.lower().startswith("access-control")]


def test_the_address_leads_to_the_client_with_the_state_by_the_name_that_the_browser_knows(address: str) -> None:
    parts = urlsplit(address)
    connection = HTTPConnection("127.0.0.1", parts.port)
    connection.request("GET", parts.path, headers={"Host": "localhost:8123"})  # as through a tunnel
    location = connection.getresponse().headers["Location"]
    connection.close()
    client, state = location.split("#!")
    assert [layer["source"] for layer in json.loads(unquote(state))["layers"]] == [
        f"http://localhost:8123{parts.path}0/|zarr3:"
    ]
    assert b"<title>neuroglancer</title>" in got(address, client)[2]


def test_what_cannot_be_read_is_told_and_the_rest_is_served(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = find_layers(volume), []

    def broken(*_: Any) -> NDArray[Any]:
        raise StorageError("s3://lab/raw.zarr/c/0/0/0: no such bucket")

    with serving(found, trouble=told.append) as address:
        with monkeypatch.context() as patch:
            patch.setattr(layers, "read_box", broken)
            status, _, content = got(address, "0/0/c/0/0/0")
        assert (status, content) == (500, b"s3://lab/raw.zarr/c/0/0/0: no such bucket")
        assert told == [content.decode()]
        assert got(address, "0/0/c/0/0/0")[0] == 200


def test_a_browser_that_goes_away_is_no_error(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
        connection.sendall(f"GET {parts.path}0/zarr.json HTTP/1.1\r\n\r\n".encode())
        connection.recv(1)
    deadline = time.monotonic() + 60
    while any("process_request_thread" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_readers_at_one_time_are_as_many_as_memory_holds() -> None:
    def readers(chunk: tuple[int, int, int]) -> int:
        level = Level(Volume("/v", (2000, 2000, 2000), "uint8", chunk, chunk))
        with server._Server([Layer("v", (level,), (0, 1))], {}, 0, print) as one:
            return one.readers._value

    assert readers((16, 256, 256)) == server.MOST_READERS
    assert readers((512, 512, 1024)) == 3
    assert readers((1024, 1024, 1024)) == 1


def test_a_port_that_is_taken_is_refused(address: str, volume: Path) -> None:
    port = urlsplit(address).port or 0
    with pytest.raises(InputError, match=f"port {port} cannot be had"), serving(find_layers(volume), port):
        pass


def test_without_the_client_it_says_what_to_install(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install nrrn-pipeline\[view\]"), serving(find_layers(volume)):
        pass


def test_a_slice_fits_unless_it_would_be_read_whole() -> None:
    def zoom(side: int, coarser: int = 0) -> Any:
        sizes = [(8.0, 4.0 * 2**step, 4.0 * 2**step) for step in range(coarser + 1)]
        levels = [
            Level(Volume("/v", (9, side, side), "uint8", (1, 64, 64), (1, 64, 64), voxel_size=size)) for size in sizes
        ]
        return viewer_state([Layer("v", tuple(levels), (0, 255))], [""])["crossSectionScale"]

    assert zoom(600) == 1.0
    assert zoom(60) == 0.1
    assert zoom(12000) == 4.0
    assert zoom(12000, coarser=2) == 16.0
    assert zoom(12000, coarser=5) == 20.0


def shown(url: str, **changes: Any) -> Layer:
    made = open_volume(changes.pop("like"))
    return Layer("noisy", (Level(replace(made, url=url, **changes)),), (0, 255))


def test_a_link_holds_a_state_that_names_public_sources(tmp_path: Path) -> None:
    like = {"like": bare_zarr(tmp_path / "a.zarr", image_like(SHAPE), zarr_format=2)}
    link = public_url([shown("s3://open-lab/my vol_1.zarr", **like)])
    client, state = link.split("#!")
    assert client == "https://neuroglancer-demo.appspot.com/"
    layer = json.loads(unquote(state))["layers"][0]
    assert layer["source"] == {
        "url": "s3://open-lab/my%20vol_1.zarr/|zarr2:",
        "transform": {
            "outputDimensions": {"z": [1, ""], "y": [1, ""], "x": [1, ""]},
            "matrix": [[1, 0, 0, -0.5], [0, 1, 0, -0.5], [0, 0, 1, -0.5]],
        },
    }
    link = public_url([shown("https://lab.org:8443/my%20vol.zarr", **like)])
    layer = json.loads(unquote(link.split("#!")[1]))["layers"][0]
    assert layer["source"]["url"] == "https://lab.org:8443/my%20vol.zarr/|zarr2:"
    like = {"like": ome_image(tmp_path / "b.zarr", image_like(SHAPE))}
    link = public_url([shown("gs://open-lab/b.zarr/0", **like)])
    state = json.loads(unquote(link.split("#!")[1]))
    assert state["layers"][0]["source"] == {"url": "gs://open-lab/b.zarr/|zarr3:"}
    assert state["dimensions"] == {axis: [4e-9, "m"] for axis in "xyz"}


@pytest.mark.parametrize("url", ["/data/a.zarr", "http://lab/a.zarr", "abfs://lab/a.zarr", "memory://a.zarr"])
def test_no_link_is_made_of_what_web_pages_cannot_read(url: str, volume: Path) -> None:
    with pytest.raises(InputError, match="cannot be read by web pages: leave --url out"):
        public_url([shown(url, like=volume)])


def test_no_link_is_made_of_an_endpoint_that_the_client_would_not_ask(volume: Path) -> None:
    options = {"endpoint_url": "https://s3.lab"}
    with using_options(options), pytest.raises(InputError, match="is at an endpoint of its own"):
        public_url([shown("s3://lab/a.zarr", like=volume)])
