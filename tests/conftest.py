"""Before torch is imported, here and in every process that tests start; object stores and Slurm for a session."""

import os
from collections.abc import Iterator

import pytest

from tests.servers import ObjectStore, moto, seaweedfs
from tests.slurm import Slurm, slurm_cluster

# tests' tensors are small: a second thread saves nothing, and while it waits it spins on a core that a worker needs
os.environ["OMP_NUM_THREADS"] = "1"
for name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[name]  # tests see nothing of the machine's own cloud


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[ObjectStore]:
    with moto() as store:
        yield store


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as there, there.in_use():
        yield there


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More threads only slow such small networks down."""
    import torch  # not sooner: see above

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
