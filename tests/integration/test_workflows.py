"""Each workflow, as a user would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from nrrn_pipeline import Options, denoise, open_volume, verify
from nrrn_pipeline.network import read_header
from tests.servers import ObjectStore
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

WORKFLOWS = Path(__file__).parents[2] / "workflows"
SHAPE = (8, 40, 48)


def run(*words: object, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    environ = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=570, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def workflow(name: str, *words: object, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, WORKFLOWS / name, *words, status=status, **environment)


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE))
    tiny_weights(tmp_path / "w.safetensors")
    denoise(tmp_path / "raw.zarr", tmp_path / "once.zarr", tmp_path / "w.safetensors", Options(cluster="serial"))
    return tmp_path


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("**/*.py")), ids=str)
def test_workflows_are_short(path: Path) -> None:
    no_examples = ("paper_bench.py", "paper_practice.py", "paper_tables.py", "shipped_weights.py")
    is_example = path.parent.name != "demo" and path.name not in no_examples
    assert len(path.read_text().splitlines()) < (60 if is_example else 400)


def test_submit_to_dask(lab: Path) -> None:
    words = (lab / "raw.zarr", lab / "out.zarr", lab / "w.safetensors")
    (lab / "here.toml").write_text('kind = "local"\nworkers = 1\n')
    said = workflow("submit_to_dask.py", *words, lab / "here.toml")
    assert "1 slabs on 1 worker of this machine" in said.stdout
    assert stored_chunks(lab / "out.zarr/0") == stored_chunks(lab / "once.zarr/0")
    assert "1 were done before" in workflow("submit_to_dask.py", *words, "serial").stdout
    assert "cluster 'cloud' is unknown" in workflow("submit_to_dask.py", *words, "cloud", status=1).stderr


def test_batch_on_s3(lab: Path, seaweed: ObjectStore) -> None:
    seaweed.make_bucket("workflow")
    with seaweed.in_use():
        for name in ("a", "b"):
            for path in sorted((lab / "raw.zarr").rglob("*")):
                if path.is_file():
                    seaweed.put("workflow", f"raw/{name}.zarr/{path.relative_to(lab / 'raw.zarr')}", path.read_bytes())
        words = ("s3://workflow/raw/", "s3://workflow/clean/", lab / "w.safetensors")
        environment = {**seaweed.environment, "NRRN_CLUSTER": "serial"}
        first, second = (workflow("batch_on_s3.py", *words, **environment).stdout for _ in range(2))
        assert [line.split()[0] for line in first.splitlines()] == ["done", "done"]
        assert second.count("done before") == 2
        once = zarr.open_array(lab / "once.zarr/0")[:]
        for name in ("a", "b"):
            array = open_volume(f"s3://workflow/clean/{name}.zarr").to_xarray()
            assert np.array_equal(array.values, once)


def test_train_then_denoise(lab: Path) -> None:
    """With fewer steps than the script's own."""
    short = (
        "import sys; sys.path.insert(0, sys.argv[1]); import train_then_denoise as t; "
        "from nrrn_pipeline import Options, TrainSettings; "
        "settings = TrainSettings(units=1, channels=4, steps=3, batch=2, crop=32); "
        "t.main(sys.argv[2], sys.argv[3], settings, Options(cluster='serial'))"
    )
    for _ in range(2):
        said = run(sys.executable, "-c", short, WORKFLOWS, lab / "raw.zarr", lab / "out")
    assert "trained" not in said.stdout  # the weights were there
    assert verify(lab / "out/denoised.zarr", deep=True) == []
    trial, whole = (zarr.open_array(lab / f"out/{name}.zarr/0")[:] for name in ("report/nrrn.ome", "denoised"))
    assert np.array_equal(trial, whole[4:])
    page = (lab / "out/report/index.html").read_text()
    assert "How weights.safetensors was trained" in (lab / "out/report/training.html").read_text()
    assert "gaussian-avg" in page
    assert "How nrrn learned" in page


def test_shipped_weights(tmp_path: Path) -> None:
    """With fewer noises and steps than the script's own."""
    crop = np.load(WORKFLOWS / "demo/fib25_crop.npz")["volume"]
    np.savez(tmp_path / "fib25.npz", volume=crop[:20, :64, :64])
    short = (
        "import sys; sys.path.insert(0, sys.argv[1]); import shipped_weights as s; from pathlib import Path; "
        "from nrrn_pipeline import TrainSettings; s.NOISES = s.NOISES[::6]; "
        "s.SETTINGS['nrrn-fast'] = TrainSettings(units=1, channels=4, steps=3, batch=2, crop=32, loss='clean'); "
        "s.main('nrrn-fast', Path(sys.argv[2]), Path(sys.argv[3]), 'cpu')"
    )
    run(sys.executable, "-c", short, WORKFLOWS, tmp_path / "fib25.npz", tmp_path)
    record = read_header(tmp_path / "nrrn-fast.safetensors")["training"]
    sources = [volume["source"] for volume in record["volumes"]]
    assert sources == ["fib25-5-0.zarr", "fib25-75-0.zarr", "fib25-0-30.zarr"]
    assert "CC BY" in record["source"]
    assert str(tmp_path) not in str(record)


def test_nightly(lab: Path) -> None:
    voxels = image_like(SHAPE)
    array = zarr.create_array(lab / "grow.zarr", shape=(5, 40, 48), chunks=(1, 40, 48), dtype="uint8")
    array[:] = voxels[:5]

    def night(*words: str) -> str:
        volumes = (lab / "grow.zarr", lab / "out.zarr", lab / "w.safetensors")
        return workflow("scheduled_hpc/nightly.py", *volumes, *words, NRRN_CLUSTER="serial").stdout

    assert "no slab is whole yet" in night("--settle", "0")
    array.resize(SHAPE)
    array[5:] = voxels[5:]
    assert "no slab is whole yet" in night("--settle", "0")  # slabs are 64 slices deep
    assert "8 slices are denoised" in night("--last")
    assert np.array_equal(zarr.open_array(lab / "out.zarr/0")[:], zarr.open_array(lab / "once.zarr/0")[:])


def test_paper_tables(tmp_path: Path) -> None:
    crop = np.load(WORKFLOWS / "demo/fib25_crop.npz")["volume"]
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data/flyem_fib25_training_sample1_250.npz", volume=crop[:20, :100, :100])
    words = ("paper_tables.py", tmp_path / "data", tmp_path / "out", "--scale", "test")
    said = workflow(*words).stdout
    assert "Left out: epfl_ca1" in said
    np.savez(tmp_path / "data/epfl_ca1_dev_z000-079_y0800-1503_x0160-0863.npz", volume=crop[:20, 100:200, :100])
    again = workflow(*words, "--only", "table-2,real-noise,transfer").stdout
    assert "trained epfl" in again
    assert "trained fib25" not in again  # it was there
    assert "section 'table-9' is unknown: use table-1" in workflow(*words, "--only", "table-9", status=1).stderr
    tables = (tmp_path / "out/tables.md").read_text()
    for title in (
        "Table 1",
        "FIB-25 by noise",
        "Table 2",
        "Fig. 4",
        "Fig. 5A",
        "Fig. 5C",
        "Fig. S1",
        "Fig. S2",
        "Stitching",
        "EPFL with the noise",
        "Transfer learning",
        "How long",
    ):
        assert title in tables
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert next(iter(found["table-1"])) == "input"
    assert len(found["table-1"]) == 1 + 2 + 9
    noisy = {name: found[f"table-2-{name}"]["input"]["psnr_db"] for name in ("gaussian-10", "gaussian-75", "poisson-1")}
    assert noisy["gaussian-10"] > noisy["gaussian-75"] > noisy["poisson-1"]
    assert found["figure-s1-3"] != found["figure-s1-1"]
    assert [*found["transfer"]] == [
        "input",
        "gaussian-avg",
        "own-fib25",
        *(f"own-{how}-{n}" for how in ("tuned", "anew") for n in (1, 2)),
    ]
    assert found["transfer"]["own-tuned-1"] != found["transfer"]["own-fib25"] != found["transfer"]["own-anew-1"]
    assert [*found["how-long"]][-2:] == ["own-1", "own-2"]
    took = sorted(tmp_path.glob("out/weights/fib25-fresh-*.seconds"))
    assert len(took) == 2
    seconds = float(took[1].read_text())  # of the first run: the second found the weights
    assert f"| own-2 | {seconds} |" in tables
    assert read_header(took[1].with_suffix(".safetensors"))["training"]["seconds"] < seconds
