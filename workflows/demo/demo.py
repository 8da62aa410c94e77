"""Denoise a real FIB-SEM sample and measure what was gained: python workflows/demo/demo.py FOLDER

The noise is added here, so the clean crop can be held beside the result; see README.md for where the data is from.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from sample import CROP, add_noise, write_ome_zarr

from nrrn_pipeline import Layout, Options, denoise, open_volume
from nrrn_pipeline.evaluation.metrics import psnr, ssim
from nrrn_pipeline.report.pictures import save_panels

WEIGHTS = Path(__file__).with_name("fib25_sigma30.safetensors")
LAYOUT = Layout(chunk=(8, 128, 128), shard=(8, 128, 256), tile=128)


def main(folder: Path) -> None:
    """Noise, denoise, measure, show."""
    console = Console(soft_wrap=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    clean = np.load(CROP)["volume"]
    noisy = add_noise(clean, seed=2026)
    write_ome_zarr(folder / "noisy.ome.zarr", noisy)
    console.print(f"denoising {clean.shape[0]} slices of {clean.shape[1]} x {clean.shape[2]} voxels ...")
    summary = denoise(folder / "noisy.ome.zarr", folder / "denoised.ome.zarr", WEIGHTS, Options(layout=LAYOUT))
    denoised = open_volume(folder / "denoised.ome.zarr").to_xarray().to_numpy()

    console.print(f"{summary.slabs} slabs in {summary.seconds:.1f} s, starting the workers included")
    console.print(f"result   {folder / 'denoised.ome.zarr'}")
    for name, volume in (("before", noisy), ("after", denoised)):
        likeness = f"PSNR {psnr(clean, volume, 255):.2f} dB, SSIM {ssim(clean, volume, 255):.3f}"
        console.print(f"{name:8} {likeness}, against the clean crop")
    middle = len(clean) // 2
    panels = {"noisy": noisy[middle], "denoised (NRRN)": denoised[middle], "clean": clean[middle]}
    save_panels(folder / "before_after.png", panels, enlarge=2)
    console.print(f"picture  {folder / 'before_after.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
