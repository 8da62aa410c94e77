"""MRC and CCP4 maps (Cheng et al. 2015, MRC2014): a header, then slices one after the other; the header by mrcfile."""

from __future__ import annotations

from typing import Any

import numpy as np
from mrcfile import dtypes, utils

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.formats.parts import Found, Raw, opened, refuse_cut_short, refuse_unfit, size_of
from nrrn_pipeline.ome import nm_of

SUFFIXES = (".mrc", ".mrcs", ".map", ".rec", ".st", ".ccp4")
IMOD_PLACE, IMOD_STAMP = 152, 1146047817  # where in the header IMOD says whether its bytes have a sign
ORDER = (1, 2, 3)  # columns, rows, sections along x, y, z


def find_mrc(url: str) -> Found:
    """What is in an MRC file. Raises InputError if it is none, damaged, cut short, or has its axes in another order."""
    data = _header(url)
    notes = []
    try:
        header = np.frombuffer(data, dtypes.HEADER_DTYPE).reshape(()).view(np.recarray)
        order: Any = utils.byte_order_from_machine_stamp(header.machst) if any(header.machst) else "<"
        header = header.view(header.dtype.newbyteorder(order)).view(np.recarray)
        stored = utils.data_dtype_from_header(header).newbyteorder(order)
        shape = tuple(int(size) for size in (header.nz, header.ny, header.nx))
        axes = tuple(int(axis) for axis in (header.mapc, header.mapr, header.maps))
        offset = header.dtype.itemsize + int(header.nsymbt)
        sampled = {"z": header.mz, "y": header.my, "x": header.mx}
        angstrom = [float(header.cella[axis]) / int(count) if count > 0 else None for axis, count in sampled.items()]
        stamp, flags = np.frombuffer(data, np.dtype("i4").newbyteorder(order), 2, IMOD_PLACE)
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise InputError(f"{url} is no MRC file, or a damaged one: {error}") from error
    if axes not in (ORDER, (0, 0, 0)):
        raise InputError(f"{url} has its axes in the order {axes}: expected {ORDER}, x fastest; convert it")
    if stored == np.int8 and stamp == IMOD_STAMP and not flags & 1:
        stored = np.dtype("u1")  # IMOD's bytes, unless it says that they have a sign
    elif stored == np.int8:
        notes.append(f"{url} holds bytes, which are signed by the standard (-128 to 127), but not of every program")
    if angstrom == [1.0, 1.0, 1.0]:
        angstrom = [None] * 3
        notes.append(f"{url} gives voxels of 1 x 1 x 1 angstrom, which means that their size is not known")
    part = Raw(url, refuse_unfit(url, shape, "its shape"), stored.str, offset)
    wanted = offset + int(np.prod(shape, dtype=object)) * stored.itemsize
    with opened(url) as file:
        refuse_cut_short(url, size_of(file), wanted)
    return Found(part, nm_of(angstrom, ["angstrom"] * 3), tuple(notes))


def _header(url: str) -> bytes:
    size = dtypes.HEADER_DTYPE.itemsize
    data = storage.read_file(url, 0, size)
    if data is None:
        raise InputError(f"no volume at {url}: there is nothing there")
    if len(data) < size:
        raise InputError(f"{url} is no MRC file: it ends within its header")
    return data
