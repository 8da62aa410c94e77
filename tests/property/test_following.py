"""A volume that grows by any steps, denoised as it comes and killed in between, gives the bytes of one run."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nrrn_pipeline import InputError, Layout, Options, RunWatch, api, denoise, slab, verify
from nrrn_pipeline.following import Following, follow
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.members import Share
from nrrn_pipeline.planning import Method
from nrrn_pipeline.volume import open_volume, written_slices
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

NOW = Following(every_s=0, settle_s=0)
SIDE = 24
LAYOUT = Layout(chunk=(2, 16, 24), shard=(4, 16, 24), tile=24)


class KilledError(BaseException):
    """As a SIGKILL would, but for the processes."""


class Microscope:
    """Writes slices of a volume, some at a time, into an array that grows."""

    def __init__(self, path: Path, voxels: NDArray[Any], depth: int) -> None:
        self.path, self.voxels = path, voxels
        self.array = zarr.create_array(path, shape=(0, SIDE, SIDE), chunks=(depth, 16, 16), dtype=voxels.dtype)

    def write_up_to(self, stop: int) -> None:
        start = self.array.shape[0]
        if stop > start:
            self.array.resize((stop, SIDE, SIDE))
            self.array[start:stop] = self.voxels[start:stop]


def options(layout: Layout = LAYOUT) -> Options:
    return Options(cluster="serial", device="cpu", layout=layout)


class Denoised:
    """Counts how often each slice is denoised, and dies when it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.slices: Counter[int] = Counter()
        self.left: int | None = None  # slabs until it dies
        original = slab.denoise_voxels

        def count(noisy: Any, task: Any, *rest: Any) -> Any:
            if self.left == 0:
                raise KilledError
            self.left = None if self.left is None else self.left - 1
            keep: Box = task.slab.keep
            if keep.y.start == keep.x.start == 0:
                self.slices.update(range(keep.z.start, keep.z.stop))
            return original(noisy, task, *rest)

        patch.setattr(slab, "denoise_voxels", count)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_following_in_any_steps_and_killed_in_between_gives_the_bytes_of_one_run(data: st.DataObject) -> None:
    slices = data.draw(st.integers(1, 23), label="slices")
    depth = data.draw(st.sampled_from([1, 2, 5]), label="depth of the source's chunks")
    dtype = data.draw(st.sampled_from(["uint8", "float32"]), label="dtype")
    steps = data.draw(st.lists(st.integers(0, slices), max_size=6).map(sorted), label="steps")
    voxels = image_like((slices, SIDE, SIDE), dtype)
    if data.draw(st.booleans(), label="a blank slice"):
        voxels[data.draw(st.integers(0, slices - 1))] = 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        here = Path(folder)
        weights, whole = tiny_weights(here / "w.safetensors"), bare_zarr(here / "whole.zarr", voxels)
        denoise(whole, here / "once.zarr", weights, options())
        microscope, counted = Microscope(here / "raw.zarr", voxels, depth), Denoised(patch)
        killed = 0
        for stop in steps:
            microscope.write_up_to(stop)
            if stop == 0:
                continue  # an array without slices is no volume yet
            counted.left = data.draw(st.none() | st.integers(0, 4), label="slabs before it is killed")
            try:
                follow(microscope.path, here / "out.zarr", weights, options(), NOW)
            except KilledError:
                killed += 1
        counted.left = None
        microscope.write_up_to(slices)
        follow(microscope.path, here / "out.zarr", weights, options(), NOW)
        denoise(microscope.path, here / "out.zarr", weights, options())
        assert stored_chunks(here / "out.zarr/0") == stored_chunks(here / "once.zarr/0")
        grown, once = (zarr.open_array(here / name / "0") for name in ("out.zarr", "once.zarr"))
        assert grown.metadata == once.metadata
        assert np.array_equal(grown[:], once[:])
        assert verify(here / "out.zarr", deep=True) == []
        assert set(counted.slices) == set(range(slices))
        assert max(counted.slices.values()) == 1


def test_an_output_that_was_complete_grows_again_and_its_end_is_done_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = image_like((21, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    counted = Denoised(monkeypatch)
    for stop, expected in ((10, "complete"), (12, None), (14, "growing"), (21, "growing")):
        microscope.write_up_to(stop)
        if expected == "complete":
            denoise(microscope.path, tmp_path / "out.zarr", weights, options())
        else:
            ran = follow(microscope.path, tmp_path / "out.zarr", weights, options(), NOW)
            assert (ran is None) == (expected is None)
        if expected:
            assert api.status(tmp_path / "out.zarr").state == expected
    denoise(microscope.path, tmp_path / "out.zarr", weights, options())
    assert [counted.slices[z] for z in range(21)] == [1] * 8 + [2] * 2 + [1] * 11
    denoise(bare_zarr(tmp_path / "whole.zarr", voxels), tmp_path / "once.zarr", weights, options())
    assert stored_chunks(tmp_path / "out.zarr/0") == stored_chunks(tmp_path / "once.zarr/0")


def test_the_default_cut_is_that_of_a_deep_volume_from_the_start(tmp_path: Path) -> None:
    voxels = image_like((70, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(66)
    follow(microscope.path, tmp_path / "out.zarr", weights, options(Layout()), NOW)
    assert open_volume(tmp_path / "out.zarr").shape == (64, SIDE, SIDE)
    microscope.write_up_to(70)
    denoise(microscope.path, tmp_path / "out.zarr", weights, options(Layout()))
    denoise(bare_zarr(tmp_path / "whole.zarr", voxels), tmp_path / "once.zarr", weights, options(Layout()))
    assert stored_chunks(tmp_path / "out.zarr/0") == stored_chunks(tmp_path / "once.zarr/0")


@pytest.mark.parametrize("keys", [{"name": "default", "separator": "."}, {"name": "v2", "separator": "."}, None])
@pytest.mark.parametrize("lead", [0, 2])
def test_slices_count_as_written_when_a_later_layer_has_begun(tmp_path: Path, keys: Any, lead: int) -> None:
    ones = (1,) * lead
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(*ones, 12, 8, 8), chunks=(*ones, 3, 8, 4), dtype="uint8", chunk_key_encoding=keys
    )
    assert written_slices(open_volume(tmp_path / "a.zarr")) == 0
    for first, expected in ((0, 0), (2, 0), (3, 3), (11, 9)):
        array[..., first : first + 1, :, :] = 1
        assert written_slices(open_volume(tmp_path / "a.zarr")) == expected


def test_slices_that_are_new_wait_until_they_are_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = image_like((20, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(6)
    clock, told = [0.0], []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        microscope.write_up_to(min(20, 6 + int(clock[0])))
        if clock[0] > 40:
            raise KilledError

    monkeypatch.setattr("nrrn_pipeline.following.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("nrrn_pipeline.following.time.sleep", sleep)

    class Watch(RunWatch):
        def looked(self, there: int, done: int) -> None:
            told.append((clock[0], there, done))

    with pytest.raises(KilledError):
        follow(microscope.path, tmp_path / "out.zarr", weights, options(), Following(5, 10), Watch())
    # 6 slices, then one more each second; the last is not counted, and what is counted is 10 s old
    assert told[0] == (0.0, 0, 0)
    assert told[1] == (10.0, 5, 4)
    assert told[2] == (15.0, 10, 8)
    assert told[-1][1:] == (19, 16)

    told.clear()
    with pytest.raises(KilledError):  # begun again, it need not wait for what the first run knew to be there
        follow(microscope.path, tmp_path / "out.zarr", weights, options(), Following(5, 10), Watch())
    assert told[0][1:] == (19, 16)


def test_a_source_that_shrinks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = image_like((12, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(12)
    monkeypatch.setattr("nrrn_pipeline.following.time.sleep", lambda _: microscope.array.resize((10, SIDE, SIDE)))
    for every_s in (1, 0):  # under the run, and between two
        with pytest.raises(InputError, match=r"raw\.zarr has 10 slices, and had 11 before: give what .*out\.zarr was"):
            follow(microscope.path, tmp_path / "out.zarr", weights, options(), Following(every_s, 0))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (Options(roi=Box.parse("0:4,0:8,0:8")), "a region"),
        (Options(overwrite=True), "overwriting"),
        (Options(method=Method(statistics="volume")), "statistics of the volume"),
    ],
)
def test_what_does_not_go_together_with_following_is_refused(tmp_path: Path, asked: Options, named: str) -> None:
    with pytest.raises(InputError, match=f"following and {named}"):
        follow(tmp_path / "raw.zarr", tmp_path / "out.zarr", tmp_path / "w.safetensors", asked, NOW)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), 1e9])
def test_times_that_cannot_be_are_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="is not possible: use 0 s to a week"):
        Following(every_s=seconds)


def test_an_output_begun_otherwise_is_refused_whatever_has_grown(tmp_path: Path) -> None:
    voxels = image_like((12, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(6)
    follow(microscope.path, tmp_path / "out.zarr", weights, options(), NOW)
    microscope.write_up_to(12)
    other = tiny_weights(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(InputError, match="weights sha256 was"):
        follow(microscope.path, tmp_path / "out.zarr", other, options(), NOW)
    with pytest.raises(InputError, match="tile was 24, now 32"):
        denoise(
            microscope.path, tmp_path / "out.zarr", weights, options(Layout((4, 16, 24), (2, 16, 24), (4, 16, 24), 32))
        )


def test_a_finished_output_does_not_grow_unless_it_is_asked_to(tmp_path: Path) -> None:
    voxels = image_like((12, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(6)
    denoise(microscope.path, tmp_path / "out.zarr", weights, options())
    microscope.write_up_to(12)
    with pytest.raises(InputError, match="source shape was"):
        denoise(microscope.path, tmp_path / "out.zarr", weights, options())


def once(tmp_path: Path, voxels: NDArray[Any], weights: Path) -> dict[str, bytes]:
    denoise(bare_zarr(tmp_path / "whole.zarr", voxels), tmp_path / "once.zarr", weights, options())
    return stored_chunks(tmp_path / "once.zarr/0")


def test_members_finish_what_was_followed(tmp_path: Path) -> None:
    voxels = image_like((22, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(10)
    follow(microscope.path, tmp_path / "out.zarr", weights, options(), NOW)
    microscope.write_up_to(22)
    denoise(microscope.path, tmp_path / "out.zarr", weights, replace(options(), share=Share(0, 1)))
    assert stored_chunks(tmp_path / "out.zarr/0") == once(tmp_path, voxels, weights)
    assert api.status(tmp_path / "out.zarr").state == "complete"


def test_a_repair_lets_nothing_count_that_is_not_written_yet(tmp_path: Path) -> None:
    voxels = image_like((32, SIDE, SIDE))
    weights = tiny_weights(tmp_path / "w.safetensors")
    array = zarr.create_array(tmp_path / "raw.zarr", shape=voxels.shape, chunks=(1, 16, 16), dtype="uint8")
    array[:20] = voxels[:20]
    follow(tmp_path / "raw.zarr", tmp_path / "out.zarr", weights, options(), NOW)
    next((tmp_path / "out.zarr/0").glob("c/*/*/*")).unlink()
    assert len(api.repair(tmp_path / "out.zarr", options=options())[0]) == 1
    follow(tmp_path / "raw.zarr", tmp_path / "out.zarr", weights, options(), NOW)
    assert open_volume(tmp_path / "out.zarr").shape[0] == 16
    array[20:] = voxels[20:]
    denoise(tmp_path / "raw.zarr", tmp_path / "out.zarr", weights, options())
    assert stored_chunks(tmp_path / "out.zarr/0") == once(tmp_path, voxels, weights)


def test_slices_that_a_plain_run_met_half_written_are_measured_again(tmp_path: Path) -> None:
    voxels = image_like((21, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(10)
    microscope.array[9, SIDE // 2 :] = 0
    denoise(microscope.path, tmp_path / "out.zarr", weights, options())
    microscope.array[9] = voxels[9]
    microscope.write_up_to(14)
    follow(microscope.path, tmp_path / "out.zarr", weights, options(), NOW)
    microscope.write_up_to(21)
    denoise(microscope.path, tmp_path / "out.zarr", weights, options())
    assert stored_chunks(tmp_path / "out.zarr/0") == once(tmp_path, voxels, weights)


def test_the_last_run_needs_no_layout_and_can_be_run_again(tmp_path: Path) -> None:
    voxels = image_like((22, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(10)
    follow(microscope.path, tmp_path / "out.zarr", weights, options(), NOW)
    microscope.write_up_to(22)
    for _ in range(2):
        denoise(microscope.path, tmp_path / "out.zarr", weights, options(Layout(tile=24)))
    assert stored_chunks(tmp_path / "out.zarr/0") == once(tmp_path, voxels, weights)


def test_growth_that_was_interrupted_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = image_like((22, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(10)
    follow(microscope.path, tmp_path / "out.zarr", weights, options(), NOW)
    microscope.write_up_to(22)

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("nrrn_pipeline.run.create_output", killed)
        with pytest.raises(KilledError):
            denoise(microscope.path, tmp_path / "out.zarr", weights, options())
    assert verify(tmp_path / "out.zarr")[0].endswith("run the same nrrn denoise again")
    with pytest.raises(InputError, match=r"run the same nrrn denoise again$"):
        api.repair(tmp_path / "out.zarr")
    denoise(microscope.path, tmp_path / "out.zarr", weights, options())
    assert stored_chunks(tmp_path / "out.zarr/0") == once(tmp_path, voxels, weights)


def test_a_look_that_meets_torn_metadata_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = image_like((12, SIDE, SIDE))
    weights, microscope = tiny_weights(tmp_path / "w.safetensors"), Microscope(tmp_path / "raw.zarr", voxels, 1)
    microscope.write_up_to(6)
    metadata, notes, looks = microscope.path / "zarr.json", [], iter(range(4))
    whole = metadata.read_bytes()

    def sleep(_: float) -> None:
        look = next(looks, None)
        if look is None:
            raise KilledError
        metadata.write_bytes(whole[:10] if look == 0 else whole)

    class Notes(RunWatch):
        def progressed(self, progress: Any) -> None:
            notes.append(progress.note)

    monkeypatch.setattr("nrrn_pipeline.following.time.sleep", sleep)
    with pytest.raises(KilledError):
        follow(microscope.path, tmp_path / "out.zarr", weights, options(), Following(1, 0), Notes())
    assert [note for note in notes if note.endswith("looking again")]
