"""The images and Dask's settings in them: what can be known of both without a container engine."""

from __future__ import annotations

import copy
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import distributed
import jsonschema
import pytest
import yaml
from dask.config import merge
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nrrn_pipeline.cluster.base import process_environment
from nrrn_pipeline.cluster.kubernetes_settings import USER
from tests.unit.test_deploy import DEPLOY, ROOT, closed

DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DASK = DEPLOY / "dask" / "nrrn.yaml"


def instructions(word: str) -> list[str]:
    """What follows one kind of instruction, continued lines joined, comments left out."""
    lines = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", "").splitlines()
    return [line.partition(" ")[2].strip() for line in lines if line.startswith(f"{word} ")]


def test_the_dockerfile_has_no_fault_that_is_known() -> None:
    command = [Path(sys.executable).parent / "hadolint", "--no-color", "-"]
    done = subprocess.run(command, input=DOCKERFILE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_there_are_two_images_that_end_as_one() -> None:
    stages = {name: base for base, name in (each.split(" AS ") for each in instructions("FROM"))}
    assert {name for name, base in stages.items() if base == "runtime"} == {"cpu", "cuda"}
    assert all(base in stages or re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base) for base in stages.values())
    # the same Python in all stages: the environment that is copied names it, and the lock is for it
    (python,) = {base for base in stages.values() if base not in stages}
    assert python.startswith("python:3.11.")
    assert instructions("ENTRYPOINT") == ['["nrrn"]']
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert instructions("USER") == [f"{USER}:{USER}"]
    assert any(f"useradd --uid {USER} " in each for each in instructions("RUN"))
    assert {"HOME=/tmp", "TMPDIR=/tmp", "PYTHONDONTWRITEBYTECODE=1"} <= {
        word for each in instructions("ENV") for word in each.split()
    }


def is_ignored(path: str) -> bool:
    """As .dockerignore says: the last line that matches the path, or a folder of its, decides."""
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#"):
            names = parts if "**/" in line else above
            if any(fnmatch.fnmatchcase(each, pattern) for each in names):
                ignored = not line.startswith("!")
    return ignored


def copied() -> list[str]:
    return [word for each in instructions("COPY") if "--from" not in each for word in each.split()[:-1]]


@pytest.mark.parametrize("source", sorted({*copied()}))
def test_what_is_copied_is_there_and_reaches_the_builder(source: str) -> None:
    assert (ROOT / source).exists()
    assert not is_ignored(source)


def test_all_that_the_package_is_built_from_is_copied_and_nothing_else_reaches_the_builder() -> None:
    project = PROJECT["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "nrrn_pipeline"} <= {*copied()}
    assert not is_ignored("nrrn_pipeline/DESIGN.md")
    private = ("keys/key.pem", ".git/config", ".venv/bin/python", "demo/x.zarr", "tests/conftest.py", "storage.env")
    assert all(is_ignored(each) for each in (*private, "nrrn_pipeline/__pycache__/api.cpython-311.pyc"))


def test_versions_are_those_of_the_project() -> None:
    (uv,) = re.findall(r"uv==(\S+)", DOCKERFILE)
    assert f"UV_VERSION = {uv}\n" in (ROOT / "Makefile").read_text()
    version = PROJECT["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in DOCKERFILE
    assert f'org.opencontainers.image.licenses="{PROJECT["project"]["license"]}"' in DOCKERFILE
    assert len(re.findall(r"^torch==[0-9.]+$", LOCK, re.MULTILINE)) == 1  # what grep hands to uv
    for path in (DEPLOY / "kubernetes").iterdir():
        assert set(re.findall(r"example/nrrn:([0-9.]+)", path.read_text())) <= {version}


def test_all_that_an_image_installs_is_locked() -> None:
    """What pyproject.toml and the image's extra need, and need in turn: a constraint does not add what it lacks."""
    (extra,) = {each for run in instructions("RUN") for each in re.findall(r"--extra (\S+)", run)}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"][extra]]
    locked = {line.partition("==")[0] for line in LOCK.splitlines() if "==" in line}
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        for each in ("", *requirement.extras):
            if (requirement.name, each) not in seen:
                seen.add((requirement.name, each))
                found = distribution(requirement.name).requires or []
                wanted += [line for line in found if _holds(Requirement(line), each)]
    assert len({name for name, _ in seen}) > 60
    names = {str(canonicalize_name(name)) for name, _ in seen}
    # these come with the CUDA build alone, at the versions that it names itself
    assert not {name for name in names - locked if not name.startswith(("nvidia-", "cuda-", "triton"))}


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def check(settings: dict[str, Any]) -> None:
    """Raise jsonschema.ValidationError unless Dask's schema names all of the settings, after its own are added."""
    schema = closed(yaml.safe_load((Path(distributed.__file__).parent / "distributed-schema.yaml").read_text()))
    jsonschema.Draft202012Validator(schema).validate(merge(DEFAULTS, settings))


def leaves(value: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*where, key))
    else:
        yield where, value


def at(value: Any, where: tuple[str, ...]) -> Any:
    for key in where:
        value = value.get(key)
    return value


SETTINGS = yaml.safe_load(DASK.read_text())
DEFAULTS = yaml.safe_load((Path(distributed.__file__).parent / "distributed.yaml").read_text())
VARIABLES = ("distributed", "nanny", "pre-spawn-environ")


def test_dask_knows_each_of_its_settings() -> None:
    assert [*SETTINGS] == ["distributed"]  # what lies beside it is others'
    check(SETTINGS)
    for where, _ in leaves(SETTINGS):
        if where[:3] != VARIABLES:
            at(DEFAULTS, where[:-1])[where[-1]]  # KeyError: Dask reads no such setting


# but for environment variables, which may have any name
PLACES = {where[:n] for where, _ in leaves(SETTINGS) for n in range(1, len(where))} - {VARIABLES}


@pytest.mark.parametrize("where", sorted(PLACES))
def test_a_typo_in_a_setting_of_dask_is_caught(where: tuple[str, ...]) -> None:
    wrong = copy.deepcopy(SETTINGS)
    at(wrong, where)["typo"] = "5 minutes"
    with pytest.raises(jsonschema.ValidationError, match="typo"):
        check(wrong)


@pytest.mark.parametrize(("where", "value"), [*leaves(SETTINGS)])
def test_each_setting_of_dask_differs_from_its_own(where: tuple[str, ...], value: Any) -> None:
    assert value != at(DEFAULTS, where)


def test_each_setting_of_dask_has_its_reason() -> None:
    lines = DASK.read_text().splitlines()
    explained = False
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.lstrip().startswith("#"):
            explained = True
        elif not line.strip() or line.endswith(":"):
            explained = explained and bool(line.strip())
        else:
            assert explained, line
            # those of one reason lie together
            explained = after.startswith(line[: len(line) - len(line.lstrip())] + after.lstrip()[:1])


def test_the_allocator_is_that_of_the_workers_that_we_start() -> None:
    assert {**at(SETTINGS, VARIABLES), "OMP_NUM_THREADS": "3"} == process_environment(3)
