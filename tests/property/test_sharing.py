"""However many processes share a run, whoever of them comes late, never or dies: the bytes are those of one alone."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrrn_pipeline import Layout, Options, denoise, presence, run, storage, verify
from nrrn_pipeline.members import Member, Share
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.runners import ThreadRunner, run_serially
from nrrn_pipeline.sharing import run_share
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

CHUNK = SHARD = (4, 32, 32)
SLABS = [(4, 32, 32), (4, 64, 96), (8, 32, 64), (12, 64, 96), (4, 32, 96)]
VANISHING = threading.local()  # .now: this thread's member does not clean up when it leaves


class DiedError(Exception):
    """What a test has done to a member."""


@dataclass(frozen=True)
class Life:
    """Of one member: after how many slabs it dies, if ever; whether it leaves its files then; its slabs in flight."""

    dies_after: int | None = None
    vanishes: bool = False
    at_once: int = 2

    def reaches_the_end(self, plan: Any, share: Share) -> bool:
        runner = run_serially if self.at_once == 1 else ThreadRunner(self.at_once)
        done, VANISHING.now = 0, False
        try:
            with closing(run_share(plan, share, runner, "cpu")) as run:
                for progress in run:
                    done += progress.record is not None
                    if self.dies_after is not None and done >= self.dies_after:
                        VANISHING.now = self.vanishes
                        raise DiedError
        except DiedError:
            return False
        return True


LIVES = st.builds(Life, st.none() | st.integers(0, 5), vanishes=st.booleans(), at_once=st.integers(1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a volume, weights, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("sharing")
    bare_zarr(folder / "raw.zarr", image_like((12, 64, 96)), chunks=(4, 32, 32))
    tiny_weights(folder / "w.safetensors")
    options = Options(layout=Layout(chunk=CHUNK, shard=SHARD), cluster="serial", device="cpu")
    denoise(folder / "raw.zarr", folder / "alone.zarr", folder / "w.safetensors", options)
    return folder


@contextmanager
def noted() -> Iterator[Counter[str]]:
    """How often each slab is denoised; members look often what others do."""
    denoised, lock, leave, real = Counter[str](), threading.Lock(), Member.leave, run.denoise_slab

    def denoise_slab(plan: Any, device: str, task: Any, keeping: Any) -> Any:
        with lock:
            denoised[task.slab.key] += 1
        return real(plan, device, task, keeping)

    def leave_or_vanish(member: Member) -> None:
        if VANISHING.now:
            member.presence.end()  # others in this process take it for one that has ended
        else:
            leave(member)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "denoise_slab", denoise_slab)
        patch.setattr(Member, "leave", leave_or_vanish)
        patch.setattr(presence, "LOOK_S", 0.01)
        patch.setattr(presence, "RENEW_S", 0.05)
        yield denoised


@given(lives=st.lists(st.none() | LIVES, min_size=1, max_size=5), slab=st.sampled_from(SLABS), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_members_in_any_order_give_the_bytes_of_one_alone(
    folder: Path, lives: list[Life | None], slab: tuple[int, int, int], data: st.DataObject
) -> None:
    output = folder / f"{uuid.uuid4().hex}.zarr"
    shares = [Share(number, len(lives)) for number in range(len(lives))]
    options = Options(layout=Layout(slab=slab, chunk=CHUNK, shard=SHARD), device="cpu", share=shares[0])
    plan = make_plan(folder / "raw.zarr", output, folder / "w.safetensors", options)
    started = [(life, share) for life, share in zip(lives, shares, strict=True) if life]  # the others are in a queue
    order = data.draw(st.permutations(started))
    with noted() as denoised, ThreadPoolExecutor(len(lives)) as pool:
        reached = [pool.submit(life.reaches_the_end, plan, share) for life, share in order]
        if not any(future.result() for future in reached):  # then one more is started, and does
            assert Life().reaches_the_end(plan, shares[0])
    assert stored_chunks(output / "0") == stored_chunks(folder / "alone.zarr/0")
    assert verify(output, deep=True) == []
    if all(future.result() for future in reached):
        assert denoised == Counter(slab.key for slab in plan.slabs), "each slab once"
    for left in ("members", "claims", "measured", "failed"):
        assert not storage.list_sizes(f"{output}/0/nrrn/{left}"), left
