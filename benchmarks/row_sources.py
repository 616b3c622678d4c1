"""The real rows as JSON lines, Parquet and tar shards, and what reads them: `Encoder.read` and the peers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.harness import SHARED

REALSET = SHARED / "realset" / "realset_sft.json"


def write_sources(rows: list[Any], folder: Path) -> dict[str, Path]:
    """The same rows as JSON lines, as Parquet and as tar shards."""
    import pyarrow
    import pyarrow.parquet

    lines, parquet, shards = folder / "rows.jsonl", folder / "rows.parquet", folder / "shards"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    lines.write_text(text, encoding="utf-8")
    images = [[(REALSET.parent / path).read_bytes() for path in row["images"]] for row in rows]
    turns = [row["conversations"] for row in rows]
    table = {
        "conversations": turns,
        "images": [[{"bytes": data} for data in own] for own in images],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), parquet, row_group_size=64)
    shards.mkdir()
    for first in range(0, len(rows), 128):
        with tarfile.open(shards / f"{first // 128:03d}.tar", "w") as tar:
            for number in range(first, min(first + 128, len(rows))):
                row = json.dumps({"conversations": turns[number]}, ensure_ascii=False).encode()
                members = [("json", row)]
                for place, (path, data) in enumerate(zip(rows[number]["images"], images[number])):
                    members.append((f"{place}{Path(path).suffix}", data))
                for extension, data in members:
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return {
        "JSON lines": lines, "Parquet": parquet, "a datasets stream": parquet, "tar shards": shards,
    }  # fmt: skip


def opened(source: Path | str, name: str) -> Any:
    """What `Encoder.read` takes."""
    return datasets_stream(Path(source)) if name == "a datasets stream" else source


def datasets_stream(parquet: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(parquet), split="train", streaming=True)


def read_by_datasets(parquet: Path) -> int:
    """Number of rows, with the sizes of their images."""
    from PIL import Image

    count = 0
    for row in datasets_stream(parquet):
        [Image.open(io.BytesIO(one["bytes"])).size for one in row["images"]]
        count += bool(row["conversations"])
    return count


def read_by_webdataset(shards: Path) -> int:
    """Number of rows, with the sizes of their images."""
    import webdataset
    from PIL import Image

    count = 0
    names = sorted(map(str, shards.glob("*.tar")))
    for sample in webdataset.WebDataset(names, shardshuffle=False):
        for extension, data in sample.items():
            if not extension.startswith("__") and extension != "json":
                Image.open(io.BytesIO(data)).size  # noqa: B018
        count += bool(json.loads(sample["json"])["conversations"])
    return count
