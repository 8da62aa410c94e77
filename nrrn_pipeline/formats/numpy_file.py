"""NumPy's .npy files."""

from __future__ import annotations

from typing import Any

import numpy as np

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.formats.parts import Found, Raw, opened, refuse_cut_short, refuse_unfit, size_of

SUFFIXES = (".npy",)


def find_npy(url: str) -> Found:
    """What is in a .npy file. Raises InputError if it is none, holds objects, is in Fortran's order or cut short."""
    with opened(url) as file:
        try:
            headers: Any = np.lib.format
            first = headers.read_magic(file) == (1, 0)
            read = headers.read_array_header_1_0 if first else headers.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except (ValueError, EOFError) as error:
            raise InputError(f"{url} is no .npy file, or a damaged one: {error}") from error
        offset, size = file.tell(), size_of(file)
    if fortran or dtype.hasobject:
        raise InputError(f"{url} is in Fortran's order, or holds objects: save numpy.ascontiguousarray of it")
    wanted = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    refuse_cut_short(url, size, wanted)
    return Found(Raw(url, refuse_unfit(url, shape, "its shape"), dtype.str, offset))
