"""Whatever stands in a volume's metadata or on the command line: a value or a refusal, soon, in one line."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrrn_pipeline import ome
from nrrn_pipeline.cli.options import parse_box, parse_triple
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.slabs import Layout
from nrrn_pipeline.volume import Volume, open_volume, read_box
from tests.hostile import DEEP, EVIL, HUGE, JSON, changed, frugal, paths_in, refusal, refused_in_one_line
from tests.support import bare_zarr, image_like, ome_image, tiny_weights


def _valid() -> dict[str, dict[str, Any]]:
    """Metadata that open, by the name of their file and what they are of."""
    voxels = image_like((4, 16, 16))
    found = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for kind, options in {"plain": {}, "sharded": {"shards": (4, 16, 16)}, "v2": {"zarr_format": 2}}.items():
            path = bare_zarr(folder / kind, voxels, (2, 8, 8), **options)
            file = ".zarray" if kind == "v2" else "zarr.json"
            found[f"{kind}/{file}"] = json.loads((path / file).read_text())
        found["image/zarr.json"] = json.loads((ome_image(folder / "image", voxels) / "zarr.json").read_text())
        found["image2/.zattrs"] = json.loads((ome_image(folder / "image2", voxels, 2) / ".zattrs").read_text())
    return found


VALID = _valid()


def put(folder: Path, kind: str, content: str | bytes) -> Path:
    """One of VALID with other metadata."""
    place, _, file = kind.partition("/")
    path = folder / "h.zarr"
    if place.startswith("image"):
        ome_image(path, image_like((4, 16, 16)), 2 if place == "image2" else 3)
    else:
        path.mkdir(exist_ok=True)
    (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_metadata_with_anything_anywhere_are_a_volume_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(VALID)))
    document = VALID[kind]
    for _ in range(data.draw(st.integers(1, 2))):
        if places := list(paths_in(document)):
            document = changed(document, data.draw(st.sampled_from(places)), data.draw(st.just(...) | JSON))
    with TemporaryDirectory() as folder:
        volume = frugal(lambda: open_volume(put(Path(folder), kind, json.dumps(document))))
    if volume is not None:
        assert min(volume.shape) >= 1
        assert min(volume.chunk) >= 1
        assert all(unit % chunk == 0 for unit, chunk in zip(volume.write_unit, volume.chunk, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(sorted(VALID)), content=st.binary(max_size=200) | JSON.map(lambda j: json.dumps(j).encode())
)
def test_metadata_of_any_bytes_are_a_volume_or_refused(kind: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        frugal(lambda: open_volume(put(Path(folder), kind, content)))


def as_text(kind: str, **changes: Any) -> str:
    return json.dumps(VALID[kind] | changes)


PLAIN, SHARDED, V2 = "plain/zarr.json", "sharded/zarr.json", "v2/.zarray"
REFUSED: dict[str, tuple[str, str | bytes]] = {
    "shape of 2^60": (PLAIN, as_text(PLAIN, shape=[HUGE] * 3)),
    "negative shape": (PLAIN, as_text(PLAIN, shape=[-4, 16, 16])),
    "shape of nothing": (PLAIN, as_text(PLAIN, shape=[0, 16, 16])),
    "shape of fractions": (PLAIN, as_text(PLAIN, shape=[4.5, 16, 16])),
    "shape of text": (PLAIN, as_text(PLAIN, shape=["4", "16", "16"])),
    "shape of a million": (PLAIN, as_text(PLAIN, shape=[1] * 10**6)),
    "chunks of 2^60": (V2, as_text(V2, chunks=[HUGE] * 3)),
    "chunks of nothing": (V2, as_text(V2, chunks=[0, 8, 8])),
    "negative chunks": (V2, as_text(V2, chunks=[-2, 8, 8])),
    "too few chunks": (V2, as_text(V2, chunks=[2, 8])),
    "text as a type of a GB": (V2, as_text(V2, dtype="|S1073741824", fill_value=None)),
    "a codec that nobody knows": (PLAIN, as_text(PLAIN, codecs=[{"name": "no-such-codec"}])),
    "codecs without end": (PLAIN, as_text(PLAIN, codecs=[{"name": "bytes"}] * 100_000)),
    "filters without end": (V2, as_text(V2, filters=[{"id": "zlib", "level": 1}] * 100_000)),
    "nested arrays": (PLAIN, "[" * DEEP + "]" * DEEP),
    "nested tables": (PLAIN, '{"a":' * DEEP + "1" + "}" * DEEP),
    "nested codecs": (PLAIN, as_text(PLAIN)[:-1] + ', "codecs": ' + '[{"name":' * 300 + "1" + "}]" * 300 + "}"),
    "20 MB of spaces": (PLAIN, as_text(PLAIN) + " " * (20 << 20)),
    "20 MB of text": (PLAIN, as_text(PLAIN, attributes={"a": "x" * (20 << 20)})),
    "not UTF-8": (PLAIN, b'{"zarr_format": 3, "node_type": "array", "a": "\xff"}'),
    "NaN as shape": (PLAIN, as_text(PLAIN, shape=[math.nan] * 3)),
    "Infinity as chunks": (V2, as_text(V2, chunks=[math.inf] * 3)),
    "duplicate keys, the last hostile": (PLAIN, as_text(PLAIN)[:-1] + ', "shape": [-1, 1, 1]}'),
    "shards that chunks do not divide": (
        SHARDED,
        as_text(SHARDED, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [3, 16, 16]}}),
    ),
    "fill value of another type": (PLAIN, as_text(PLAIN, fill_value={"a": 1})),
    "fill value of 15 MB": (PLAIN, as_text(PLAIN, fill_value="x" * (15 << 20))),
    "type of 15 MB": (PLAIN, as_text(PLAIN, data_type="x" * (15 << 20))),
    "an evil type": (PLAIN, as_text(PLAIN, data_type=EVIL)),
    "an evil shape": (PLAIN, as_text(PLAIN, shape=EVIL)),
    "an evil fill value": (PLAIN, as_text(PLAIN, fill_value=EVIL)),
    "evil axes": (PLAIN, as_text(PLAIN, dimension_names=[EVIL, "y", "x"])),
    "axes without end": (PLAIN, as_text(PLAIN, dimension_names=["z" * 10**6, "y", "x"])),
    "numbers as axes": (PLAIN, as_text(PLAIN, dimension_names=[1, 2, 3])),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", REFUSED)
def test_hostile_metadata_are_refused_in_one_short_line_in_no_time(tmp_path: Path, case: str) -> None:
    kind, text = REFUSED[case]
    assert frugal(lambda: open_volume(put(tmp_path, kind, text))) is None
    assert "h.zarr" in refusal(lambda: open_volume(tmp_path / "h.zarr"))


@pytest.mark.timeout(60)
def test_large_attributes_of_an_array_cost_no_memory_and_travel_with_no_task(tmp_path: Path) -> None:
    text = as_text(PLAIN, attributes={"a": [[]] * 300_000})
    volume = frugal(lambda: open_volume(put(tmp_path, PLAIN, text)))
    assert volume is None or len(volume.metadata) < 10_000


def with_level(**changes: Any) -> str:
    document = copy.deepcopy(VALID["image/zarr.json"])
    document["attributes"]["ome"]["multiscales"][0]["datasets"][0].update(changes)
    return json.dumps(document)


OUTSIDE = ["..", "/etc", "s3://x", "a/../../b", "../secret.zarr", "0/../../secret.zarr", "../h.zarr2/0", "memory://x"]
ODD = ["", ".", "0/", "./0", "0//", "/", "\0", "a\nb", "\ud800", "x" * 300, "x" * 10**6, None, 3, ["0"], {}]


@pytest.mark.parametrize("path", [*OUTSIDE, *ODD], ids=lambda path: ascii(path)[:20])
def test_a_level_is_in_its_image_or_refused(tmp_path: Path, path: Any) -> None:
    bare_zarr(tmp_path / "secret.zarr", np.full((4, 16, 16), 7, np.uint8))
    text = with_level(path=path)
    volume = frugal(lambda: open_volume(put(tmp_path, "image/zarr.json", text)))
    if volume is None:
        assert "h.zarr" in refusal(lambda: open_volume(tmp_path / "h.zarr"))
    else:
        assert path not in OUTSIDE
        np.testing.assert_array_equal(read_box(volume, volume.box), image_like((4, 16, 16)))


SCALES = [[0, 1, 1], [-1, 1, 1], [math.nan, 1, 1], [math.inf, 1, 1], [10**400, 1, 1], ["x", 1, 1], [1, 1], [1] * 9, "1"]


@pytest.mark.parametrize("kind", ["scale", "translation"])
@pytest.mark.parametrize("numbers", SCALES, ids=lambda numbers: str(numbers)[:20])
def test_a_voxel_size_is_positive_and_a_place_finite_or_both_are_refused(
    tmp_path: Path, kind: str, numbers: Any
) -> None:
    text = with_level(coordinateTransformations=[{"type": kind, kind: numbers}])
    volume = frugal(lambda: open_volume(put(tmp_path, "image/zarr.json", text)))
    if volume is not None:
        assert all(0 < size < math.inf for size in volume.voxel_size)
        assert all(math.isfinite(place) for place in volume.origin)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_levels_of_any_attributes_are_read_or_refused(data: st.DataObject) -> None:
    document = VALID["image/zarr.json"]["attributes"]
    path = data.draw(st.sampled_from(list(paths_in(document))))
    attributes = changed(document, path, data.draw(JSON | st.sampled_from([10**400, -(10**400)])))
    frugal(lambda: ome.read_levels(attributes))


NUMBER_TEXTS = st.sampled_from(["0", "-1", "8", str(HUGE), "9" * 5000, "1e3", " 4 ", "1_0", "", "٣", "nan", "\0"])
TEXTS = st.text(max_size=30) | st.lists(
    NUMBER_TEXTS | st.tuples(NUMBER_TEXTS, NUMBER_TEXTS).map(":".join), max_size=4
).map(",".join)


@given(text=TEXTS)
def test_any_text_is_a_roi_and_three_sizes_or_refused(text: str) -> None:
    roi, sizes = frugal(lambda: parse_box("roi", text)), frugal(lambda: parse_triple("slab", text))
    assert roi is None or Box.parse(str(roi)) == roi
    assert sizes is None or [type(size) for size in sizes] == [int] * 3


SIZES = st.none() | st.tuples(*[st.sampled_from([-1, 0, 1, 3, 16, 64, 2**24, HUGE])] * 3)
ENDS = st.sampled_from([-HUGE, -1, 0, 1, 5, 2**24, HUGE])


@settings(deadline=None)
@given(
    shape=st.tuples(*[st.sampled_from([1, 7, 2**24])] * 3),
    sizes=st.tuples(SIZES, SIZES, SIZES),
    tile=st.sampled_from([-1, 0, 9, 256, HUGE]),
    halo=st.sampled_from([None, -HUGE, 0, 4, HUGE]),
    ends=st.none() | st.tuples(*[ENDS] * 6),
)
def test_any_layout_and_roi_are_a_plan_or_refused(
    shape: tuple[int, int, int], sizes: tuple[Any, Any, Any], tile: int, halo: int | None, ends: Any
) -> None:
    source = Volume("/data/in.zarr", shape, "uint8", (1, 1, 1), (1, 1, 1))
    roi = ends and Box(Span(*ends[:2]), Span(*ends[2:4]), Span(*ends[4:]))
    weights = Weights("w", "0", 1, 4)
    plan = frugal(lambda: plan_denoise(source, "/data/out.zarr", weights, Layout(*sizes, tile, halo), roi))
    assert plan is None or (isinstance(plan, DenoisePlan) and plan.box == (roi or source.box))


SOURCES = {
    **{case: REFUSED[case] for case in ("shape of 2^60", "nested tables", "not UTF-8", "an evil shape", "evil axes")},
    "codecs that are none": (SHARDED, as_text(SHARDED, codecs={})),
    "a level of a null byte": ("image/zarr.json", with_level(path="\0")),
    "a level of a long name": ("image/zarr.json", with_level(path="x" * 10**6)),
    "a level elsewhere": ("image/zarr.json", with_level(path="../..")),
    "a scale of 10^400": (
        "image/zarr.json",
        with_level(coordinateTransformations=[{"type": "scale", "scale": [10**400, 1, 1]}]),
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_nrrn_info_refuses_a_hostile_volume_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    put(tmp_path, *SOURCES[case])
    refused_in_one_line(monkeypatch, capsys, "info", tmp_path / "h.zarr")


@pytest.mark.parametrize(
    ("option", "text"),
    [("--roi", text) for text in (f"0:{HUGE},0:1,0:1", "9" * 5000, f"0:{'9' * 4000},0:1,0:1", EVIL)]
    + [(option, text) for option in ("--slab", "--chunk") for text in (f"{HUGE},1,1,1", "-1,0,0", EVIL)],
    ids=lambda word: ascii(word)[1:20],
)
def test_nrrn_plan_refuses_hostile_numbers_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, text: str
) -> None:
    source, weights = bare_zarr(tmp_path / "a.zarr", image_like((4, 16, 16))), tiny_weights(tmp_path / "w.safetensors")
    refused_in_one_line(
        monkeypatch, capsys, "plan", source, tmp_path / "out.zarr", "--weights", weights, f"{option}={text}"
    )
