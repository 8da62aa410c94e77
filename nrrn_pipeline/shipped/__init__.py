"""Weights files, wherever they are: on paths, behind URLs, or shipped with this package and known by their names.

Beside each that is shipped lies its model card, NAME.md.
"""

from __future__ import annotations

import os
from importlib.resources import files

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import MAX_BYTES, NO_WEIGHTS
from nrrn_pipeline.places import absolute

SUFFIX = ".safetensors"
SHIPPED = tuple(
    sorted(file.name.removesuffix(SUFFIX) for file in files(__name__).iterdir() if file.name.endswith(SUFFIX))
)


def located(weights: str | os.PathLike[str]) -> str:
    """The name of shipped weights as it is; else the URL, or the absolute path. Raises InputError as absolute does."""
    return weights if isinstance(weights, str) and weights in SHIPPED else absolute(weights)


def read_weights(url: str) -> bytes:
    """The weights file at what `located` gives. Raises InputError if there is none, or it is too large for one."""
    if url in SHIPPED:
        return files(__name__).joinpath(f"{url}{SUFFIX}").read_bytes()
    data = storage.read_agreed(url, MAX_BYTES)
    if data is None:
        raise InputError(f"{NO_WEIGHTS.format(url)}, or the name of one that is shipped: {', '.join(SHIPPED)}")
    if len(data) == MAX_BYTES:
        raise InputError(f"{url} is no weights file: it has {MAX_BYTES} bytes or more")
    return data


def model_card(name: str) -> str:
    """What shipped weights were made from, how, and what for: Markdown."""
    return files(__name__).joinpath(f"{name}.md").read_text()
