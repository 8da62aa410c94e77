"""Figures of an evaluation as PNG: 900 pixels wide, the same bytes for the same data.

Names of methods stand beside their data wherever there is room, so that no figure depends on colour alone. "input" is
always grey, "reference" black; the others have the same colours in all figures that are given them in the same order.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nrrn_pipeline.drift import LARGEST, Drift
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.noise_details import NoiseCurve
from nrrn_pipeline.report.page import INPUT, REFERENCE, Column, Row
from nrrn_pipeline.volume_noise import VolumeNoise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, DPI = 6.0, 150  # of every figure: 900 pixels
# Okabe & Ito 2008, which the colour-blind tell apart; without its yellow, too pale for lines, and its black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")  # once all colours are used
GREY, BLACK, ALARM = "#767676", "#000000", "#B3261E"
BINS, GREYS = 40, 128
MOST_POINTS = 40  # of a line, that are drawn one by one
LONGEST_NAME = 28  # characters
MOST_ABOVE = 4  # times as far above the median loss as the lowest is below it
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def patch_histogram(values: Mapping[str, ArrayLike], quantity: str = "PSNR", unit: str = "dB") -> bytes:
    """One histogram a method, under each other on one axis, of a measure of each patch; a line marks the median.

    Patches without a finite value, such as the PSNR of equal patches, are left out and counted.
    """
    finite = {name: _finite(found) for name, found in _some(values).items()}
    pooled = np.concatenate(list(finite.values()))
    edges = np.histogram_bin_edges(pooled, BINS) if pooled.size else np.linspace(0, 1, BINS + 1)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(finite), sharex=True, squeeze=False)[:, 0]
        for axes, (name, found), (colour, _) in zip(panels, finite.items(), _looks(finite), strict=True):
            axes.hist(found, bins=list(edges), color=colour, alpha=0.75)
            axes.spines["left"].set_visible(False)
            axes.set_yticks([])
            left_out = np.size(values[name]) - found.size
            count = f"n = {found.size}" + (f"\n{left_out} not finite" if left_out else "")
            axes.text(1.01, 0.5, count, transform=axes.transAxes, va="center", color=GREY)
            axes.set_ylabel(_label(name), rotation=0, ha="right", va="center")
            if found.size:
                axes.axvline(float(np.median(found)), color=BLACK, linewidth=1.2)
        panels[-1].set_xlabel(f"{_axis(quantity, unit)} of a patch; line: median")

    return _png(draw, 0.7 + 0.55 * len(finite))


def box_plots(values: Mapping[str, ArrayLike], quantity: str = "flat-signal IQR", unit: str = "grey levels") -> bytes:
    """A box a method: quartiles and median, whiskers to the last value within 1.5 interquartile ranges, points beyond.

    Values that are not finite are left out.
    """
    finite = {name: _finite(found) for name, found in _some(values).items()}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        boxes = axes.boxplot(
            list(finite.values()),
            orientation="horizontal",
            widths=0.6,
            patch_artist=True,
            medianprops={"color": BLACK, "linewidth": 1.4},
            flierprops={"marker": ".", "markersize": 3, "markeredgecolor": GREY},
        )
        for box, (colour, _) in zip(boxes["boxes"], _looks(finite), strict=True):
            box.set(facecolor=colour, alpha=0.75)
        _name_rows(axes, finite)
        axes.set_xlabel(_axis(quantity, unit))
        axes.grid(axis="x", color="#E0E0E0", linewidth=0.6)
        axes.set_axisbelow(True)

    return _png(draw, 0.8 + 0.38 * len(finite))


def residual_autocorrelation(correlations: Mapping[str, NDArray[Any]]) -> bytes:
    """A map a method of the (n, n) autocorrelation of what it removed, lag 0 at index n // 2, all on one colour scale.

    The scale leaves out lag 0, where each is 1: white noise leaves all other lags white. Structure that shows is signal
    that was removed, or noise that is correlated.
    """
    maps = {name: np.asarray(found, float) for name, found in _some(correlations).items()}
    others = np.concatenate([np.delete(found, _centre(found)) for found in maps.values()])
    strongest = float(np.abs(others[np.isfinite(others)]).max(initial=0.0)) or 1.0
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (name, found) in zip(panels.flat, maps.items(), strict=False):
            low, high = -(found.shape[0] // 2) - 0.5, (found.shape[0] + 1) // 2 - 0.5
            picture = axes.imshow(
                found, cmap="PuOr", vmin=-strongest, vmax=strongest, extent=(low, high, high, low), aspect="equal"
            )
            axes.set_title(_label(name))
        for axes in panels.flat[len(maps) :]:
            axes.set_axis_off()
        figure.colorbar(picture, ax=panels, label="autocorrelation (no unit)", extend="max", shrink=0.9, aspect=25)
        if len(maps) == 1:  # names of the whole figure's axes would stand far from it
            figure.set_layout_engine("compressed")
            panels[0, 0].set(xlabel="lag in x (pixels)", ylabel="lag in y (pixels)")
        else:
            figure.supxlabel("lag in x (pixels)", fontsize=9)
            figure.supylabel("lag in y (pixels)", fontsize=9)

    return _png(draw, 0.7 + rows * (0.25 + 4.2 / max(columns, 2)))


def profile(profiles: Mapping[str, ArrayLike], step: float = 1.0, unit: str = "pixels") -> bytes:
    """Grey levels along one line, across an edge say; `step` is the distance of its samples in `unit`."""
    lines = {name: np.asarray(found, float) for name, found in _some(profiles).items()}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, line), (colour, dashes) in zip(lines.items(), _looks(lines), strict=True):
            wide = 1.0 if name == INPUT else 1.6
            axes.plot(step * np.arange(line.size), line, color=colour, linestyle=dashes, linewidth=wide)
        axes.set_xlabel(f"position ({unit})")
        axes.set_ylabel("grey level")
        figure.legend(axes.get_lines(), [_label(name) for name in lines], loc="outside right upper", frameon=False)

    return _png(draw, 3.0)


def noise_curves(found: VolumeNoise) -> bytes:
    """Standard deviation of the noise: by signal, with the model's curve, and along z, where outliers are circled."""
    curve, sigma = found.curve, np.array(found.sigma)
    sigma[sigma == 0] = np.nan  # blank slices

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(2, 3), sharey=True)
        _by_signal(left, curve)
        left.set_ylim(0, 1.15 * float(np.nanmax([*curve.sigma, *sigma])))
        right.plot(found.first_z + np.arange(len(sigma)), sigma, color=COLOURS[0], linewidth=1.0)
        unlike = np.array(found.outliers, int)
        right.plot(unlike, sigma[unlike - found.first_z], "o", color=COLOURS[1], fillstyle="none")
        right.set_xlabel(f"slice; circled: {len(found.outliers)} unlike their neighbours")

    return _png(draw, 2.6)


def drift_curves(found: Drift) -> bytes:
    """Where slices lie along y and x, with the trend; and how far each is shifted against the one before, beyond that.

    Jumps are vertical lines. Slices that are blank, or that nothing could be measured of, are left out.
    """
    z = found.first_z + np.arange(len(found.position))
    position = np.where(found.known[:, None], found.position, np.nan)

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for along, trend, name, colour in zip(position.T, found.trend.T, "yx", COLOURS, strict=False):
            above.plot(z, along, color=colour, linewidth=1.0, label=name)
            if found.told:
                above.plot(z, trend, "--", color=colour, linewidth=1.0, label=f"{name}, trend")
        above.set_ylabel("position (voxels)")
        above.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        below.plot(z, np.where(found.compared, found.steps, np.nan), ".-", color=BLACK, linewidth=0.6, markersize=2)
        below.axhline(LARGEST, color=GREY, linestyle=":", linewidth=1.0)
        below.text(1.01, LARGEST, "aligned below", transform=below.get_yaxis_transform(), va="center", color=GREY)
        below.set_ylim(0, 1.1 * max(LARGEST, float(found.steps.max())))
        below.set_ylabel("step (voxels)")
        jumps = "vertical lines: jumps" if found.jumps else "no jumps"
        below.set_xlabel(f"slice; {jumps if found.told else 'too little could be measured'}")
        for axes in (above, below):
            for jump in found.jumps:
                axes.axvline(jump - 0.5, color=GREY, linewidth=0.6, zorder=0)

    return _png(draw, 3.6)


def noise_by_signal(curve: NoiseCurve) -> bytes:
    """Standard deviation of the noise by signal, with the model's curve."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _by_signal(axes, curve)
        axes.set_ylim(0, 1.15 * max(curve.sigma))

    return _png(draw, 2.6)


def training_curves(losses: Sequence[tuple[float, float]], looks: Sequence[tuple[float, float]]) -> bytes:
    """Loss by step, on what was learnt from; and on what was held out, where the least one is circled.

    First steps that are far above the rest are cut off.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if losses:
            axes.plot(*np.array(losses).T, color=COLOURS[0], linewidth=1.0, label="learnt from")
        if looks:
            steps, held_out = np.array(looks).T
            axes.plot(steps, held_out, ".-", color=COLOURS[1], linewidth=1.0, label="held out")
            best = int(held_out.argmin())
            axes.plot(steps[best], held_out[best], "o", color=COLOURS[1], fillstyle="none", markersize=9, label="best")
        values = np.array([loss for _, loss in (*losses, *looks)])
        low, typical, high = (float(found) for found in np.percentile(values, [0, 50, 100]))
        top = min(high, typical + MOST_ABOVE * (typical - low))
        if top > low:
            axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)

    return _png(draw, 2.6)


def curves(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    quantity: str,
    by: str,
    circled: tuple[ArrayLike, ArrayLike] = ((), ()),
    level: float | None = None,
    from_zero: bool = True,
) -> bytes:
    """A quantity by another, a line of (x, y) a name; some (x, y) circled, and a dashed line at some level.

    Few values are drawn as points too.
    """
    found = {name: (np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in _some(lines).items()}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, (x, y)), (colour, dashes) in zip(found.items(), _looks(found), strict=True):
            marker = "." if x.size <= MOST_POINTS else ""
            axes.plot(x, y, color=colour, linestyle=dashes, marker=marker, linewidth=1.2, label=_label(name))
        axes.plot(*circled, "o", color=ALARM, fillstyle="none", markersize=8)
        if level is not None:
            axes.axhline(level, color=BLACK, linestyle="--", linewidth=1.0)
        if from_zero:
            highest = [float(np.nanmax(y)) for _, y in found.values() if np.isfinite(y).any()]
            axes.set_ylim(0, 1.12 * max([0.0, *highest]) or 1.0)
        if len(found) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        axes.set_xlabel(_plain(by))
        axes.set_ylabel(_plain(quantity))

    return _png(draw, 2.6)


def histograms(values: Mapping[str, ArrayLike], quantity: str = "grey level") -> bytes:
    """How often each value is, a line a name, on one axis without the outermost thousandth of all values."""
    finite = {name: _finite(found) for name, found in _some(values).items()}
    pooled = np.concatenate(list(finite.values()))
    low, high = np.percentile(pooled, [0.1, 99.9]) if pooled.size else (0.0, 1.0)
    whole = all(np.asarray(found).dtype.kind in "iu" for found in values.values())
    step = max(1.0, np.ceil((high - low) / GREYS)) if whole else (high - low) / GREYS or 1.0  # no comb of empty levels
    edges = np.arange(low, high + 2 * step, step) - step / 2

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, found), (colour, _) in zip(finite.items(), _looks(finite), strict=True):
            share = np.histogram(found, edges)[0] / max(1, found.size) * 100
            axes.stairs(
                share, edges, color=colour, linewidth=1.3, fill=name == INPUT, alpha=0.5 if name == INPUT else 1
            )
        axes.set(xlabel=_plain(quantity), ylabel="voxels (%)", xlim=(edges[0], edges[-1]), ylim=(0, None))
        figure.legend(axes.patches, [_label(name) for name in finite], loc="outside right upper", frameon=False)

    return _png(draw, 2.6)


def bars(rows: Sequence[Row], column: Column) -> bytes:
    """One measure of the table: a bar a row from zero, with its value; a dashed line at the input's."""
    found = {row.method: row.values.get(column.name) for row in rows}
    lengths = [0.0 if value is None or not np.isfinite(value) else value for value in _some(found).values()]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        colours = [colour for colour, _ in _looks(found)]
        drawn = axes.barh(np.arange(1, len(found) + 1), lengths, height=0.65, color=colours)
        axes.bar_label(drawn, [column.text(value) for value in found.values()], padding=4)
        if INPUT in found and lengths[list(found).index(INPUT)]:
            axes.axvline(lengths[list(found).index(INPUT)], color=BLACK, linewidth=1, linestyle="--")
        _name_rows(axes, found)
        axes.margins(x=0.12)
        direction = f"; {column.better} is better" if column.better else ""
        axes.set_xlabel(_axis(column.name, column.unit) + direction)

    return _png(draw, 0.8 + 0.32 * len(found))


def _by_signal(axes: Axes, curve: NoiseCurve) -> None:
    signal = np.linspace(curve.signal[0], curve.signal[-1], 100)
    axes.plot(*curve.model.as_seen(signal), color=BLACK, linewidth=1.0, label="model")
    if curve.model.cut:
        axes.plot(signal, curve.model.sigma(signal), "--", color=BLACK, linewidth=1.0, label="before the cut")
    axes.plot(curve.signal, curve.sigma, "o", color=COLOURS[0], markersize=3, label="measured")
    axes.legend(frameon=False)
    axes.set_xlabel("signal (grey levels)")
    axes.set_ylabel("noise (grey levels)")


def _png(draw: Callable[[Figure], None], height_in: float) -> bytes:
    """What `draw` puts on a blank sheet. Raises InputError without matplotlib."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing figures needs matplotlib: pip install nrrn-pipeline[evaluation]") from error
    sheet = io.BytesIO()
    with style.context(["default", STYLE]):  # whatever the user's own style is
        figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)
        draw(figure)
        figure.savefig(sheet, format="png", metadata={"Software": None})
    return sheet.getvalue()


def _some(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if not values:
        raise ValueError("a figure needs one method or more")
    return values


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    flat: NDArray[np.float64] = np.asarray(values, float).ravel()
    return np.extract(np.isfinite(flat), flat)


def _centre(found: NDArray[Any]) -> int:
    """The flat index of lag 0. Raises ValueError if the map is not square."""
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ValueError(f"an autocorrelation has shape {found.shape}: it must be (n, n)")
    size = len(found)
    return size // 2 * (size + 1)


def _looks(names: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each one's colour and dashes, by its place among the methods."""
    fixed = {INPUT: (GREY, "-"), REFERENCE: (BLACK, "--")}
    free = cycle((colour, dashes) for dashes in DASHES for colour in COLOURS)
    return [fixed[name] if name in fixed else next(free) for name in names]


def _name_rows(axes: Axes, names: Mapping[str, Any]) -> None:
    """The first on top."""
    axes.set_yticks(np.arange(1, len(names) + 1), [_label(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _axis(quantity: str, unit: str) -> str:
    return _plain(f"{quantity} ({unit})" if unit else quantity)


def _label(name: str) -> str:
    """A name that fits beside its data."""
    return _plain(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}")


def _plain(text: str) -> str:
    """As it is: matplotlib would take what stands between two dollars for a formula."""
    return text.replace("$", r"\$")
