"""Arrays of a store's files: numbers of the dtypes and shapes that are asked for, mapped, and nothing else."""

import json
import os
import zlib

import numpy as np
import pytest

from mmpack.store.mapped_arrays import load_arrays, save_arrays
from mmpack.store.records import write_record

TYPES = {
    "one": ("int32", ("n",)),
    "none": ("int64", (0, 3)),
    "table": ("float64", ("columns", 4)),
    "flags?": ("bool", ("n",)),
}
ARRAYS = {
    "one": np.arange(1001, dtype=np.int32),
    "none": np.empty((0, 3), dtype=np.int64),
    "table": np.arange(24, dtype=np.float64).reshape(4, 6).T,  # not contiguous
}


def save(folder, **others):
    save_arrays(folder, "a", TYPES, {**ARRAYS, **others}, {"seed": 7})


def load(folder):
    return load_arrays(folder, "a", TYPES, {"seed": int})


def test_what_is_written_is_read_by_us_and_by_numpy(tmp_path):
    save(tmp_path, flags=np.ones(1001, dtype=bool))
    ours, values = load(tmp_path)
    assert values == {"seed": 7}
    assert list(ours) == [*ARRAYS, "flags"]
    for name, expected in ARRAYS.items():
        for read in (ours[name], np.load(tmp_path / f"a.{name}.npy", allow_pickle=False)):
            assert read.dtype == expected.dtype
            assert read.shape == expected.shape
            assert np.array_equal(read, expected)
        assert type(ours[name]) is np.ndarray
        assert ours[name].flags.aligned
        assert not ours[name].flags.writeable
        assert not ours[name].flags.owndata


def test_pages_are_the_files(tmp_path):
    """What is private to a process does not grow with an array, however much of it is read."""
    save_arrays(tmp_path, "big", {"x": ("int64", ("n",))}, {"x": np.arange(1 << 21)})
    before = own_bytes()
    read, _ = load_arrays(tmp_path, "big", {"x": ("int64", ("n",))})
    assert read["x"].sum() == (1 << 20) * ((1 << 21) - 1)
    assert own_bytes() - before < 4 << 20  # of 16 MiB


def own_bytes():
    try:
        lines = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    except OSError:
        pytest.skip("needs /proc/self/smaps_rollup")
    return 1024 * int(dict(line.split()[:2] for line in lines)["Anonymous:"])


def test_a_file_may_go_or_be_saved_again_while_it_is_read(tmp_path):
    save(tmp_path)
    ours, _ = load(tmp_path)
    save(tmp_path, one=np.zeros(1, dtype=np.int32))
    assert len(load(tmp_path)[0]["one"]) == 1
    os.unlink(tmp_path / "a.one.npy")
    assert np.array_equal(ours["one"], ARRAYS["one"])


def test_any_changed_byte_of_an_array_is_seen(tmp_path):
    save(tmp_path)
    path = tmp_path / "a.one.npy"
    data = path.read_bytes()
    for place in (0, 7, data.index(b"i4"), len(data) - 4 * 1001, len(data) - 1000, len(data) - 1):
        spoilt = bytearray(data)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"a\.one\.npy is damaged: .*pack again"):
            load(tmp_path)
    for content in (b"", data[:10], data[: len(data) // 2], data[:-1], data + b"\0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.one\.npy is damaged: .*pack again"):
            load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.one\.npy is damaged: it is missing"):
        load(tmp_path)


class Ran:
    """Code that a pickle would run."""

    def __reduce__(self):
        return os.mkdir, (str(Ran.folder),)


def crafted(kind, folder):
    """An array that is not the 1001 int32 that are expected."""
    Ran.folder = folder / "ran"
    return {
        "objects": lambda: np.array([Ran()] * 1001, dtype=object),
        "a record": lambda: np.zeros(1001, dtype=[("a", "<i4")]),
        "a record of objects": lambda: np.zeros(1001, dtype=[("a", "O")]),
        "text": lambda: np.zeros(1001, dtype="S4"),
        "times": lambda: np.zeros(1001, dtype="M8[s]"),
        "complex": lambda: np.zeros(1001, dtype=np.complex64),
        "of the other byte order": lambda: np.zeros(1001, dtype=">i4"),
        "unsigned": lambda: np.zeros(1001, dtype=np.uint32),
        "of another shape": lambda: np.zeros((1001, 1), dtype=np.int32),
        "by columns": lambda: np.asfortranarray(np.zeros((7, 143), dtype=np.int32)),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "objects",
        "a record",
        "a record of objects",
        "text",
        "times",
        "complex",
        "of the other byte order",
        "unsigned",
        "of another shape",
        "by columns",
    ],
)
def test_other_dtypes_are_refused_whoever_sealed_them(kind, tmp_path):
    """Objects above all: their bytes would be Python's pointers."""
    save(tmp_path)
    path = tmp_path / "a.one.npy"
    np.save(path, crafted(kind, tmp_path), allow_pickle=True)
    seal(tmp_path, one={"shape": [1001], "crc32": zlib.crc32(path.read_bytes()[-4 * 1001 :])})
    with pytest.raises(ValueError, match=r"a\.one\.npy is damaged: .*pack again") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_an_int32_header_over_pointers_is_refused(tmp_path):
    """As the reader before took it: object where the header says so, over bytes that are no pickle."""
    save(tmp_path)
    path = tmp_path / "a.one.npy"
    path.write_bytes(path.read_bytes().replace(b"'<i4'", b"'|O' "))
    with pytest.raises(ValueError, match="Python objects"):
        load(tmp_path)


def seal(folder, **changes):
    """The record with other entries and the right checksum."""
    record = json.loads((folder / "a.json").read_text())
    record.pop("checksum of this file")
    record["arrays"] |= changes
    write_record(folder / "a.json", record)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"one": {"shape": [1 << 61], "crc32": 0}}, "a.one.npy is damaged: it has int32"),
        ({"one": {"shape": [-1], "crc32": 0}}, "is -1, not an integer from 0"),
        ({"one": {"shape": [1001]}}, "'arrays'.'one'.'crc32' is missing"),
        ({"one": {"shape": [1001, 2], "crc32": 0}}, r"one has shape \(1001, 2\), not \('n',\)"),
        ({"flags": {"shape": [7], "crc32": 0}}, r"flags has shape \(7,\)"),
        ({"more": {"shape": [7], "crc32": 0}}, "'arrays'.'more' is not known"),
        ({"../one": {"shape": [7], "crc32": 0}}, "is not known"),
        ({"one": None}, "'arrays'.'one' is None, not an object"),
    ],
)
def test_a_record_fits_its_schema(change, why, tmp_path):
    save(tmp_path)
    seal(tmp_path, **change)
    with pytest.raises(ValueError, match=f"{why}.*; pack again with --overwrite"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.one.npy"])
def test_only_regular_files_are_opened(name, tmp_path):
    save(tmp_path)
    path = tmp_path / name
    for make, kind in (
        (os.mkfifo, "a named pipe"),
        (os.mkdir, "a folder"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
    ):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(ValueError, match=f"is {kind}, not a regular file"):
            load(tmp_path)
