"""How a network runs: in halves where memory ends, in a faster precision where that changes next to nothing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._dynamo.testing import CompileCounter

from nrrn_pipeline import Layout, Method, Options, open_volume
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.network import Architecture, DenoisingNetwork, cpu_lanes, fastest_in_slot, in_lanes, in_slot
from nrrn_pipeline.network.nrrn import unit_step, unit_step_in_place
from nrrn_pipeline.network.slot import CompiledStep
from nrrn_pipeline.planning import plan_denoise
from nrrn_pipeline.preparing import describe_weights, make_plan
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import run_serially
from nrrn_pipeline.slab import WORST_LEVELS, SlabTask, denoise_voxels, load_network, sample_of
from nrrn_pipeline.statistics import measure_box, merge_boxes
from nrrn_pipeline.volume import read_box
from tests.support import bare_zarr, image_like, tiny_network, tiny_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def stack_of(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[DenoisingNetwork, int], list[int]]:
    """A network's memory suffices for so many pixels; the sizes that it was asked for."""

    def shorten(network: DenoisingNetwork, most: int) -> list[int]:
        asked, original = [], network.denoise

        def denoise(stack: torch.Tensor, *rest: object) -> torch.Tensor:
            asked.append(stack.shape[1] * stack.shape[2])
            if asked[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(stack, *rest)

        monkeypatch.setattr(network, "denoise", denoise)
        return asked

    return shorten


@pytest.mark.parametrize("kind", ["nrrn", "denoisenet", "unet"])
@pytest.mark.parametrize("shape", [(50, 61), (70, 33), (23, 120)])
def test_a_window_that_is_too_large_for_memory_is_estimated_in_halves_exactly(
    kind: str, shape: tuple[int, int], short_of_memory: Callable[[DenoisingNetwork, int], list[int]]
) -> None:
    torch.manual_seed(0)
    architecture = Architecture(kind, *{"nrrn": (1, 4), "denoisenet": (3, 4), "unet": (1, 2)}[kind], kind_inputs(kind))
    network = architecture.build().eval()
    stack = stack_of(4, *shape)
    expected = in_slot(network, "cpu", 3)(stack)
    asked = short_of_memory(network, 1500)
    halving = in_slot(network, "cpu", 3)
    np.testing.assert_allclose(halving(stack), expected, rtol=0, atol=2e-6)
    assert max(asked) > 1500
    asked.clear()
    halving(stack)
    assert max(asked) <= 1500, "what is too large was tried again"


def kind_inputs(kind: str) -> str:
    return {"nrrn": "neighbours", "denoisenet": "channels", "unet": "mean"}[kind]


def test_memory_that_suffices_for_no_window_is_said(
    short_of_memory: Callable[[DenoisingNetwork, int], list[int]],
) -> None:
    network = tiny_network()
    short_of_memory(network, 10)
    with pytest.raises(
        RunError, match=r"GPU memory does not suffice for a window of .* free some, or use --device cpu"
    ):
        in_slot(network, "cpu", 3)(stack_of(3, 40, 40))


def test_both_ways_of_a_units_step_are_one() -> None:
    torch.manual_seed(0)
    x, h_n, v = torch.randn(2, 1, 9, 8), torch.randn(1, 4, 9, 8), torch.randn(1, 12, 9, 8)
    w = torch.randn(2, 12, 9, 8)
    for exact, in_place in zip(unit_step(x, w, h_n, v), unit_step_in_place(x, w.clone(), h_n, v), strict=True):
        torch.testing.assert_close(in_place, exact, rtol=0, atol=1e-6)


def test_where_nothing_can_be_compiled_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object, **__: object) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise ValueError("no C compiler here\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    step, network, stack = CompiledStep(), tiny_network(2, 4), torch.from_numpy(stack_of(4, 12, 13))
    with pytest.warns(RuntimeWarning, match="runs uncompiled, and slower: no C compiler here$"):
        found = network.denoise(stack, 3, step)
    torch.testing.assert_close(found, network.denoise(stack), rtol=0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.denoise(stack, 3, step)


def test_memory_that_ends_in_a_compiled_step_is_not_taken_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        tiny_network().denoise(torch.zeros(3, 8, 8), 3, CompiledStep())


def test_the_first_precision_that_is_near_enough_is_taken() -> None:
    network, sample = tiny_network(2, 4, gain=1.5), stack_of(3, 40, 40)
    exact = in_slot(tiny_network(2, 4, gain=1.5), "cpu", 3)(sample)
    found, precision, off = fastest_in_slot(network, "cpu", 3, sample, limit=0.01)
    assert precision == "float16"
    assert 1e-6 < off["float16"] < 0.01
    assert off == {"float16": pytest.approx(np.sqrt(np.mean((found(sample) - exact) ** 2)), rel=1e-6)}
    found, precision, off = fastest_in_slot(network, "cpu", 3, sample, limit=1e-6)
    assert precision == "float32"
    assert off["bfloat16"] > off["float16"] > 1e-6
    np.testing.assert_array_equal(found(sample), exact)


def test_numbers_that_a_precision_cannot_hold_rule_it_out() -> None:
    network = tiny_network()
    with torch.no_grad():
        network.last.weight.mul_(1e9)  # float16 ends at 65504
        network.last.bias.fill_(-1e9)
    _, precision, off = fastest_in_slot(network, "cpu", 3, stack_of(3, 20, 20), limit=1e9)
    assert precision == "bfloat16"
    assert not np.isfinite(off["float16"])


@pytest.mark.parametrize("precision", ["auto", "float32", "float16", "bfloat16"])
def test_a_run_in_any_precision_is_recorded_and_close(precision: str, tmp_path: Path) -> None:
    source = bare_zarr(tmp_path / "in.zarr", image_like((4, 40, 36)))
    weights = tiny_weights(tmp_path / "w.safetensors")
    outputs = []
    for name in ("float32", precision):
        options = Options(cluster="serial", device="cpu", method=Method(precision=name), overwrite=True)
        plan = make_plan(source, tmp_path / f"{name}.zarr", weights, options)
        for _ in run_plan(plan, run_serially, "cpu", overwrite=True):
            pass
        (record,) = Ledger(plan.target.url).records(plan.slabs[0].key)
        assert record.arithmetic == ("float32" if name == "auto" else name)
        assert record.spent.keys() >= {"load", "fetch", "decode", "wait", "network", "prepare", "encode", "store"}
        assert sum(record.spent.values()) == pytest.approx(record.seconds, rel=0.2)
        outputs.append(read_box(plan.target, plan.target.box).astype(float))
    assert np.sqrt(np.mean((outputs[0] - outputs[1]) ** 2)) < WORST_LEVELS


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="precision 'double' is unknown: use auto, float32, float16, bfloat16"):
        Method(precision="double")


def test_precisions_are_tried_on_the_middle_where_there_is_an_image(tmp_path: Path) -> None:
    voxels = image_like((12, 32, 32))
    voxels[4:8] = 0
    source = open_volume(bare_zarr(tmp_path / "in.zarr", voxels))
    weights = describe_weights(tiny_weights(tmp_path / "w.safetensors"))
    layout = Layout(chunk=(4, 16, 16), shard=(4, 32, 32), slab=(4, 32, 32))
    plan = plan_denoise(source, str(tmp_path / "out.zarr"), weights, layout)
    np.testing.assert_array_equal(sample_of(plan), voxels[9:12])
    blank = open_volume(bare_zarr(tmp_path / "blank.zarr", np.zeros_like(voxels)))
    assert sample_of(replace(plan, source=blank)) is None


def test_each_worker_settles_on_a_precision_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which is not there: the choice is the same, and the arithmetic the CPU's."""

    class Seen:
        type = "cuda"

    source = open_volume(bare_zarr(tmp_path / "in.zarr", image_like((6, 40, 36))))
    weights = describe_weights(tiny_weights(tmp_path / "w.safetensors"))
    plan = plan_denoise(source, str(tmp_path / "out.zarr"), weights, method=Method(precision="auto"))
    monkeypatch.setattr("nrrn_pipeline.slab.choose_device", lambda _: Seen())
    network, said = load_network(plan, "cpu")
    assert said.startswith("float16; grey levels from float32, 0.5 allowed: float16 0.0")
    assert next(network.network.parameters()).dtype == torch.float16


def test_a_compiled_step_is_one_for_windows_of_any_size() -> None:
    """Traced by torch, and run without its compiler: else each size would be compiled, and given up after a few."""
    torch._dynamo.reset()
    counted = CompileCounter()
    step, network = CompiledStep(backend=counted), tiny_network(2, 4, gain=1.5)
    for size in range(9, 30, 2):
        stack = torch.from_numpy(stack_of(4, size, 40 - size))
        torch.testing.assert_close(network.denoise(stack, 3, step), network.denoise(stack), rtol=0, atol=1e-6)
    assert counted.frame_count <= 4  # of one centre and of two, and the first size that is seen


def test_lanes_divide_tiles_and_threads_alike_lest_some_are_idle() -> None:
    assert [cpu_lanes(threads, tiles) for threads, tiles in ((1, 4), (2, 4), (8, 6), (2, 9), (3, 4))] == [1, 2, 2, 1, 1]


def test_lanes_share_the_threads_that_their_process_computes_with() -> None:
    together, found = Barrier(2), []
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        in_lanes(2, lambda _: (together.wait(), found.append(torch.get_num_threads())), range(2))
        with ThreadPoolExecutor(1) as later:
            assert (found, torch.get_num_threads(), later.submit(torch.get_num_threads).result()) == ([3, 3], 6, 6)
    finally:
        torch.set_num_threads(before)


def test_tiles_in_two_lanes_give_what_one_lane_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_volume(bare_zarr(tmp_path / "in.zarr", image_like((5, 90, 80))))
    weights = describe_weights(tiny_weights(tmp_path / "w.safetensors"))
    plan = plan_denoise(source, str(tmp_path / "out.zarr"), weights, Layout(tile=40))
    task = SlabTask(plan.slabs[0], merge_boxes([measure_box(source, source.box)]))
    network = in_slot(tiny_network(), "cpu", 3)
    outputs = []
    for lanes in (1, 2):
        monkeypatch.setattr(network, "lanes", lambda _, lanes=lanes: lanes)
        outputs.append(denoise_voxels(read_box(source, source.box), task, network, plan))
    np.testing.assert_array_equal(*outputs)


def test_an_error_in_one_lane_ends_all_once_what_was_begun_is_over() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise ArithmeticError("one tile")
        time.sleep(0.05)
        done.append(item)

    with pytest.raises(ArithmeticError, match="one tile"):
        in_lanes(2, work, range(100))
    after = list(done)
    time.sleep(0.2)
    assert done == after, "a lane goes on"
    assert len(done) < 10
