"""nrrn ground-truth: files of scans in, one clean image out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from nrrn_pipeline.cli.options import StorageOptions
from nrrn_pipeline.cli.terminal import print_rows
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.ground_truth import reference_image
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.volume import open_volume, read_box

MOST_VOXELS = 2**30  # of scans, which are held together
TIFF, PNG = (".tif", ".tiff"), (".png",)


def ground_truth(
    scans: Annotated[
        list[str],
        typer.Argument(
            metavar="SCAN...",
            help="Scans of one surface, five or more: TIFF (each page a scan), PNG, or Zarr (each slice a scan).",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Image to write: .tif or .png.")],
    use: Annotated[int | None, typer.Option(help="So many of the scans, drawn at random, the first with them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Make a reference image OUT of repeated scans: registered to the first, and averaged without their extremes.

    Example: nrrn ground-truth scan1.tif scan2.tif scan3.tif scan4.tif scan5.tif scan6.tif reference.tif
    """
    _refuse_unwritable(output)
    images = [image for scan in scans for image in _read(scan)]
    if images[0].dtype == np.float32 and output.lower().endswith(PNG):
        raise InputError(f"{output} cannot hold the float32 pixels of the scans: write a .tif")
    reference = reference_image(images, use, seed)
    _write(output, _as_dtype(reference.image, images[0].dtype))
    least, greatest = reference.shifts.min(0), reference.shifts.max(0)
    rows = {
        "scans": f"{len(reference.scans)} of {len(images)}",
        "shifts": ", ".join(f"{axis} {a:.1f} to {b:.1f}" for axis, a, b in zip("yx", least, greatest, strict=True))
        + " pixels from the first",
        "image": output,
    }
    print_rows(rows)


def _read(path: str) -> Iterator[NDArray[Any]]:
    """The (y, x) scans in a file or Zarr volume."""
    name = path.lower()
    if not name.endswith(TIFF + PNG):
        volume = open_volume(path)
        if volume.box.size > MOST_VOXELS:
            raise InputError(f"{path} has {volume.box.size} voxels: give scans of one surface, {MOST_VOXELS} at most")
        yield from read_box(volume, volume.box)
        return
    for image in _decoded(path, _pages_of_tiff if name.endswith(TIFF) else _image_of_png):
        if image.dtype not in (np.uint8, np.uint16, np.float32):
            raise InputError(f"{path} holds {image.dtype} pixels: expected uint8, uint16 or float32")
        yield image


def _decoded(path: str, read: Callable[[str], list[NDArray[Any]]]) -> list[NDArray[Any]]:
    try:
        images = read(path)
    except FileNotFoundError:
        raise InputError(f"no scan at {path}: there is nothing there") from None
    except Exception as error:  # libraries raise all kinds of errors for damaged images
        raise InputError(f"{path} cannot be read as an image ({reason_of(error)})") from error
    if not images:
        raise InputError(f"{path} holds no grey (y, x) image: convert it to grey, without colours or transparency")
    return images


def _pages_of_tiff(path: str) -> list[NDArray[Any]]:
    import tifffile  # not through scikit-image, which takes three pages for colours

    with tifffile.TiffFile(path) as tiff:
        if not tiff.series:
            raise ValueError("it has no pages")
        if any(not series.axes.endswith("YX") for series in tiff.series):
            return []
        # big-endian files are common; what follows wants the machine's own order
        stacks = [series.asarray() for series in tiff.series]
    return [page.astype(page.dtype.newbyteorder("=")) for s in stacks for page in s.reshape(-1, *s.shape[-2:])]


def _image_of_png(path: str) -> list[NDArray[Any]]:
    from skimage.io import imread

    image = imread(path)
    return [image] if image.ndim == 2 else []


def _refuse_unwritable(output: str) -> None:
    folder = os.path.dirname(os.path.abspath(output))
    if not output.lower().endswith(TIFF + PNG):
        raise InputError(f"{output} is no image's name: the last word is the image to write, .tif, .tiff or .png")
    if os.path.lexists(output):
        raise InputError(f"{output} is there already: delete it, or write another")
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder} to write {os.path.basename(output)} in: make it first")


def _as_dtype(image: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "f":
        return image
    return np.clip(np.rint(image), 0, np.iinfo(dtype).max).astype(dtype)


def _write(output: str, image: NDArray[Any]) -> None:
    if output.lower().endswith(TIFF):
        import tifffile

        tifffile.imwrite(output, image)
    else:
        from skimage.io import imsave

        imsave(output, image, check_contrast=False)
