"""Settings of clusters in TOML: each kind, and every wrong key named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nrrn_pipeline import Options
from nrrn_pipeline.cluster import (
    AddressSettings,
    ClusterSettings,
    JobQueueSettings,
    LocalSettings,
    LsfSettings,
    PbsSettings,
    SgeSettings,
    SlurmSettings,
    SshSettings,
    load_settings,
)
from nrrn_pipeline.errors import InputError

JOBS = 'workers = 4\ncores = 8\nmemory = "16GB"\nwalltime = "2:00:00"\n'
OF_JOBS = {"workers": 4, "cores": 8, "memory": "16GB", "walltime": "2:00:00"}
ALL = """
kind = "slurm"
workers = 4
cores = 8
memory = "16GiB"
gpus = 1
walltime = "1-12:00:00"
queue = "gpu"
account = "lab"
keys = "/shared/keys"
shared_directory = "/shared"
interface = "ib0"
log_directory = "/shared/logs"
python = "/opt/nrrn/bin/python"
prologue = ["module load cuda", "ulimit -n 4096"]
directives = ["--constraint=a100"]
stop_before = 600
grace = 25
replacements = 3
patience = 3600
"""


def toml(folder: Path, text: str) -> Path:
    file = folder / "cluster.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('kind = "local"', LocalSettings()),
        ('kind = "local"\nworkers = 3', LocalSettings(workers=3)),
        ('kind = "address"\naddress = "tls://h:1"', AddressSettings(address="tls://h:1")),
        (f'kind = "slurm"\n{JOBS}', SlurmSettings(**OF_JOBS)),
        (f'kind = "pbs"\n{JOBS}', PbsSettings(**OF_JOBS)),
        (f'kind = "lsf"\n{JOBS}', LsfSettings(**OF_JOBS)),
        (f'kind = "sge"\n{JOBS}', SgeSettings(**OF_JOBS)),
        ('kind = "ssh"\nhosts = ["h"]\nkeys = "k"\ncores = 2', SshSettings(hosts=("h",), keys="k", cores=2)),
        (f'kind = "sge"\n{JOBS}gpu_resource = "ngpus"', SgeSettings(**OF_JOBS, gpu_resource="ngpus")),
    ],
)
def test_a_file_describes_a_cluster_of_each_kind(text: str, expected: ClusterSettings, tmp_path: Path) -> None:
    file = toml(tmp_path, text)
    assert load_settings(file) == expected
    assert Options(cluster=str(file)).cluster_settings == expected


def test_every_setting_of_jobs_is_read(tmp_path: Path) -> None:
    settings = load_settings(toml(tmp_path, ALL))
    assert isinstance(settings, SlurmSettings)
    assert settings.walltime_s == 36 * 3600
    assert settings.stop_s == 600
    assert set(ALL.replace("=", " ").split()) >= set(SlurmSettings.model_fields)
    assert not {name for name in SlurmSettings.model_fields if name not in settings.model_fields_set}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "kind"),
        ('kind = "slrm"', "'slrm'.*'slurm', 'pbs', 'lsf', 'sge'"),
        ('kind = "slurm"', "workers: .*; cores: .*; memory: .*; walltime: "),
        (f'kind = "slurm"\n{JOBS}partition = "gpu"', "partition: it is unknown"),
        (f'kind = "slurm"\n{JOBS}parallel_environment = "smp"', "parallel_environment: it is unknown"),
        (f'kind = "slurm"\n{JOBS.replace("4", "0")}', "workers: .*greater than or equal to 1"),
        (f'kind = "slurm"\n{JOBS.replace("8", "0")}', "cores: .*greater than or equal to 1"),
        (f'kind = "slurm"\n{JOBS.replace("16GB", "16")}', "memory: '16' is no amount of memory: give such as 16GB"),
        (f'kind = "slurm"\n{JOBS.replace("16GB", "0GB")}', "memory: '0GB' is no amount"),
        (f'kind = "slurm"\n{JOBS.replace("16GB", "lots")}', "memory: 'lots' is no amount"),
        (f'kind = "slurm"\n{JOBS.replace("2:00:00", "2:00")}', "walltime: '2:00' is no time .*such as 2:00:00"),
        (f'kind = "slurm"\n{JOBS.replace("2:00:00", "2 hours")}', "walltime: '2 hours' is no time"),
        (f'kind = "slurm"\n{JOBS.replace("2:00:00", "0:00:59")}', "walltime: '0:00:59' is no time of a minute"),
        (f'kind = "slurm"\n{JOBS}gpus = 4', "gpus 4: a worker uses one; ask for one, and for more workers"),
        (f'kind = "slurm"\n{JOBS}stop_before = 7200', "stop_before 7200 leaves nothing of the walltime 2:00:00"),
        (f'kind = "slurm"\n{JOBS}queue = "gpu\\n#SBATCH -w n1"', "queue: .*is not one word"),
        (f'kind = "slurm"\n{JOBS}directives = ["-w n1\\nrm"]', r"directives\.0: .*more than one line"),
        (f'kind = "slurm"\n{JOBS}replacements = 0', "replacements: "),
        (f'kind = "slurm"\n{JOBS}patience = -1', "patience: "),
        ('kind = "ssh"\nhosts = []\nkeys = "k"\ncores = 2', "hosts: "),
        ('kind = "ssh"\nhosts = ["a b"]\nkeys = "k"\ncores = 2', r"hosts\.0: 'a b' is no host"),
        ('kind = "ssh"\nhosts = ["h"]\ncores = 2', "keys: "),
        ('kind = "ssh"\nhosts = ["h"]\nkeys = "k"\ncores = 2\ngpus = 2', "workers 1, gpus 2: a worker uses one GPU"),
        ('kind = "local"\nworkers = 0', "workers: "),
        ("kind = ", r"cluster\.toml cannot be read"),
    ],
)
def test_what_a_file_has_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(InputError, match=message) as found:
        load_settings(file)
    assert str(file) in str(found.value)
    assert "pydantic" not in str(found.value)
    assert "Value error" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "stop_s"),
    [
        ({}, 300),
        ({"walltime": "0:10:00"}, 60),
        ({"walltime": "0:01:00"}, 6),
        ({"stop_before": 0}, 0),
        ({"stop_before": 7199}, 7199),
    ],
)
def test_workers_stop_a_tenth_before_their_end_and_five_minutes_at_most(changes: dict[str, Any], stop_s: int) -> None:
    assert SlurmSettings(**OF_JOBS | changes).stop_s == stop_s


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(SlurmSettings, "36:05:09"), (PbsSettings, "36:05:09"), (SgeSettings, "36:05:09"), (LsfSettings, "36:05")],
)
def test_each_system_is_told_the_walltime_in_its_own_way(settings: type[JobQueueSettings], expected: str) -> None:
    asked = settings(**OF_JOBS | {"walltime": "1-12:05:09"}).asked()
    assert asked["walltime"] == expected


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SlurmSettings(**OF_JOBS).workers = 5
