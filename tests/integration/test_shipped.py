"""Weights that come with the package: known by name, each with its card, and of the data that they may be made from."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nrrn_pipeline import Options, TrainSettings, denoise, open_volume, repair, train
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import bytes_hash, parse_header
from nrrn_pipeline.shipped import SHIPPED, located, model_card, read_weights
from nrrn_pipeline.volume import get_provenance, read_box
from tests.commands import Nrrn
from tests.support import bare_zarr, image_like

SERIAL = Options(cluster="serial")


def test_small_weights_are_shipped() -> None:
    assert "nrrn-fast" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_each_has_a_card_and_a_record_that_name_its_data_and_its_limits(name: str) -> None:
    header, card = parse_header(read_weights(name), name), model_card(name)
    record = header["training"]
    assert "CC BY" in record["source"]
    assert {volume["clean"] for volume in record["volumes"]} == {"fib25.zarr"}
    assert str(Path.home()) not in str(record)
    assert card.startswith(f"# {name}\n")
    for heading in ("Data", "Training", "Measures", "Limits"):
        assert f"\n## {heading}\n" in card
    assert f"{header['units']} units, {header['channels']} channels" in card
    assert f"{record['steps_taken']:,} steps" in card
    assert bytes_hash(read_weights(name))[:12] in card


def test_a_name_stays_a_name_and_a_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SHIPPED[0]).write_bytes(b"another")
    assert located(SHIPPED[0]) == SHIPPED[0]
    assert located(f"./{SHIPPED[0]}") == str(tmp_path / SHIPPED[0])
    assert read_weights(located(f"./{SHIPPED[0]}")) == b"another"
    with pytest.raises(InputError, match=rf"no weights at .*nrrn-fats: .* shipped: {', '.join(SHIPPED)}"):
        read_weights(located("nrrn-fats"))


def test_a_volume_is_denoised_and_repaired_by_name(tmp_path: Path) -> None:
    source = bare_zarr(tmp_path / "raw.zarr", image_like((4, 40, 40)))
    output = tmp_path / "out.zarr"
    summary = denoise(source, output, SHIPPED[0], SERIAL)
    assert summary.done == 1
    made = get_provenance(str(output))
    assert made is not None
    assert made["weights"] == SHIPPED[0]
    volume = open_volume(output)
    before = read_box(volume, volume.box)
    (shard,) = (file for file in (output / "0" / "c").rglob("*") if file.is_file())
    shard.write_bytes(shard.read_bytes()[:-9])
    _, again = repair(output, options=SERIAL)
    assert again is not None
    assert again.done == 1
    np.testing.assert_array_equal(read_box(volume, volume.box), before)


def test_training_goes_on_from_a_name(tmp_path: Path) -> None:
    source = bare_zarr(tmp_path / "raw.zarr", image_like((6, 20, 20)))
    settings = TrainSettings(start=SHIPPED[0], steps=1, batch=1, crop=16, loss="adjacent")
    record = train(source, tmp_path / "w.safetensors", settings)
    assert record["settings"]["start"] == SHIPPED[0]
    header = parse_header(read_weights(SHIPPED[0]), SHIPPED[0])
    assert record["settings"]["units"] == header["units"]


def test_a_manifest_may_name_them(tmp_path: Path, nrrn: Nrrn) -> None:
    bare_zarr(tmp_path / "raw.zarr", image_like((4, 40, 40)))
    (tmp_path / "jobs.csv").write_text(f"source,output,weights\nraw.zarr,out.zarr,{SHIPPED[0]}\n")
    said = nrrn("batch", tmp_path / "jobs.csv", "--cluster", "serial")
    assert said.status == 0, said.err
    assert get_provenance(str(tmp_path / "out.zarr"))


def test_they_are_listed_described_and_read_of(nrrn: Nrrn) -> None:
    listed = nrrn("weights", "list").out.splitlines()
    assert [line.partition(":")[0] for line in listed] == [*SHIPPED]
    assert re.fullmatch(r"nrrn-fast: \d units, \d+ channels; .+", listed[SHIPPED.index("nrrn-fast")])
    assert nrrn("weights", "card", SHIPPED[0]).out == f"{model_card(SHIPPED[0])}\n"
    assert "sha256" in nrrn("info", SHIPPED[0]).out
    unknown = nrrn("weights", "card", "best")
    assert unknown.status == 2
    assert f"no weights 'best' are shipped: use {', '.join(SHIPPED)}" in unknown.err
