from __future__ import annotations

from typing import Any

import pytest

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.ome import Level, image_attributes, read_levels

SPACE = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
LEVEL = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [8.0, 4.0, 4.0]}]}


def attributes(**changes: Any) -> dict[str, Any]:
    """Sound metadata of one level, but for the changes."""
    return {"ome": {"version": "0.5", "multiscales": [{"axes": SPACE, "datasets": [LEVEL]} | changes]}}


def transformed(*steps: Any) -> list[dict[str, Any]]:
    return [LEVEL | {"coordinateTransformations": list(steps)}]


@pytest.mark.parametrize("in_nm", [True, False])
@pytest.mark.parametrize("origin", [(0.0, 0.0, 0.0), (80.0, -4.0, 0.125)])
@pytest.mark.parametrize("axes", ["zyx", "czyx", "tczyx", "tzyx"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_written_metadata_reads_back_equal(
    axes: str, origin: tuple[float, float, float], in_nm: bool, zarr_format: int
) -> None:
    level = Level("0", tuple(axes), (8.0, 4.0, 4.5), origin, in_nm)
    assert read_levels(image_attributes("name", level, zarr_format)) == (level,)


def test_sizes_without_units_are_kept_whatever_their_magnitude() -> None:
    level = Level("0", ("z", "y", "x"), (8e-9, 4e-9, 4.5e-9), (0.0, 0.0, 1.25e-8), in_nm=False)
    assert read_levels(image_attributes("name", level)) == (level,)


@pytest.mark.parametrize(
    ("unit", "nm"),
    [("angstrom", 0.1), ("nanometer", 1.0), ("Nanometer", 1.0), ("micrometer", 1e3), ("millimeter", 1e6)],
)
def test_units_become_nm(unit: str, nm: float) -> None:
    axes = [axis | {"unit": unit} for axis in SPACE]
    (level,) = read_levels(attributes(axes=axes))
    assert level.in_nm
    assert level.voxel_size == pytest.approx((8 * nm, 4 * nm, 4 * nm))


@pytest.mark.parametrize("unit", [{}, {"unit": None}, {"unit": "furlong"}], ids=str)
def test_one_axis_without_a_known_unit_leaves_all_sizes_as_they_are(unit: dict[str, Any]) -> None:
    axes = [{"name": "z", "type": "space", "unit": "micrometer"}, {"name": "y", **unit}, {"name": "x", **unit}]
    (level,) = read_levels(attributes(axes=axes))
    assert not level.in_nm
    assert level.voxel_size == (8.0, 4.0, 4.0)


def test_0_4_metadata_stands_at_the_top_of_the_attributes() -> None:
    (level,) = read_levels({"multiscales": [{"version": "0.4", "axes": SPACE, "datasets": [LEVEL]}]})
    assert level == Level("0", ("z", "y", "x"), (8.0, 4.0, 4.0), (0.0, 0.0, 0.0), in_nm=True)


def test_a_scale_after_a_translation_scales_the_origin_too() -> None:
    steps = {"type": "translation", "translation": [1, 2, 3]}, {"type": "scale", "scale": [8, 4, 4]}
    (level,) = read_levels(attributes(datasets=transformed(*steps)))
    assert level.origin == (8.0, 8.0, 12.0)


def test_levels_come_in_the_file_s_order() -> None:
    datasets = [LEVEL, *transformed({"type": "scale", "scale": [8.0, 8.0, 8.0]})]
    sizes = [level.voxel_size for level in read_levels(attributes(datasets=datasets))]
    assert sizes == [(8.0, 4.0, 4.0), (8.0, 8.0, 8.0)]


@pytest.mark.parametrize("found", [{}, {"ome": {}}, {"multiscales": []}, {"labels": ["a"]}], ids=str)
def test_attributes_without_an_image_have_no_levels(found: dict[str, Any]) -> None:
    assert read_levels(found) == ()


@pytest.mark.parametrize(
    "damaged",
    [
        {"ome": "yes"},
        {"ome": None},
        {"ome": {"multiscales": {"axes": SPACE}}},
        {"ome": {"multiscales": 3}},
        {"ome": {"multiscales": [None]}},
        {"ome": {"multiscales": ["0"]}},
        {"ome": {"multiscales": [{"axes": SPACE}]}},
        attributes(axes=None),
        attributes(axes=[{"type": "space"}] * 3),
        attributes(axes=SPACE[1:]),
        attributes(datasets=None),
        attributes(datasets=[{"coordinateTransformations": []}]),
        attributes(datasets=transformed({"scale": [8, 4, 4]})),
        attributes(datasets=transformed({"type": "scale"})),
        attributes(datasets=transformed({"type": "scale", "scale": [4, 4]})),
        attributes(datasets=transformed({"type": "scale", "scale": ["a", "b", "c"]})),
        attributes(datasets=transformed({"type": "scale", "scale": [8, 4, 0]})),
        attributes(datasets=transformed({"type": "scale", "scale": [8, 4, -4]})),
        attributes(datasets=transformed({"type": "scale", "scale": [8, 4, float("nan")]})),
        attributes(datasets=transformed({"type": "translation", "translation": [0.0]})),
        attributes(datasets=transformed("scale")),
    ],
    ids=str,
)
def test_damaged_metadata_is_refused(damaged: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="multiscales metadata is damaged"):
        read_levels(damaged)
