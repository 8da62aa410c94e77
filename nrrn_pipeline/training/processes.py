"""Processes that train one network together, as torchrun starts them. Needs torch alone.

Each takes its share of every batch, and all take the same step: gradients and losses are averaged over all of them. So
all of them know the same, decide alike, and none waits for ever for another. The first one alone writes and tells.
torch's processes do not ask who connects to them: they are for networks whose machines are trusted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from nrrn_pipeline.errors import InputError, LostError

ROOM = 4096  # bytes of a text that is told
PATIENCE = timedelta(hours=1)  # for the slowest to measure its volumes, or for storage to take a checkpoint
LAST_WORDS = timedelta(seconds=10)

_meetings = count()


@dataclass(frozen=True)
class Processes:
    """How many there are, which of them this one is, and the GPU of its machine that is its own; alone unless told."""

    number: int = 1
    rank: int = 0
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one writes and tells."""
        return self.rank == 0

    def own(self, device: torch.device) -> torch.device:
        """This process's device of that kind. Raises InputError if there are fewer GPUs than processes."""
        if self.number == 1 or device.type != "cuda":
            return device
        if self.local_rank >= (gpus := torch.cuda.device_count()):
            raise InputError(
                f"this is process {self.local_rank + 1} of its machine, but torch sees {gpus} GPUs here: use "
                f"--nproc-per-node {gpus}"
            )
        return torch.device("cuda", self.local_rank)

    def share(self, batch: int) -> range:
        """The numbers of those crops of a batch that are this process's. Raises InputError if shares are unequal."""
        if batch % self.number:
            least = batch - batch % self.number or self.number
            raise InputError(
                f"batch {batch} cannot be shared by {self.number} processes: use a multiple of {self.number}, such as "
                f"{least} or {least + self.number}"
            )
        each = batch // self.number
        return range(self.rank * each, (self.rank + 1) * each)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put in each one's place its mean over all processes, the same bits in all. Raises LostError."""
        if self.number == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _while_all_are_there():
            distributed.all_reduce(flat)
        parts = (flat / self.number).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def told(self, text: str, device: torch.device) -> list[str]:
        """What each of them tells here, the first one first, once all have; ROOM at most. Raises LostError."""
        if self.number == 1:
            return [text]
        own = torch.tensor([*text.encode()[:ROOM].ljust(ROOM, b"\0")], dtype=torch.uint8, device=device)
        every = [torch.empty_like(own) for _ in range(self.number)]
        with _while_all_are_there():
            distributed.all_gather(every, own)
        return [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in every]


ALONE = Processes()


def this_process(environment: Mapping[str, str] = os.environ) -> Processes:
    """As torchrun's environment says; without it, alone. Raises InputError if only part of it is there."""
    number = environment.get("WORLD_SIZE", "1")
    if number == "1":
        return ALONE
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    found = {name: environment.get(name, "") for name in names}
    wrong = [f"{name} is {value!r}" for name, value in found.items() if not (value.isascii() and value.isdigit())]
    wrong += [] if environment.get("MASTER_ADDR") else ["MASTER_ADDR is missing"]
    if not wrong and int(found["RANK"]) >= int(number):
        wrong = [f"RANK is {found['RANK']}, of 0 to {int(number) - 1}" if int(number) else "no process can be one of 0"]
    if wrong:
        raise InputError(
            f"WORLD_SIZE {number} asks for several processes, but {', '.join(wrong)}: start them with torchrun, or "
            "unset WORLD_SIZE"
        )
    return Processes(int(number), int(found["RANK"]), int(found["LOCAL_RANK"]))


@contextmanager
def together(device: torch.device) -> Iterator[Processes]:
    """Within the block, all processes that torchrun started, each on its own device of that kind.

    Raises InputError if they cannot be, LostError if they do not come together.
    """
    processes = this_process()
    if processes.number == 1:
        yield processes
        return
    own = processes.own(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    with _while_all_are_there():
        distributed.init_process_group(
            "nccl" if own.type == "cuda" else "gloo",
            store=_meeting_place(),
            rank=processes.rank,
            world_size=processes.number,
            timeout=PATIENCE,
            device_id=own if own.type == "cuda" else None,
        )
    try:
        yield processes
    finally:
        distributed.destroy_process_group()


@cache
def _store() -> Store:
    """Torchrun's, or the first process's."""
    store: Store = next(rendezvous("env://", timeout=PATIENCE))[0]
    return store


def _meeting_place() -> Store:
    """Another one each time: in one process one training may follow another."""
    return PrefixStore(f"nrrn-{next(_meetings)}", _store())


def say_once(say: Callable[[], None], lost: bool = False) -> None:
    """Say what ends all processes of a torchrun, unless another one has said the like; returns once it is said.

    torchrun ends all when the first is gone, so who is to say it is who comes first. lost: others know more of it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        say()
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        agent = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=LAST_WORDS)
        store = PrefixStore(f"nrrn-end-{start}", agent)
        if lost or store.add("saying", 1) > 1:
            store.wait(["said"], LAST_WORDS)
            return
    except RuntimeError:  # the others are gone, or too slow
        say()
        return
    say()
    store.set("said", "")


@contextmanager
def _while_all_are_there() -> Iterator[None]:
    """What torch raises, which says that a connection is closed, in words. Raises LostError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise LostError(f"this process lost the others that it trains with, see what they said ({reason})") from error
