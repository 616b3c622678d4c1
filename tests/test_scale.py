"""Memory of `mmpack pack` at a million rows and ten thousand shards: `-m slow`, for minutes."""

import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from tar_files import write_tar

from mmpack.store.encoded_store import open_store


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (56, 28), "teal").save(file, "JPEG")
    return file.getvalue()


def turns(number):
    values = ("What is it?", f"number {number}")
    return {
        "messages": [
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), values)
        ]
    }


def lines(folder, rows):
    """JSON lines of text."""
    path = folder / f"{rows}.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(turns(number)) + "\n" for number in range(rows))
    return path


def shards(folder, count):
    """Tar files of 20 samples with an image each; ten different ones, under many names."""
    place = folder / f"{count} shards"
    place.mkdir()
    picture = jpeg()
    for number in range(count):
        path = place / f"{number:05d}.tar"
        if number < 10:
            members = []
            for key in range(20):
                row = turns(key + 20 * number)
                row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
                members += [(f"{key:04d}.jpg", picture), (f"{key:04d}.json", row)]
            write_tar(path, members)
        else:
            os.link(place / f"{number % 10:05d}.tar", path)
    return place


def packed(data, tokenizer, out, *options):
    """Pack in a process of its own: (the store, the peak memory in bytes of the largest of its processes)."""
    words = [sys.executable, "-m", "mmpack", "pack", str(data), "--tokenizer", str(tokenizer)]
    words += ["--capacity", "8192", "--quiet", "--out", str(out), *options]
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return open_store(out), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "few", "many", "rows_each", "bytes_each"),
    [(lines, 10_000, 1_000_000, 1, 400), (shards, 100, 10_000, 20, 32 << 10)],
    ids=["rows", "shards"],
)
def test_memory_is_bounded(make, few, many, rows_each, bytes_each, shared, tmp_path):
    """What a hundred times the data adds to the peak, beside the pages of the store's own file, which is mapped to
    make the plan: what a plan keeps of a row, or what is kept of a shard; not the rows."""
    peaks, sizes = [], []
    for count in (few, many):
        out = tmp_path / f"packed {count}"
        store, peak = packed(make(tmp_path, count), shared / "tokenizer" / "qwen2_vl", out)
        assert len(store) == count * rows_each
        peaks.append(peak)
        sizes.append((out / "samples.arrow").stat().st_size)
    added = peaks[1] - peaks[0] - (sizes[1] - sizes[0])
    print(f"{make.__name__}: peaks {peaks}, samples.arrow {sizes}, {added / (many - few):.0f} each")
    assert added < bytes_each * (many - few)
