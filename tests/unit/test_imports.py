from __future__ import annotations

import subprocess
import sys

import pytest

import nrrn_pipeline

HEAVY = (
    *("PIL", "aiohttp", "botocore", "cryptography", "dask", "distributed", "fsspec", "google_crc32c", "numcodecs"),
    *("psutil", "rich", "s3fs", "skimage", "typer", "xarray", "zarr"),
)
BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
{statement}
"""


def run_without(blocked: tuple[str, ...], statement: str) -> subprocess.CompletedProcess[str]:
    """Run a statement in a new interpreter that lacks some packages."""
    script = BLOCKED.format(blocked=set(blocked), statement=statement)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)


def test_network_and_core_of_training_import_with_torch_and_numpy_alone() -> None:
    statement = "import nrrn_pipeline.network, nrrn_pipeline.training.fit, nrrn_pipeline.training.processes"
    done = run_without(HEAVY, statement)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["zarr", "fsspec"])
def test_a_blocked_package_cannot_be_imported(package: str) -> None:
    assert "ModuleNotFoundError" in run_without(HEAVY, f"import {package}").stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = "import nrrn_pipeline; print({name.partition('.')[0] for name in sys.modules} & %r)"
    done = run_without((), loaded % {*HEAVY, "torch", "numpy"})
    assert done.stdout.strip() == "set()", done.stderr


def test_what_every_command_and_worker_loads_waits_for_nothing_slow_that_few_need() -> None:
    slow = {"matplotlib", "scipy.signal", "scipy.stats", "skimage"}
    done = run_without((), f"import nrrn_pipeline.api, sys; print({slow} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_the_public_names_are_these() -> None:
    assert nrrn_pipeline.__all__ == [
        "Box",
        "Following",
        "InputError",
        "Intake",
        "Layout",
        "Method",
        "Noise",
        "NrrnError",
        "Options",
        "RunError",
        "RunWatch",
        "SlabsFailedError",
        "StorageError",
        "TrainSettings",
        "TrainWatch",
        "TrainingVolume",
        "Yardstick",
        "add_levels",
        "add_noise",
        "align",
        "candidates",
        "compare",
        "denoise",
        "export",
        "export_zarr",
        "follow",
        "import_weights",
        "ingest",
        "measure_drift",
        "open_volume",
        "plan",
        "preview",
        "read_manifest",
        "repair",
        "run_batch",
        "showing_progress",
        "status",
        "train",
        "using_options",
        "verify",
        "write_preview",
        "write_report",
        "write_results",
        "write_training_page",
    ]
    assert dir(nrrn_pipeline) == nrrn_pipeline.__all__


def test_functions_are_not_replaced_by_modules_of_their_name() -> None:
    import nrrn_pipeline.cli

    assert all(callable(getattr(nrrn_pipeline, name)) for name in nrrn_pipeline.__all__)
    assert nrrn_pipeline.cli.app


@pytest.mark.parametrize("name", nrrn_pipeline.__all__)
def test_every_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    found = getattr(nrrn_pipeline, name)
    assert found.__name__ == name
    assert found.__doc__


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'nrrn_pipeline' has no attribute 'denoice'"):
        nrrn_pipeline.denoice  # noqa: B018
