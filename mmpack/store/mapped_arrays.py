"""Memory-mapped arrays, shared by processes without copies: one `.npy` file per array.

A rank's memory does not grow with the data set, and the ranks of a machine share the files' pages. numpy reads and
writes the files. The reader defines dtypes and dimensions, so a file cannot contain others or Python objects.
(safetensors would copy the arrays.) The record `NAME.json` beside the arrays holds their checksums and a few
scalar values.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmpack.regular_files import regular_stat
from mmpack.store.records import damaged, read_record, write_record

_npy: Any = np.lib.format  # its functions have no types
# The dtype and dimensions of an expected array. A dimension given by name is equal in all arrays that use it.
ArrayType = tuple[Literal["bool", "int32", "int64", "float32", "float64"], tuple[int | str, ...]]


def save_arrays(
    folder: str | os.PathLike[str],
    name: str,
    types: Mapping[str, ArrayType],
    arrays: Mapping[str, ArrayLike],
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write arrays as `NAME.ARRAY.npy` and, last, `NAME.json`. Existing files are replaced, not overwritten, so
    that processes that have mapped one keep it."""
    folder, record = Path(folder), {}
    for array_name, given in arrays.items():
        dtype = _dtype(types[_key(types, array_name)])
        array = np.asarray(given, dtype, order="C")
        path = _path(folder, name, array_name)
        path.unlink(missing_ok=True)
        np.save(path, array, allow_pickle=False)
        record[array_name] = {"shape": list(array.shape), "crc32": zlib.crc32(_bytes(array))}
    (folder / f"{name}.json").unlink(missing_ok=True)
    write_record(folder / f"{name}.json", {"arrays": record, **(values or {})})


def load_arrays(
    folder: str | os.PathLike[str],
    name: str,
    types: Mapping[str, ArrayType],
    values: Mapping[str, Any] | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read (arrays, values) that `save_arrays` wrote. The arrays are read-only views of mapped files; all
    checksums are checked.

    Args:
        types: the expected arrays; a name that ends with "?" is optional.
        values: the schema of the values (`mmpack.store.records`).

    Raises:
        ValueError: a file is missing, not a regular file, damaged, or has another dtype or other dimensions.
    """
    folder = Path(folder)
    path = folder / f"{name}.json"
    of_array = {"shape": [range(1 << 62)], "crc32": range(1 << 32)}
    schema = {"arrays": dict.fromkeys(types, of_array), **(values or {})}
    record = read_record(path, schema)
    arrays: dict[str, NDArray[Any]] = {}
    sizes: dict[str, int] = {}
    for array_name, saved in record.pop("arrays").items():
        dtype, dimensions = types[_key(types, array_name)]
        shape = tuple(saved["shape"])
        expected = tuple(
            sizes.setdefault(size, found) if isinstance(size, str) else size
            for size, found in zip(dimensions, shape)
        )
        if len(shape) != len(dimensions) or shape != expected:
            raise damaged(path, f"{array_name} has shape {shape}, not {dimensions}")
        file = _path(folder, name, array_name)
        arrays[array_name] = _mapped(file, _dtype((dtype, ())), shape, saved["crc32"])
    return arrays, record


def array_files(folder: Path, name: str) -> list[Path]:
    """The files that `save_arrays` wrote."""
    return [folder / f"{name}.json", *sorted(folder.glob(f"{name}.*.npy"))]


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], crc32: int) -> NDArray[Any]:
    try:
        size = regular_stat(path).st_size
        array = _npy.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except Exception as error:  # numpy raises many kinds for a bad header
        raise damaged(path, f"{error}") from None
    written = array.offset + array.nbytes
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise damaged(path, f"it has {array.dtype} {array.shape}, not {dtype} {shape}")
    if size != written:
        raise damaged(path, f"it has {size:,} bytes, {written:,} were written")
    if zlib.crc32(_bytes(array)) != crc32:
        raise damaged(path, "its bytes have changed")
    return np.asarray(array)  # not a memmap, whose views are slower


def _path(folder: Path, name: str, array_name: str) -> Path:
    return folder / f"{name}.{array_name}.npy"


def _key(types: Mapping[str, ArrayType], array_name: str) -> str:
    return array_name if array_name in types else f"{array_name}?"


def _dtype(type: ArrayType) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(type[0]).newbyteorder("<")
    return dtype


def _bytes(array: NDArray[Any]) -> Any:
    return array.reshape(-1).view(np.uint8).data
