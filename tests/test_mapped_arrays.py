import os
import zipfile

import numpy as np
import pytest

from mmpack.store.mapped_arrays import load_arrays, save_arrays

ARRAYS = {
    "one": np.arange(1001, dtype=np.int32),
    "a number": np.array(7),
    "none": np.empty((0, 3), dtype=np.int64),
    "table": np.arange(24, dtype=np.float64).reshape(4, 6).T,  # not contiguous
    "x" * 70: np.array([True, False]),
}


def test_what_is_written_is_read_by_us_and_by_numpy(tmp_path):
    save_arrays(tmp_path / "a.npz", ARRAYS)
    ours = load_arrays(tmp_path / "a.npz")
    theirs = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert list(ours) == list(theirs) == list(ARRAYS)
    for name, values in ARRAYS.items():
        for read in (ours[name], theirs[name]):
            assert read.dtype == values.dtype
            assert read.shape == values.shape
            assert np.array_equal(read, values)
        assert ours[name].flags.aligned
        assert not ours[name].flags.writeable
        assert not ours[name].flags.owndata


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_is_read(save, tmp_path):
    arrays = {**ARRAYS, "columns first": np.asfortranarray(np.arange(6).reshape(2, 3))}
    save(tmp_path / "a.npz", **arrays)
    ours = load_arrays(tmp_path / "a.npz")
    assert all(np.array_equal(ours[name], values) for name, values in arrays.items())


def test_a_file_may_go_while_it_is_read(tmp_path):
    save_arrays(tmp_path / "a.npz", ARRAYS)
    ours = load_arrays(tmp_path / "a.npz")
    os.unlink(tmp_path / "a.npz")
    assert np.array_equal(ours["one"], ARRAYS["one"])


def test_any_changed_byte_of_an_array_is_seen(tmp_path):
    save_arrays(tmp_path / "a.npz", {"one": ARRAYS["one"]})
    data = (tmp_path / "a.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        (member,) = archive.infolist()
    end = data.index(b"PK\x01\x02")  # of the member, where the list of members begins
    for place in {end - 1, end - 1000, end - member.file_size, end - member.file_size + 20}:
        spoilt = bytearray(data)
        spoilt[place] ^= 1
        (tmp_path / "b.npz").write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"b\.npz is damaged: .*pack again"):
            load_arrays(tmp_path / "b.npz")
    for length in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "b.npz").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"b\.npz is damaged"):
            load_arrays(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="there is no such file"):
        load_arrays(tmp_path / "c.npz")
