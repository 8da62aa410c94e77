"""One HTML file that reports on something: its measures, its pictures side by side, its figures, and how it was made.

The file needs no network and no server. Its content security policy lets run nothing but the script and the style that
are written here, so that no name, path or figure shown on the page can bring its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import groupby, starmap
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline import storage
from nrrn_pipeline.places import absolute

INPUT, REFERENCE, DENOISED, REMOVED = "input", "reference", "denoised", "removed"
LIMIT = 3  # standard deviations of what was removed, from middle grey to white
ZOOMS = {"0.25": "1:4", "0.5": "1:2", "1": "1:1", "2": "2:1", "3": "3:1", "4": "4:1", "6": "6:1", "8": "8:1"}
NOTHING = "\N{EN DASH}"
ARROWS = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}"}


@dataclass(frozen=True)
class Column:
    """One measure: its name, its unit, which values of it are better, and how many decimals are shown."""

    name: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    decimals: int = 2

    def text(self, value: float | None) -> str:
        """The value as the table shows it; a dash if there is none or it is no number."""
        if value is None or math.isnan(value):
            return NOTHING
        return f"{value:.{self.decimals}f}".replace("inf", "\N{INFINITY}")

    def best(self, rows: Sequence[Row]) -> str | None:
        """How the table shows the best value, which rows that show the same share; None if all are alike."""
        values = [value for row in rows if (value := row.values.get(self.name)) is not None and not math.isnan(value)]
        if self.better is None or len({self.text(value) for value in values}) < 2:
            return None
        return self.text(max(values) if self.better == "higher" else min(values))


@dataclass(frozen=True)
class Row:
    """The measures of one method by the names of their columns; what was not measured is None or left out."""

    method: str
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Figure:
    """PNG or SVG bytes and what they show, under a title. Raises ValueError for bytes that are neither."""

    image: bytes
    caption: str
    title: str = "Figures"

    def __post_init__(self) -> None:
        if self.kind is None:
            raise ValueError(f"a figure must be PNG or SVG, but it begins with {self.image[:16]!r}")

    @property
    def kind(self) -> str | None:
        """Its media type."""
        if self.image.startswith(b"\x89PNG\r\n\x1a\n"):
            return "image/png"
        return "image/svg+xml" if self.image.lstrip().startswith((b"<svg", b"<?xml")) else None


@dataclass(frozen=True)
class Report:
    """What the page shows. Raises ValueError if a view's pictures differ in shape, or views in what they show.

    views: by name, the same (y, x) slice of every method, in any dtype, the input's as "input" among them; "reference"
    and "removed" are no methods. The last method is what the page first compares with the input.
    rows: begin with the input, as method "input". Without columns there is no table.
    warnings: what a reader must know before all else. folded: facts under titles, which a click unfolds.
    at_a_glance: pictures stand before the table, and figures two abreast.
    """

    title: str
    facts: Mapping[str, str]
    views: Mapping[str, Mapping[str, NDArray[Any]]]
    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    folded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    at_a_glance: bool = False

    def __post_init__(self) -> None:
        if len({tuple(view) for view in self.views.values()}) != 1:
            raise ValueError("all views must show the same methods in the same order, and there must be a view")
        if INPUT not in self.names:
            raise ValueError(f"there is no image {INPUT!r} among {', '.join(self.names) or 'none'}")
        for view, pictures in self.views.items():
            shapes = {picture.shape for picture in pictures.values()}
            if len(shapes) > 1 or len(next(iter(shapes))) != 2:
                raise ValueError(f"images of {view!r} are of shapes {sorted(shapes)}: they must be one (y, x) slice")

    @property
    def names(self) -> list[str]:
        """Of what each view shows."""
        return list(next(iter(self.views.values())))

    def all_of(self, name: str) -> NDArray[Any]:
        """The voxels of its pictures in all views, in one line."""
        return np.concatenate([view[name].ravel() for view in self.views.values()])


def compared(before: NDArray[Any], after: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The (y, x) pictures of a view: a slice before and after, and what was removed."""
    return {INPUT: before, DENOISED: after, REMOVED: np.subtract(before, after, dtype=np.float32)}


def write_page(location: str | os.PathLike[str], report: Report) -> None:
    """One HTML file, complete in itself; it opens in any browser, also from disk."""
    storage.write_file(absolute(location), html_of(report).encode())


def html_of(report: Report) -> str:
    """The page."""
    style, script = (resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = _shown(report.title)
    measures = f"{_table(report.columns, report.rows)}\n{_notes(report.notes)}"
    pictures = f"{_comparison(report)}\n{_gallery(report)}"
    first, second = (pictures, measures) if report.at_a_glance else (measures, pictures)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{_warnings(report.warnings)}
{_facts(report.facts)}
</header>
{first}
{second}
{_figures(report.figures, "abreast" if report.at_a_glance else "")}
{_folded(report.folded)}
</main>
<script>{script}</script>
</body>
</html>
"""


def grey_levels(image: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """The (y, x) image as 8 bit, `low` black and `high` white; what is no number is black."""
    scaled = (image.astype(np.float32) - low) / max(high - low, 1e-6) * 255
    levels: NDArray[np.uint8] = np.clip(np.nan_to_num(scaled), 0, 255).astype(np.uint8)
    return levels


def display_range(image: NDArray[Any]) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile of its finite pixels; 0 and 1 if it has none."""
    finite = image[np.isfinite(image)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(finite, [0.5, 99.5])
    return float(low), float(high)


def _warnings(warnings: Sequence[str]) -> str:
    items = "\n".join(f"<li>{_shown(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings" role="alert">\n{items}\n</ul>' if warnings else ""


def _facts(facts: Mapping[str, str]) -> str:
    pairs = "\n".join(f"<div><dt>{_shown(name)}</dt><dd>{_shown(text)}</dd></div>" for name, text in facts.items())
    return f"<dl>\n{pairs}\n</dl>" if facts else ""


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    if not columns:
        return ""
    best = [column.best(rows) for column in columns]
    body = "\n".join(
        f'<tr{" class=input" if row.method == INPUT else ""}><th scope="row">{_shown(row.method)}</th>'
        + "".join(_cell(column, row, text) for column, text in zip(columns, best, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"""<section aria-labelledby="measures">
<h2 id="measures">Measures</h2>
<div class="wide" tabindex="0" role="region" aria-labelledby="measures">
<table>
<caption>The best value of each column is marked. A click on a column's name sorts by it.</caption>
<thead><tr>
<th scope="col" aria-sort="none"><button type="button">method</button></th>{"".join(map(_head, columns))}
</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</section>"""


def _head(column: Column) -> str:
    arrow = better = ""
    if column.better is not None:
        arrow = f' <span aria-hidden="true">{ARROWS[column.better]}</span>'
        better = f' title="{column.better} is better" data-first="{"de" if column.better == "higher" else "a"}scending"'
    unit = f' <span class="unit">[{_shown(column.unit)}]</span>' if column.unit else ""
    return (
        f'<th scope="col" class="number" aria-sort="none"{better}>'
        f'<button type="button">{_shown(column.name)}{unit}{arrow}</button></th>'
    )


def _cell(column: Column, row: Row, best: str | None) -> str:
    value = row.values.get(column.name)
    text = column.text(value)
    exact = "" if value is None or math.isnan(value) else str(float(value)).replace("inf", "Infinity")
    shown = f'<strong>{text}</strong><span class="unseen"> (best)</span>' if text == best else text
    return f'<td class="number" data-value="{exact}">{shown}</td>'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "\n".join(f"<li>{_shown(note)}</li>" for note in notes)
    return f'<section aria-labelledby="notes">\n<h2 id="notes">Notes</h2>\n<ul>\n{items}\n</ul>\n</section>'


def _comparison(report: Report) -> str:
    names = report.names
    methods = [number for number, name in enumerate(names) if name not in (INPUT, REFERENCE, REMOVED)]
    left, right = names.index(INPUT), methods[-1] if methods else names.index(INPUT)
    several = "" if len(report.views) > 1 else " hidden"
    zooms = "".join(f'<option value="{zoom}">{text}</option>' for zoom, text in ZOOMS.items())
    return f"""<section id="compare" aria-labelledby="comparison" hidden>
<h2 id="comparison">Side by side</h2>
<div class="controls">
<label{several}>slice <select id="which">{_options(list(report.views), 0)}</select></label>
<label>left <select id="left">{_options(names, left)}</select></label>
<button type="button" id="swap">swap</button>
<label>right <select id="right">{_options(names, right)}</select></label>
<label>zoom <select id="zoom">{zooms}</select></label>
</div>
<div class="desk">
<div id="view" tabindex="0" role="group" aria-label="Both images. Arrow keys move them when they are
 larger than the frame, plus and minus zoom.">
<div class="side" data-side="right"><img alt=""><span class="name"></span></div>
<div class="side" data-side="left"><img alt=""><span class="name"></span></div>
<div id="lens" aria-hidden="true"></div>
<div id="divider" tabindex="0" role="slider" aria-label="Divider between the images" aria-orientation="horizontal"
 aria-valuemin="0" aria-valuemax="100" aria-valuenow="50"></div>
</div>
<div class="details" aria-hidden="true">
<figure data-side="left"><div class="detail"><img alt=""></div><figcaption class="name"></figcaption></figure>
<figure data-side="right"><div class="detail"><img alt=""></div><figcaption class="name"></figcaption></figure>
</div>
</div>
<p class="hint">Drag the divider, or focus it and use the arrow keys. At a zoom that exceeds the frame, drag the image
itself. 1:1 is one voxel a pixel of the screen. The two details show the same place, 6 times enlarged, and follow the
pointer.</p>
</section>"""


def _options(names: Sequence[str], chosen: int) -> str:
    return "".join(
        f'<option value="{number}"{" selected" if number == chosen else ""}>{_shown(name)}</option>'
        for number, name in enumerate(names)
    )


def _gallery(report: Report) -> str:
    source = REFERENCE if REFERENCE in report.names else INPUT
    low, high = display_range(report.all_of(source))
    ranges = dict.fromkeys(report.names, (low, high))
    removed = ""
    if REMOVED in report.names:
        limit = LIMIT * float(np.std(report.all_of(REMOVED), dtype=np.float64)) or 1.0
        ranges[REMOVED] = -limit, limit
        removed = f" Of what was removed, middle grey is nothing, black {limit:.4g} below, white as much above."
    items = "\n".join(
        _thumbnail(number, f"{view}: {name}", name, grey_levels(picture, *ranges[name]))
        for number, (view, pictures) in enumerate(report.views.items())
        for name, picture in pictures.items()
    )
    return f"""<section aria-labelledby="images">
<h2 id="images">The same slice</h2>
<p class="hint">One grey scale for all: black is {low:.4g}, white {high:.4g}, the 0.5th and 99.5th percentile of the
{source}.{removed}</p>
<div id="gallery">
{items}
</div>
</section>"""


def _thumbnail(view: int, told: str, name: str, grey: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", optimize=True)
    height, width = grey.shape
    source = _data_url("image/png", buffer.getvalue())
    return (
        f'<figure data-view="{view}"><img src="{source}" width="{width}" height="{height}" alt="{_shown(told)}">'
        f"<figcaption>{_shown(name)}</figcaption></figure>"
    )


def _figures(figures: Sequence[Figure], kind: str) -> str:
    """A section a title, its figures in a division of that kind."""
    numbered = enumerate(figures, start=1)
    groups = enumerate(groupby(numbered, key=lambda each: each[1].title), start=1)
    return "\n".join(
        f'<section aria-labelledby="figures-{number}">\n<h2 id="figures-{number}">{_shown(title)}</h2>\n'
        + f'<div class="{kind}">\n'
        + "\n".join(starmap(_figure, group))
        + "\n</div>\n</section>"
        for number, (title, group) in groups
    )


def _figure(number: int, figure: Figure) -> str:
    return (
        f'<figure class="plot"><img src="{_data_url(str(figure.kind), figure.image)}" alt="Figure {number}">'
        f"<figcaption><b>Figure {number}.</b> {_shown(figure.caption)}</figcaption></figure>"
    )


def _folded(folded: Mapping[str, Mapping[str, str]]) -> str:
    return "\n".join(
        f"<details>\n<summary>{_shown(title)}</summary>\n{_facts(facts)}\n</details>" for title, facts in folded.items()
    )


def _shown(text: str) -> str:
    """As text of HTML; what is invisible, reverses the text or is no Unicode is shown by its code."""
    return html.escape(
        "".join(c if c.isprintable() or c.isspace() else c.encode("unicode_escape").decode() for c in text)
    )


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _hash(text: str) -> str:
    """As a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
