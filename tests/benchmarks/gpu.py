"""All that is measured on a GPU, in one call of under ten minutes: python tests/benchmarks/gpu.py [--out FILE]

Needs torch, NumPy and safetensors alone, so it runs where nothing else is installed: PYTHONPATH=. from the repository's
root. --small: small sizes, for a CPU. --vemden FOLDER: where FiReTiTiPyLib lies (.peers), to time its network beside.
Prints, and writes JSON; gates nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from nrrn_pipeline.network import NRRN, TorchNetwork, choose_device, fastest_in_slot, flop_per_voxel, in_lanes, in_slot
from nrrn_pipeline.network.nrrn import unit_step_in_place
from nrrn_pipeline.training.fit import Training, TrainSettings

found: dict[str, Any] = {}


def tell(name: str, **facts: Any) -> None:
    found[name] = facts
    shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items())
    print(f"{name}: {', '.join(shown)}", flush=True)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: torch.device, at_least: float = 1.0) -> float:
    """Of one call, after two that choose algorithms and compile."""
    for _ in range(2):
        work()
    wait(device)
    calls, started = 0, perf_counter()
    while calls == 0 or perf_counter() - started < at_least:
        work()
        wait(device)
        calls += 1
    return (perf_counter() - started) / calls


def matmul_peak(device: torch.device, side: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device)


def exactness(network: NRRN, device: torch.device) -> None:
    """float32 on the device, and faster precisions, against float64 on the CPU; z-scores, root mean square."""
    stack = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 96, 80)))
    exact = NRRN(len(network.units), network.channels).double()
    exact.load_state_dict(network.state_dict())
    expected = exact.eval().denoise(stack).numpy()
    given = stack.numpy().astype(np.float32)
    for precision in ("float32", "float16", "bfloat16"):
        other = NRRN(len(network.units), network.channels).eval()
        other.load_state_dict(network.state_dict())
        off = in_slot(other, device.type, 3, precision)(given) - expected
        tell(f"off from float64, {precision}", rms=float(np.sqrt(np.mean(off**2))), most=float(np.abs(off).max()))
    _, precision, measured = fastest_in_slot(network, device.type, 3, given, 0.5 / 32)
    tell("auto", takes=precision, **measured)


def throughput(slot: TorchNetwork, side: int, depth: int, peak: float, name: str) -> None:
    """NumPy in, NumPy out: what a worker sees; in one thread, and in as many as it would use."""
    network = slot.network
    assert isinstance(network, NRRN)
    stack = np.random.default_rng(0).standard_normal((depth + 2, side, side), dtype=np.float32)
    work = flop_per_voxel(len(network.units), network.channels) * stack[1:-1].size
    if slot.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        once = seconds(lambda: slot(stack), slot.device, 3.0)
    except RuntimeError as error:
        tell(name, failed=str(error).partition("\n")[0])
        return
    rate = work / once
    facts = {"voxels_per_s": stack[1:-1].size / once, "tflops": rate / 1e12, "of_matmul_peak": rate / peak}
    facts["voxels_per_s_in_lanes"] = together(slot, stack)
    if slot.device.type == "cuda":
        facts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    tell(name, **facts)


def together(slot: TorchNetwork, stack: np.ndarray, rounds: int = 8) -> float:
    lanes = slot.lanes(4)
    in_lanes(lanes, slot, [stack] * 2 * lanes)  # in these threads too, algorithms are chosen first
    started = perf_counter()
    in_lanes(lanes, slot, [stack] * rounds * lanes)
    return rounds * lanes * stack[1:-1].size / (perf_counter() - started)


def kernels(slot: TorchNetwork, side: int) -> None:
    """What takes the time."""
    stack = np.random.default_rng(0).standard_normal((6, side, side), dtype=np.float32)
    slot(stack)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if slot.device.type == "cuda" else [])]
    with profile(activities=kinds) as profiled:
        slot(stack)
    by = "self_device_time_total" if slot.device.type == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60))


def training(units: int, channels: int, batch: int, crop: int, precision: str) -> None:
    """A step of ours beside the network's plain forward and backward on the same batch."""
    sizes = {"units": units, "channels": channels, "batch": batch, "crop": crop}
    ours = Training(TrainSettings(loss="recorrupted", precision=precision, **sizes))
    triplets = torch.randn(batch, 4, crop, crop)
    on_device, network = triplets.to(ours.device), ours.network

    def plain() -> None:
        with torch.autocast(ours.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = (network.estimate(on_device[:, :3]).float() - on_device[:, 3:]).square().mean()
        network.zero_grad(set_to_none=True)
        loss.backward()

    step, bare = (seconds(work, ours.device, 2.0) for work in (lambda: ours.take(triplets), plain))
    tell(f"training step, {precision}", seconds=step, plain=bare, overhead=step / bare - 1)


def vemden(folder: str, network: NRRN, device: torch.device, side: int, batch: int) -> None:
    """Its network on a batch of triplets of crops, both branches, as its inference does it; float32."""
    path = Path(folder) / "FiReTiTiPyLib/PyTorch_Models/Denoising/NRRN.py"
    spec = importlib.util.spec_from_file_location("theirs", path)
    assert spec is not None, path
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    model = theirs.NRRN(len(network.units), network.channels).to(device).eval()
    pair = torch.randn(batch, 2, side, side, device=device)

    def both() -> None:
        ((model(pair) + model(pair)) / 2).detach().cpu()

    each = seconds(both, device, 2.0)
    tell("vEMden's network", voxels_per_s=batch * side**2 / each, batch=batch, side=side)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--small", action="store_true")
    words.add_argument("--out", type=Path)
    words.add_argument("--vemden")
    given = words.parse_args()
    began, device = perf_counter(), choose_device("auto")
    units, channels = (1, 4) if given.small else (4, 64)
    sides, depth = ((40, 64), 2) if given.small else ((270, 526, 1038), 16)
    torch.manual_seed(0)
    network = NRRN(units, channels).eval()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    tell("machine", device=name, torch=torch.__version__, python=platform.python_version())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exactness(network, device)
        dtypes = (torch.float32,) if given.small else (torch.float32, torch.float16, torch.bfloat16)
        peaks = {dtype: matmul_peak(device, 512 if given.small else 8192, dtype) for dtype in dtypes}
        tell("matmul", **{f"{dtype} tflops": peak / 1e12 for dtype, peak in peaks.items()})
        for precision in ("float32", "float16", "bfloat16"):
            own = NRRN(units, channels).eval()
            own.load_state_dict(network.state_dict())
            slot = in_slot(own, device.type, 3, precision)
            peak = max(peaks.values())
            for size in sides:
                throughput(slot, size, depth, peak, f"denoise, {precision}, {size} x {size}")
            if device.type == "cuda":
                slot._step = unit_step_in_place
                throughput(slot, sides[0], depth, peak, f"denoise, {precision}, {sides[0]} x {sides[0]}, not compiled")
        best = in_slot(network, device.type, 3, "float16" if device.type == "cuda" else "float32")
        kernels(best, sides[0])
        for precision in ("float32", "bfloat16"):
            training(*((1, 4, 2, 32) if given.small else (4, 64, 16, 256)), precision)
        if given.vemden:
            vemden(given.vemden, network, device, *((40, 2) if given.small else (256, 12)))
    tell("warnings", said=sorted({str(each.message) for each in caught}))
    tell("all of it", seconds=perf_counter() - began)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
