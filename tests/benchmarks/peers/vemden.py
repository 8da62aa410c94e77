"""The authors' tool, vEMden 0.2: python vemden.py SRC DST WEIGHTS, in an environment that has it

It reads and writes folders of images, so the volume is written as PNG first, and its PNGs are read last. WEIGHTS are
turned into its own checkpoint by the names in our reader of those. Batches are of one slice's crops.
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
import zarr
from PIL import Image
from safetensors.torch import load_file

CROP = 256
BATCH = 3  # its own is 12, whose gradients, which it keeps, take 24 GB with the paper's network
GATES = ("Gate_update", "Gate_reset", "Gates2")


def use_without_torchvision() -> None:
    """Only vEMden's training uses torchvision; on machines whose build of it does not fit torch, it may be absent."""
    try:
        import torchvision.transforms  # noqa: F401
    except (ImportError, RuntimeError):
        stand_in = types.ModuleType("torchvision.transforms")
        stand_in.Compose, stand_in.functional = None, types.ModuleType("torchvision.transforms.functional")
        package = types.ModuleType("torchvision")
        package.transforms = stand_in
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
        names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        sys.modules |= dict(zip(names, (package, stand_in, stand_in.functional), strict=True))


def renamed(weights: str) -> tuple[dict[str, torch.Tensor], int, int]:
    """The same weights as vEMden names them, and their units and channels."""
    ours = load_file(weights)
    units = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("units."))
    channels = ours["first.weight"].shape[0]
    theirs = {}
    for end in ("weight", "bias"):
        for name, conv in (("first", "conv1"), ("advance", "conv3"), ("last", "conv2")):
            theirs[f"nrrn.{conv}.{end}"] = ours[f"{name}.{end}"]
        for unit in range(units):
            for layer, letter in (("neighbour", "a"), ("centre", "b")):
                parts = ours[f"units.{unit}.{layer}.{end}"].split(channels)
                for gate, part in zip(GATES, parts, strict=True):
                    theirs[f"nrrn.BU.{unit}.{gate}_{letter}.{end}"] = part
    return theirs, units, channels


def main(source: str, output: str, weights: str) -> None:
    use_without_torchvision()
    np.floatt32 = np.float32  # FiReTiTiPyLib 1.5.7 asks for it when it writes an image
    from vEMden.vEMden import Denoise

    noisy = zarr.open_array(source, mode="r")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "in").mkdir()
        for z, plane in enumerate(noisy[:]):
            Image.fromarray(plane).save(folder / "in" / f"{z:06}.png", compress_level=1)
        theirs, units, channels = renamed(weights)
        path = folder / f"Denoising_NRRN_nBlocks={units}_nMaps={channels}_Date=2026.pt"  # it reads sizes from there
        torch.save(theirs, path)
        keep = CROP - 2 * (units + 5)  # a border of units + 5 voxels is its own choice
        crops = int(np.prod([-(-(length - CROP) // keep) + 1 for length in noisy.shape[1:]]))
        words = {"nBlocks": units, "nFeaturesMaps": channels, "cropSize": CROP, "nThreads": 0}
        words["batchSize"] = min(crops, BATCH)
        Denoise({"dataDir": f"{folder}/in/", "net": str(path), **words})
        results = next(folder.glob("in - Denoised*"))
        kept_voxels = zarr.create_array(output, shape=noisy.shape, chunks=noisy.chunks, dtype="uint8")
        kept_voxels[:] = np.stack([np.asarray(Image.open(results / f"{z:06}.png")) for z in range(noisy.shape[0])])


if __name__ == "__main__":
    main(*sys.argv[1:])
