"""Arrays in one file, .npz, that processes look at without a copy of their own.

numpy reads the file as any other. Here its arrays, which lie at multiples of 64 bytes, are views of the
mapped file: a rank's memory does not grow with the data set, and ranks of a machine share its pages.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ALIGNMENT = 64
_HEADER = 30  # bytes of a zip member before its name
_LARGE = 20  # of the field that holds sizes beyond 4 GiB, which is always written
_PADDING = 0xD935  # the id that Android's zipalign gives the field it pads with
_npy: Any = np.lib.format  # its functions have no types


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, ArrayLike]) -> None:
    """Write arrays as `numpy.savez` does, each at a multiple of 64 bytes."""
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")
            start = file.tell() + _HEADER + len(member.filename) + _LARGE + 4
            gap = -start % _ALIGNMENT
            member.extra = struct.pack("<HH", _PADDING, gap) + bytes(gap)
            with archive.open(member, "w", force_zip64=True) as out:
                _npy.write_array(out, np.asarray(values, order="C"), allow_pickle=False)


def load_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Every array of an .npz, read-only views of the file where it is as `save_arrays` wrote it; all of
    it is compared with the zip's checksums.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            return {
                member.filename.removesuffix(".npy"): _array_of(member, archive, mapped)
                for member in archive.infolist()
            }
    except FileNotFoundError:
        raise ValueError(f"cannot read {path}: there is no such file") from None
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for damage
        raise ValueError(f"{path} is damaged: {error}; pack again with --overwrite") from None


def _array_of(
    member: zipfile.ZipInfo, archive: zipfile.ZipFile, mapped: memoryview
) -> NDArray[Any]:
    lengths = struct.unpack_from("<HH", mapped, member.header_offset + _HEADER - 4)
    begin = member.header_offset + _HEADER + sum(lengths)
    if member.compress_type != zipfile.ZIP_STORED or begin % _ALIGNMENT:
        other: NDArray[Any] = np.load(io.BytesIO(archive.read(member)), allow_pickle=False)
        return other
    data = mapped[begin : begin + member.file_size]
    if zlib.crc32(data) != member.CRC:
        raise ValueError(f"{member.filename} is not what was written")
    header = io.BytesIO(data[:4096])
    if _npy.read_magic(header) != (1, 0):
        raise ValueError(f"{member.filename} has a header of another version")
    shape, is_fortran, dtype = _npy.read_array_header_1_0(header)
    array: NDArray[Any] = np.ndarray(shape[:: -1 if is_fortran else 1], dtype, data, header.tell())
    return array.T if is_fortran else array
