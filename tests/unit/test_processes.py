"""What each of the processes that train together does and says; how they train is in test_training_together.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed import TCPStore

from nrrn_pipeline import InputError, TrainSettings, train
from nrrn_pipeline.network import KINDS
from nrrn_pipeline.training import processes
from nrrn_pipeline.training.fit import Training
from nrrn_pipeline.training.processes import ALONE, Processes, say_once, this_process
from tests.crops import crops_of
from tests.support import bare_zarr, image_like

TINY = TrainSettings(units=1, channels=4, steps=2, batch=4, crop=12, device="cpu", loss="adjacent")
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_shares_are_equal_and_make_up_the_batch(number: int) -> None:
    shares = [Processes(number, rank).share(6) for rank in range(number)]
    assert [crop for share in shares for crop in share] == [*range(6)]
    assert {len(share) for share in shares} == {6 // number}


@pytest.mark.parametrize(("batch", "number", "possible"), [(7, 2, "6 or 8"), (1, 3, "3 or 6"), (8, 3, "6 or 9")])
def test_a_batch_that_cannot_be_shared_is_refused(batch: int, number: int, possible: str) -> None:
    with pytest.raises(
        InputError,
        match=f"batch {batch} cannot be shared by {number} processes: use a multiple of {number}, such as {possible}",
    ):
        Training(replace(TINY, batch=batch), processes=Processes(number))


def test_the_crops_of_all_processes_are_those_of_one(tmp_path: Path) -> None:
    from nrrn_pipeline.training.material import Material
    from nrrn_pipeline.training.triplets import triplets
    from nrrn_pipeline.volume import open_volume

    volume = open_volume(bare_zarr(tmp_path / "source.zarr", image_like((18, 20, 20))))
    alone = crops_of(volume, TINY)
    shares = [triplets([Material(volume, volume.box)], TINY, Processes(2, rank)) for rank in range(2)]
    assert torch.equal(torch.cat([next(share.batches(1)) for share in shares]), next(alone.batches(1)))
    assert torch.equal(torch.cat([share.validation(2)[1] for share in shares]), alone.validation(2)[1])


@pytest.mark.parametrize("network", KINDS)
def test_networks_that_normalise_batches_are_refused_in_several_processes_and_no_others(network: str) -> None:
    settings = replace(TINY, network=network, units=2, loss="blind-spot")
    if any(isinstance(module, nn.BatchNorm2d) for module in Training(settings).network.modules()):
        with pytest.raises(InputError, match=f"network {network} is not possible in 2 processes"):
            Training(settings, processes=Processes(2))
    else:
        Training(settings, processes=Processes(2))


def test_torchrun_says_which_process_this_is() -> None:
    assert this_process(TORCHRUN) == Processes(number=4, rank=3, local_rank=1)
    assert this_process({}) == this_process({**TORCHRUN, "WORLD_SIZE": "1"}) == ALONE
    assert [Processes(2, rank).is_first for rank in range(2)] == [True, False]


@pytest.mark.parametrize("name", sorted(TORCHRUN.keys() - {"WORLD_SIZE"}))
def test_part_of_torchruns_environment_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"several processes, but {name} is .*start them with torchrun, or unset"):
        this_process({of: value for of, value in TORCHRUN.items() if of != name})


@pytest.mark.parametrize("number", ["two", "-2", ""])
def test_a_number_of_processes_that_is_none_is_refused(number: str) -> None:
    with pytest.raises(InputError, match="WORLD_SIZE is"):
        this_process({**TORCHRUN, "WORLD_SIZE": number})


@pytest.mark.parametrize(("number", "why"), [("0", "no process can be one of 0"), ("3", "RANK is 3, of 0 to 2")])
def test_a_process_beyond_their_number_is_refused(number: str, why: str) -> None:
    with pytest.raises(InputError, match=f"but {why}: start them with torchrun"):
        this_process({**TORCHRUN, "WORLD_SIZE": number})


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert Processes(4, 3, 1).own(gpu) == torch.device("cuda:1")
    assert Processes(4, 3, 3).own(cpu) == cpu
    assert ALONE.own(gpu) == gpu
    with pytest.raises(InputError, match=r"process 3 of its machine, but torch sees 2 GPUs.*--nproc-per-node 2"):
        Processes(4, 2, 2).own(gpu)


def test_without_torchrun_no_processes_are_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "all_reduce", "all_gather", "destroy_process_group"):
        monkeypatch.delattr(distributed, name)
    monkeypatch.delattr(processes, "rendezvous")
    source = bare_zarr(tmp_path / "source.zarr", image_like((6, 16, 16)))
    assert train(source, tmp_path / "w.safetensors", TINY)["processes"] == 1


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """What torchrun keeps for its processes, as which this one goes from now on."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "LAST_WORDS", timedelta(seconds=1))
    return store


@pytest.mark.usefixtures("agent")
def test_of_all_processes_that_fail_one_says_it_once_for_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    for process in range(3):
        say_once(lambda process=process: said.append(process))  # type: ignore[misc]
    say_once(lambda: said.append(3), lost=True)
    assert said == [0]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    say_once(lambda: said.append(4))
    assert said == [0, 4]


@pytest.mark.usefixtures("agent")
def test_that_others_are_lost_is_said_only_if_they_say_nothing_themselves() -> None:
    said: list[str] = []
    say_once(lambda: said.append("lost"), lost=True)
    assert said == ["lost"]


def test_what_goes_wrong_is_said_though_torchrun_is_gone(agent: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("MASTER_PORT", "1")
    say_once(lambda: said.append("no agent"))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    say_once(lambda: said.append("alone"))
    say_once(lambda: said.append("alone again"), lost=True)
    assert said == ["no agent", "alone", "alone again"]
