"""Manifests of a batch: each kind is read, and every mistake is named before anything starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from nrrn_pipeline import Box, InputError, Options, read_manifest
from nrrn_pipeline.batch import manifest
from tests.support import array, image_like, ome_image, other_folder, tiny_weights

KNOWN = "chunk, halo, images, level, method, output, roi, shard, slab, source, stats, stitch, tile, weights"


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    tiny_weights(tmp_path / "w.safetensors")
    return tmp_path


@pytest.fixture
def read(lab: Path) -> Callable[..., list[manifest.Job]]:
    def call(
        text: str | bytes, kind: str = "csv", weights: str | None = "w.safetensors", method: str | None = None
    ) -> list[manifest.Job]:
        file = lab / f"jobs.{kind}"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_manifest(file, None if weights is None else lab / weights, method=method)

    return call


Read = Callable[..., list[manifest.Job]]


def names(jobs: list[manifest.Job]) -> list[tuple[str, str]]:
    return [(job.source.rpartition("/")[2], job.output.rpartition("/")[2]) for job in jobs]


def test_a_csv_names_volumes_relative_to_its_folder(read: Read, lab: Path) -> None:
    jobs = read("source,output\nraw/a.zarr,clean/a.zarr\n/elsewhere/b.zarr,s3://lab/b.zarr\n~/c.zarr,file:///d.zarr\n")
    assert [(job.source, job.output) for job in jobs] == [
        (f"{lab}/raw/a.zarr", f"{lab}/clean/a.zarr"),
        ("/elsewhere/b.zarr", "s3://lab/b.zarr"),
        (str((Path.home() / "c.zarr").resolve()), "/d.zarr"),
    ]
    assert {job.weights for job in jobs} == {f"{lab}/w.safetensors"}
    assert [job.place for job in jobs] == ["line 2", "line 3", "line 4"]


def test_settings_of_a_row_go_before_those_of_the_batch(read: Read, lab: Path) -> None:
    header = "source,output,weights,level,roi,slab,chunk,shard,tile,halo,images,stats,method,stitch"
    row = 'a,b,other.safetensors,2,"0:8,0:64,0:64","8,64,64","4,32,32","8, 64, 64",128,9,2,volume,nrrn,blend'
    full, bare = read(f"{header}\n{row}\nc,d,,,,,,,,,,,,\n")
    common = Options(level=1, cluster="serial")
    own = full.settings.over(common)
    assert full.weights == f"{lab}/other.safetensors"
    assert (own.level, own.roi, own.cluster) == (2, Box.parse("0:8,0:64,0:64"), "serial")
    assert (own.layout.slab, own.layout.chunk, own.layout.shard) == ((8, 64, 64), (4, 32, 32), (8, 64, 64))
    assert (own.layout.tile, own.layout.halo, own.method.images, own.method.statistics) == (128, 9, 2, "volume")
    assert (own.method.name, own.method.stitch) == ("nrrn", "blend")
    assert bare.weights == f"{lab}/w.safetensors"
    assert bare.settings.over(common) == common


def test_a_filter_takes_no_weights_and_a_network_some(read: Read, lab: Path) -> None:
    header, filtered, networked = "source,output,method\n", "a,b,nlm-avg\n", "c,d,nrrn\n"
    first, second = read(header + filtered + networked)
    assert (first.weights, second.weights) == (None, f"{lab}/w.safetensors")
    (alone,) = read("source,output\na,b\n", weights=None, method="mean")
    assert alone.weights is None
    first, second = read("source,output,method,weights\na,b,,\nc,d,nrrn,own\n", weights=None, method="mean")
    assert (first.weights, second.weights) == (None, f"{lab}/own")
    assert [job.settings.over(Options()).method.name for job in (first, second)] == ["mean", "nrrn"]
    volumes = '[[volume]]\nsource = "a"\noutput = "b"\nmethod = "bm3d"\n[[volume]]\nsource = "c"\noutput = "d"\n'
    first, second = read(f'[defaults]\nweights = "own"\n{volumes}', "toml", weights=None)
    assert (first.weights, second.weights) == (None, f"{lab}/own")
    for text, weights, method, said in (
        (header + networked, None, None, "line 2: it has no weights"),
        (header + networked, None, "mean", "line 2: it has no weights"),
        (header + "a,b,median\n", None, None, "line 2: method 'median' is unknown"),
        ("source,output,weights\na,b,own\n", None, "mean", "line 2: the filter mean needs no weights"),
        ("source,output,method,images\na,b,mean,2\n", None, None, "line 2: images 2 are for networks"),
        (header + filtered, "w.safetensors", "mean", "the filter mean needs no weights: leave them out"),
    ):
        with pytest.raises(InputError, match=said):
            read(text, weights=weights, method=method)


def test_a_toml_names_volumes_with_defaults(read: Read, lab: Path) -> None:
    text = """
    [defaults]
    weights = "w.safetensors"
    chunk = [4, 32, 32]
    images = 2
    [[volume]]
    source = "a.zarr"
    output = "out/a.zarr"
    [[volume]]
    source = "b.zarr"
    output = "out/b.zarr"
    chunk = "8,64,64"
    halo = 0
    roi = "0:8,0:64,0:64"
    """
    first, second = read(text, "toml", weights=None)
    assert (first.source, first.weights, first.place) == (f"{lab}/a.zarr", f"{lab}/w.safetensors", "volume 1")
    assert first.settings.over(Options()).layout.chunk == (4, 32, 32)
    own = second.settings.over(Options())
    assert (own.layout.chunk, own.layout.halo, own.method.images) == ((8, 64, 64), 0, 2)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffsource,output\r\na,b\r\nc,d\r\n",
        "source,output\ra,b\rc,d\r",
        ' source , output \n "a","b" \n\n,\n  c,"d"'.replace(' "a"', '"a"').replace('"b" ', '"b"'),
        "output,source\nb,a\nd,c",
        "source,output\n" + "\n" * 1000 + "a,b\n" + ",\n" * 1000 + "c,d",
    ],
    ids=["BOM-CRLF", "CR", "quotes-and-blanks", "other order", "many empty lines"],
)
def test_tables_as_programs_write_them_are_read(read: Read, text: str) -> None:
    assert names(read(text)) == [("a", "b"), ("c", "d")]


def test_a_quoted_name_may_hold_commas_and_quotes(read: Read) -> None:
    assert names(read('source,output\n"a,1.zarr","b""2.zarr"\n')) == [("a,1.zarr", 'b"2.zarr')]


def test_the_same_source_may_be_denoised_into_two_outputs(read: Read) -> None:
    assert len(read('source,output,roi\na,b,"0:8,0:8,0:8"\na,c,\n')) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"no column source and no output: .*it is ''"),
        ("source\na\n", "names no column output"),
        ("source;output\na;b\n", r"names no column source and no output: .*separated by commas.*'source;output'"),
        ("a.zarr,b.zarr\n", "its first line names no column source"),
        ("source,output,weigths\na,b,c\n", rf"line 1: column 'weigths' is unknown: use {KNOWN}"),
        ("source,output,\na,b,\n", "line 1: column '' is unknown"),
        ("source,output,Level\na,b,0\n", "line 1: column 'Level' is unknown"),
        ("source,output,tile,tile\na,b,1,2\n", "line 1: column tile is there twice"),
        ("source,output\n", r"names no volume"),
        ("source,output\n,\n\n", r"names no volume"),
        ("source,output\na\n", "line 2 has 1 field, the header 2"),
        ("source,output,slab\na,b,8,64,64\n", 'line 2 has 5 fields, the header 3: put in quotes .* "16,256,256"'),
        ("source,output\na,\n", r"line 2: output: Field required"),
        ('source,output\n"a,b\n', "line 2: unexpected end of data"),
        ('source,output\n"a"x,b\n', "line 2: .*expected after"),
        ("source,output,level\na,b,1.5\n", "line 2: level: '1.5' is no whole number from 0 up"),
        ("source,output,level\na,b,-1\n", "line 2: level: '-1' is no whole number"),
        ("source,output,level\na,b,\u0663\n", "line 2: level: .* is no whole number"),
        ('source,output,slab\na,b,"8,64"\n', "line 2: slab: '8,64' is not understood: expected three sizes Z,Y,X"),
        ('source,output,chunk\na,b,"0,64,64"\n', r"line 2: chunk \(0, 64, 64\) is not possible"),
        ("source,output,roi\na,b,all\n", "line 2: roi: 'all' is not understood: expected Z0:Z1,Y0:Y1,X0:X1"),
        ("source,output,images\na,b,5\n", "line 2: images 5 is not possible: use 3"),
        ("source,output,stats\na,b,median\n", "line 2: statistics 'median' is unknown"),
        ("source,output\na,b\nc,./b\n", r"line 3 and line 2 have the same output .*/b"),
        ("source,output\na,b\nb,c\n", "the output of line 2 lies in the source of line 3"),
        ("source,output\na,a\n", "the output of line 2 lies in the source of line 2"),
        ("source,output\na,b\nc,a/clean\n", "the output of line 3 lies in the source of line 2"),
        ("source,output\na,b\nc,b/0\n", "the output of line 3 lies in the output of line 2"),
        ("source,output\na,b\nb/0,c\n", "the source of line 3 lies in the output of line 2"),
        ("source,output\na,s3://lab/../b\n", "line 2: 's3://lab/../b' cannot be a path or URL"),
        ("source,output\na\x07,b\n", "line 2: .* cannot be a path or URL: .*unprintable"),
        ("source,output\nhttps://me:secret@web/a,b\n", "line 2: 'web/a' cannot be a path or URL: it holds a password"),
    ],
)
def test_every_mistake_in_a_csv_is_named_with_its_line(read: Read, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no volume"),
        ("[defaults]\ntile = 64\n", "names no volume"),
        ("[[volumes]]\nsource = 'a'\n", r"key 'volumes' is unknown: use \[defaults\] and \[\[volume\]\]"),
        ("[volume]\nsource = 'a'\n", r"\[\[volume\]\] in double brackets"),
        ("volume = ['a']\n", "volume 1 is no table"),
        ("defaults = 3\n", "write .defaults. once"),
        ("[defaults]\ntiel = 64\n", "defaults: tiel: it is unknown"),
        ("[defaults]\nsource = 'a'\n", "defaults: source: it is unknown"),
        ("[[volume]]\nsource = 'a'\n", "volume 1: output: Field required"),
        ("[[volume]]\nsource = 'a'\noutput = 'b'\n[[volume]]\nsorce = 'c'\noutput = 'd'\n", "volume 2: .*sorce: it is"),
        ("[[volume]]\nsource = ''\noutput = 'b'\n", "volume 1: source: String should have at least 1 character"),
        ("[[volume]]\nsource = 3\noutput = 'b'\n", "volume 1: source: Input should be a valid string"),
        ("[[volume]]\nsource = 'a'\noutput = 'b'\nlevel = true\n", "volume 1: level: True is no whole number"),
        ("[[volume]]\nsource = 'a'\noutput = 'b'\nslab = [8, 64, 6.5]\n", "slab: .* is not understood"),
        ("[[volume]]\nsource = 'a'\noutput = 'b'\nslab = 8\n", "slab: 8 is not understood"),
        ("[[volume]]\nsource = 'a'\noutput = 'b'\nroi = [0, 8]\n", "roi: .* is not understood"),
        ("[[volume]\n", r"cannot be used: Expected .* \(at line 1"),
        ("volume = " + "[" * 20_000, "cannot be used"),
    ],
)
def test_every_mistake_in_a_toml_is_named_with_its_entry(read: Read, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        read(text, "toml")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\x00", "source,output\na,b".encode("utf-16"), b"source,output\0\n"]
)
def test_what_is_no_text_is_refused(read: Read, data: bytes) -> None:
    with pytest.raises(InputError, match="is no text in UTF-8"):
        read(data)


def test_many_mistakes_are_one_line_of_bounded_length(read: Read) -> None:
    with pytest.raises(InputError, match=r"line 2: level.*line 6: level.*; and 995 more") as refused:
        read("source,output,level\n" + "a,b,x\n" * 1000)
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)


def test_hostile_manifests_are_refused_in_a_moment(read: Read) -> None:
    started = time.perf_counter()
    for text in (
        "source,output\n" + "x" * 2**23,
        "source,output\n" + '"' * 2**20,
        "source,output\n" + "a" * 2**21 + ",b\n",
        "," * 2**21,
        "source,output\n" + "," * 2**21,
        "source,output,level\na,b," + "9" * 100_000,
    ):
        with pytest.raises(InputError) as refused:
            read(text)
        assert len(str(refused.value)) < 1500
    assert time.perf_counter() - started < 10


def test_ten_thousand_volumes_are_read_in_a_moment(read: Read) -> None:
    rows = "".join(f"s3://lab/raw/{n}.zarr,s3://lab/clean/{n}.zarr\n" for n in range(10_000))
    started = time.perf_counter()
    assert len(read(f"source,output\n{rows}")) == 10_000
    assert time.perf_counter() - started < 10


def test_weights_must_be_named_somewhere_and_be_there(read: Read) -> None:
    text = "source,output,weights\na,b,w.safetensors\nc,d,\n"
    with pytest.raises(InputError, match="line 3: it has no weights: name them there or give --weights"):
        read(text, weights=None)
    with pytest.raises(InputError, match=r"no\.safetensors"):
        read(text, weights="no.safetensors")
    assert len(read(text)) == 2


def test_a_manifest_that_is_not_there_or_is_none_is_named(lab: Path) -> None:
    (lab / "folder.csv").mkdir()
    for name in ("no.csv", "folder.csv"):
        with pytest.raises(InputError, match=rf"there is no manifest at .*{name}"):
            read_manifest(lab / name)
    for name in ("jobs.txt", "raw.zarr", ""):
        with pytest.raises(InputError, match=rf"'{name}' is no manifest: give a \.csv or \.toml file, a glob"):
            read_manifest(name)
    (lab / "jobs.csv").write_text("source,output\na,b\n")
    with pytest.raises(InputError, match="--into is for globs and folders"):
        read_manifest(lab / "jobs.csv", lab / "w.safetensors", into="out")


@pytest.fixture
def raw(lab: Path) -> Path:
    """A folder of volumes and other things."""
    raw = lab / "raw"
    raw.mkdir()
    array((4, 8, 8))(raw / "b.zarr")
    ome_image(raw / "a.zarr", image_like((4, 16, 16)), zarr_format=2)
    array((4, 8, 8))(lab / "elsewhere")
    (raw / "link.zarr").symlink_to(lab / "elsewhere")
    array((4, 8, 8))(raw / ".hidden.zarr")
    other_folder(raw / "broken.zarr")
    (raw / "notes.zarr").write_text("a file")
    return raw


def found(pattern: Path | str, lab: Path, into: str = "clean") -> list[tuple[str, str]]:
    return names(read_manifest(pattern, lab / "w.safetensors", lab / into))


def test_a_glob_names_all_folders_that_match(raw: Path, lab: Path) -> None:
    every = [("a.zarr", "a.zarr"), ("b.zarr", "b.zarr"), ("broken.zarr", "broken.zarr"), ("elsewhere", "link.zarr")]
    assert found(raw / "*.zarr", lab) == every
    assert found(raw / "[ab].zarr", lab) == every[:2]
    assert found(f"{lab}/r?w/b*.zarr", lab) == every[1:3]
    assert found(f"{lab}/*/a.zarr", lab) == every[:1]
    assert [job.output for job in read_manifest(raw / "a*", lab / "w.safetensors", "s3://lab/x/")] == [
        "s3://lab/x/a.zarr"
    ]


def test_a_folder_names_every_zarr_right_in_it(raw: Path, lab: Path) -> None:
    assert found(f"{raw}/", lab) == [("a.zarr", "a.zarr"), ("b.zarr", "b.zarr"), ("elsewhere", "link.zarr")]
    with pytest.raises(InputError, match=r"a\.zarr is a Zarr itself"):
        found(f"{raw}/a.zarr/", lab)


def test_outputs_within_reach_of_a_glob_are_no_sources(raw: Path, lab: Path) -> None:
    array((4, 8, 8))(raw / "clean" / "a.zarr")
    assert ("clean", "clean") not in found(raw / "*", lab, "raw/clean")
    assert found(raw / "c*" / "*", lab, "other") == [("a.zarr", "a.zarr")]
    with pytest.raises(InputError, match="no volume at"):
        found(raw / "c*" / "*", lab, "raw/clean")


def test_a_glob_that_cannot_be_used_is_refused(raw: Path, lab: Path) -> None:
    weights = lab / "w.safetensors"
    for pattern, into, said in (
        (raw / "*.n5", "out", r"no volume at .*\*\.n5"),
        (lab / "nowhere" / "*", "out", "no volume at"),
        (f"{lab}/nowhere/", "out", "no volume at"),
        (lab / "**" / "*.zarr", "out", r"\*\* is not understood"),
        ("https://web/raw/*.zarr", "out", "is on a web server: name its volumes"),
        (raw / "*.zarr", None, "give --into"),
        (lab / "*" / "*.zarr", raw, "no volume at"),
    ):
        with pytest.raises(InputError, match=said):
            read_manifest(pattern, weights, into)
    with pytest.raises(InputError, match="give --weights"):
        read_manifest(raw / "*.zarr", None, "out")
    assert {job.weights for job in read_manifest(raw / "*.zarr", None, "out", method="mean")} == {None}
    assert read_manifest(raw / "*.n5", weights, "out", empty=True) == []


def test_two_matches_of_one_name_have_the_same_output(raw: Path, lab: Path) -> None:
    array((4, 8, 8))(lab / "more" / "a.zarr")
    with pytest.raises(InputError, match=r"raw/a\.zarr and .*more/a\.zarr have the same output"):
        found(lab / "*" / "a.zarr", lab)


@pytest.fixture
def memory(lab: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.put(str(lab / "w.safetensors"), "/batch/w.safetensors")
    yield "memory://batch"
    files.rm("/batch", recursive=True)


def test_manifests_and_globs_may_lie_on_storage(memory: str, raw: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/batch/jobs.csv", b"source,output,weights\nraw/a.zarr,clean/a.zarr,w.safetensors\n/b,/c,../w\n")
    with pytest.raises(InputError, match=r"line 3: 'memory://batch/../w' cannot be"):
        read_manifest(f"{memory}/jobs.csv")
    files.pipe_file("/batch/jobs.csv", b"source,output,weights\nraw/a.zarr,clean/a.zarr,w.safetensors\n/b,/c,/w\n")
    first, second = read_manifest(f"{memory}/jobs.csv")
    assert (first.source, first.output, first.weights) == tuple(
        f"{memory}/{name}" for name in ("raw/a.zarr", "clean/a.zarr", "w.safetensors")
    )
    assert (second.source, second.output, second.weights) == ("/b", "/c", "/w")
    files.put(f"{raw}/", "/batch/raw/", recursive=True)
    for pattern in (f"{memory}/raw/?.zarr", f"{memory}/raw/"):
        jobs = read_manifest(pattern, f"{memory}/w.safetensors", f"{memory}/clean")
        assert names(jobs)[:2] == [("a.zarr", "a.zarr"), ("b.zarr", "b.zarr")]
