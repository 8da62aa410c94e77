"""Slices as they are, a voxel a pixel: side by side, and what was taken out of one."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nrrn_pipeline.report.page import LIMIT, display_range, grey_levels

MARGIN, CAPTION = 8, 26  # pixels


def save_panels(path: str | os.PathLike[str], panels: dict[str, NDArray[Any]], enlarge: int = 1) -> None:
    """A PNG of (y, x) images in one row, each under its caption.

    One grey scale serves all, from the 0.5th to the 99.5th percentile of the last one, so that what differs is the
    data and not the display.
    """
    low, high = display_range(list(panels.values())[-1])
    height, width = (enlarge * length for length in next(iter(panels.values())).shape)
    sheet = Image.new("L", (len(panels) * (width + MARGIN) + MARGIN, height + CAPTION + MARGIN), 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, (caption, image) in enumerate(panels.items()):
        picture = Image.fromarray(grey_levels(image, low, high)).resize((width, height), Image.Resampling.NEAREST)
        left = MARGIN + column * (width + MARGIN)
        sheet.paste(picture, (left, CAPTION))
        draw.text((left, 3), caption, fill=0, font=font)
    sheet.save(path)


def removed_picture(residual: NDArray[Any]) -> tuple[bytes, float]:
    """What was taken out of a (y, x) slice, as PNG, and the grey levels from its middle grey, nothing, to its white.

    These are LIMIT standard deviations.
    """
    limit = LIMIT * float(np.std(residual)) or 1.0
    sheet = io.BytesIO()
    Image.fromarray(grey_levels(residual, -limit, limit)).save(sheet, "PNG")
    return sheet.getvalue(), limit
