"""Classical denoisers in the network's place: a stack of slices in, estimates out, with a reach and no weights.

What each does to a voxel depends on its triplet alone, so slabs never show. Tiles do not show either, as far as

    mean, gaussian-avg, median-avg   tiled equals whole, bit by bit
    nlm, nlm-avg                     to float32 rounding, 1e-6 of a slice's std: scikit-image's integral images (Darbon
                                     et al. 2008) begin at the tile's corner, but are summed in double precision
    bm4d                             to float32 rounding if tiles begin on `grid`, on which the reference blocks lie
    bm3d, bm3d-avg                   to 0.1 of 255 grey levels if they begin on it (sigma 30): matches of matches may
                                     lie beyond `reach`; off the grid these three differ by up to 9 grey levels

A slice at the volume's end has its one neighbour twice: its mean of three is noisier than `sigma / sqrt(3)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from math import inf, isfinite, sqrt
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d, median_filter

from nrrn_pipeline.errors import InputError

Stack = NDArray[np.float32]
Image = NDArray[Any]

PATCH, DISTANCE = 5, 6  # of non-local means: side of a patch, radius of the search, in pixels
TRUNCATE = 4.0  # radius of the Gaussian kernel, in sigmas of it
SMALLEST = 16  # pixels a side that BM3D and BM4D get, two blocks: of a single one the library dies
GRID = 9  # pixels after which the places of their reference blocks repeat: steps of 3, shifted by 0, 1 and 2
PROBE = 0.1  # step of Monte-Carlo SURE, in sigmas of the noise
SEED = 2008_09_17  # of its probe; no common one: a probe that equals the noise of made-up data would see itself

_one_at_a_time = Lock()  # BM3D and BM4D share one pool of threads in a process


def _middle(triplet: Stack) -> Image:
    middle: Image = triplet[1]
    return middle


def _mean(triplet: Stack) -> Image:
    mean: Image = (triplet[0] + triplet[1] + triplet[2]) / np.float32(3)
    return mean


def _triplet(triplet: Stack) -> Image:
    return triplet


def _as_it_is(image: Image, _noise: float, _strength: float) -> Image:
    return image


def _gaussian(image: Image, _noise: float, strength: float) -> Image:
    smooth: Image = gaussian_filter(image, strength, truncate=TRUNCATE)
    return smooth


def _median(image: Image, _noise: float, strength: float) -> Image:
    middle: Image = median_filter(image, size=int(strength))
    return middle


def _non_local_means(image: Image, noise: float, strength: float) -> Image:
    from skimage.restoration import denoise_nl_means  # slow to import, for none but this

    estimate: Image = denoise_nl_means(image, PATCH, DISTANCE, h=strength, sigma=noise)
    return estimate.reshape(image.shape)  # it drops axes of one pixel


def _bm3d(image: Image, noise: float, _strength: float) -> Image:
    library = _library("bm3d")
    return _in_blocks(library.bm3d, image, noise, library.BM3DProfile())


def _bm4d(triplet: Image, noise: float, _strength: float) -> Image:
    library = _library("bm4d")
    profile = library.BM4DProfile2D()
    # blocks as deep as the triplet: those of one slice, the library's own choice, lose 0.6 dB and take longer
    profile.bs_ht = profile.bs_wiener = (5, 5, 3)
    profile.search_window_ht = profile.search_window_wiener = (7, 7, 1)
    profile.transform_local_ht_name = "dct"  # as there is no wavelet over three slices
    profile.nf = (8, 8, 8)  # the noise is white: a coarse spectrum does
    return _in_blocks(library.bm4d, np.moveaxis(triplet, 0, 2), noise, profile)[..., 1]


def _in_blocks(denoise: Callable[..., Image], image: Image, noise: float, profile: Any) -> Image:
    """(y, x) or (y, x, z) through BM3D or BM4D; a smaller image than two blocks is continued by reflection."""
    # blocks match up to a share of the tile's own range of grey: any such limit would make tiles show
    profile.tau_match = profile.tau_match_wiener = 1e9
    profile.num_threads = 1  # more would add up in another order each time
    missing = [max(0, SMALLEST - length) for length in image.shape[:2]]
    padded = np.pad(image, [(0, more) for more in missing] + [(0, 0)] * (image.ndim - 2), mode="symmetric")
    with _one_at_a_time:
        estimate = denoise(padded, noise, profile)
    return estimate[: image.shape[0], : image.shape[1]]


@dataclass(frozen=True)
class _Method:
    """A filter's kind: what of a triplet it sees, what it does to that, how far it reaches for a strength."""

    line: str
    source: Callable[[Stack], Image]
    denoise: Callable[[Image, float, float], Image]
    reach: Callable[[float], int]
    pixel_bytes: int  # working memory for each pixel of a tile, roughly
    ladder: tuple[float, ...] = ()  # strengths to choose from
    packages: tuple[str, ...] = ()
    grid: int = 1


def _nowhere(_strength: float) -> int:
    return 0


def _kernel_radius(strength: float) -> int:
    return int(TRUNCATE * strength + 0.5)  # as scipy rounds it


def _half(strength: float) -> int:
    return int(strength) // 2


def _patches(_strength: float) -> int:
    return DISTANCE + PATCH // 2


def _bm3d_reach(_strength: float) -> int:
    return 2 * (19 + 8)  # two stages, each of a search radius and a block


def _bm4d_reach(_strength: float) -> int:
    return 2 * (4 + 7 + 7)  # two stages, each of a block, the way to its reference, the way to that one's matches


ROUNDING = 1e-6  # of a slice's std: less noise than that is arithmetic's own
_SIGMAS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # pixels
_SIDES = (3.0, 5.0, 7.0, 9.0)  # pixels
_CUTS = (0.4, 0.6, 0.8, 1.0)  # h, in sigmas of what is filtered; scikit-image would start at 0.8
_BM3D, _BM4D = ("bm3d", "bm4d"), ("bm4d",)

_METHODS = {
    "mean": _Method("mean of the three slices", _mean, _as_it_is, _nowhere, 8),
    "gaussian-avg": _Method("Gaussian filter of the mean of three", _mean, _gaussian, _kernel_radius, 16, _SIGMAS),
    "median-avg": _Method("median filter of the mean of three", _mean, _median, _half, 16, _SIDES),
    "nlm": _Method("non-local means of the slice", _middle, _non_local_means, _patches, 64, _CUTS),
    "nlm-avg": _Method("non-local means of the mean of three", _mean, _non_local_means, _patches, 64, _CUTS),
    "bm3d": _Method("BM3D of the slice", _middle, _bm3d, _bm3d_reach, 500, packages=_BM3D, grid=GRID),
    "bm3d-avg": _Method("BM3D of the mean of three", _mean, _bm3d, _bm3d_reach, 500, packages=_BM3D, grid=GRID),
    "bm4d": _Method(
        "BM4D of the three slices, of which the middle one is kept",
        _triplet,
        _bm4d,
        _bm4d_reach,
        1500,
        packages=_BM4D,
        grid=GRID,
    ),
}

FILTERS = {name: method.line for name, method in _METHODS.items()}


def filter_text(settings: Mapping[str, Any]) -> str:
    """What stands in a plan's settings as "filter", for people."""
    told = {word: value for word, value in settings.items() if word != "name" and value is not None}
    shown = (f"{word} {value:.4g}" if isinstance(value, float) else f"{word} {value}" for word, value in told.items())
    return ", ".join([str(settings.get("name")), *shown])


@dataclass(frozen=True)
class Filter:
    """A classical denoiser in the network's slot.

    `sigma` is the standard deviation of a single slice's noise, in the stack's units. `strength` is the standard
    deviation in pixels of gaussian-avg, the odd side in pixels of median-avg, the cut-off h of nlm and nlm-avg in the
    stack's units; the others have none. Raises InputError for a name, a sigma or a strength that cannot be.
    """

    name: str
    sigma: float
    strength: float | None = None

    def __post_init__(self) -> None:
        method = _method(self.name)
        if not 0 < self.sigma < inf:
            raise InputError(
                f"filter {self.name} was given noise of sigma {self.sigma}, and needs a finite one above 0: "
                "a volume without noise needs no denoising"
            )
        if method.ladder and not 0 < (self.strength or 0) < inf:
            raise InputError(f"filter {self.name} was given strength {self.strength}, and needs one above 0")
        if method.denoise is _median and (self.strength or 0) % 2 != 1:
            raise InputError(f"filter {self.name} was given a side of {self.strength} pixels: use an odd whole number")

    @property
    def reach(self) -> int:
        """Radius in y and x of the input voxels that one output voxel depends on."""
        return _METHODS[self.name].reach(self.strength or 0)

    @property
    def grid(self) -> int:
        """Pixels that lie between two places where a tile may begin."""
        return _METHODS[self.name].grid

    def lanes(self, _: int) -> int:
        """One tile at a time."""
        return 1

    @property
    def settings(self) -> dict[str, Any]:
        """Whatever changes a voxel, as JSON. Raises InputError if a package that the filter needs is missing."""
        packages = _METHODS[self.name].packages
        for package in packages:
            _library(package)
        versions = {package: version(package) for package in packages}
        return {"filter": {"name": self.name, "sigma": self.sigma, "strength": self.strength, **versions}}

    def working_bytes(self, pixels: int) -> int:
        """Memory that a call takes for a tile of `pixels` in y and x, beside the stack and the estimate."""
        return pixels * _METHODS[self.name].pixel_bytes

    def __call__(self, stack: Stack) -> Stack:
        """(z+2, y, x) normalised stack -> (z, y, x) estimate. Raises InputError if a package is missing."""
        method = _METHODS[self.name]
        noise = _noise(method, self.sigma)
        estimate = np.empty_like(stack[1:-1])
        for z in range(len(estimate)):
            estimate[z] = method.denoise(method.source(stack[z : z + 3]), noise, self.strength or 0)
        return estimate


def tuned(name: str, stacks: Sequence[Stack], sigma: float) -> Filter:
    """The filter with its strength set from the noise of single slices, `sigma`, known or measured.

    Of a ladder of strengths the one that minimises Stein's unbiased estimate of the squared error on the stacks; BM3D
    and BM4D take sigma itself. Raises InputError as Filter does, or if a strength is to be chosen without stacks.
    """
    method = _method(name)
    if not method.ladder:
        return Filter(name, sigma)
    if not stacks:
        raise InputError(f"filter {name} is tuned on samples of the volume, and was given none: give a stack or more")
    unit = _noise(method, sigma) if method.denoise is _non_local_means else 1.0
    choices = [Filter(name, sigma, unit * strength) for strength in method.ladder]
    return min(choices, key=lambda choice: sum(risk(choice, stack) * stack[1:-1].size for stack in stacks))


def _noise(method: _Method, sigma: float) -> float:
    """Of what the method filters, if that of a slice is sigma."""
    return sigma / sqrt(3) if method.source is _mean else sigma


def risk(choice: Filter, stack: Stack) -> float:
    """Stein's unbiased risk estimate: the mean squared error of the middle slices, without knowing them clean.

    mean((estimate - noisy)^2) - sigma^2 + 2 sigma^2 * (mean derivative of an estimate with respect to its own voxel),
    for white Gaussian noise of `choice.sigma` (Stein 1981).
    """
    noisy, estimate = stack[1:-1], choice(stack)
    own = _own_weight(choice, stack, estimate)
    misfit = float(np.mean(np.square(estimate - noisy, dtype=np.float64)))
    return misfit + choice.sigma**2 * (2 * own - 1)


def _own_weight(choice: Filter, stack: Stack, estimate: Stack) -> float:
    """Mean derivative of an estimated voxel with respect to the noisy one: exact if linear, else by a random probe."""
    if _METHODS[choice.name].denoise is _gaussian:
        axes = [gaussian_filter1d(np.eye(n), choice.strength, axis=0, truncate=TRUNCATE) for n in stack.shape[1:]]
        return float(np.prod([axis.diagonal().mean() for axis in axes])) / 3
    # Ramani, Blu & Unser 2008, eq. 14; the seed is fixed, so that all strengths meet the same probe
    probe = np.random.default_rng(SEED).standard_normal(stack.shape, dtype=np.float32)
    step = np.float32(PROBE * choice.sigma)
    change = choice(stack + step * probe) - estimate
    return float(np.mean(probe[1:-1] * change, dtype=np.float64)) / float(step)


def noise_sigma(slices: NDArray[Any]) -> float:
    """Standard deviation of the noise of (z, y, x) slices, in their units: the median of all slices' estimates.

    From the finest diagonal wavelet coefficients (Donoho & Johnstone 1994), which take the noise for white. Raises
    InputError if no slice has noise, or PyWavelets is missing.
    """
    from skimage.restoration import estimate_sigma  # slow to import, for none but this

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a slice without detail: no estimate, none counted
        try:
            found = [(float(estimate_sigma(plane)), float(np.std(plane))) for plane in np.asarray(slices, np.float64)]
        except ImportError:
            raise _missing("PyWavelets", "evaluation") from None
    measured = [sigma for sigma, std in found if isfinite(sigma) and sigma > ROUNDING * std]
    if not measured:
        raise InputError(
            f"no noise can be measured on {len(found)} slices: they have none, as synthetic ones, or hardly any detail"
        )
    return float(np.median(measured))


def _method(name: str) -> _Method:
    if name not in _METHODS:
        raise InputError(f"filter {name!r} is unknown: use {', '.join(_METHODS)}")
    return _METHODS[name]


def _library(package: str) -> Any:
    """A package for non-commercial use only: never imported unless asked for."""
    try:
        return import_module(package)
    except ImportError:
        raise _missing(package, "baselines") from None


def _missing(package: str, extra: str) -> InputError:
    return InputError(f"this needs {package}: pip install nrrn-pipeline[{extra}]")
