"""Data sets as people publish them, whole, and the same rows in every format."""

import json
import shutil

import numpy as np
import pytest

from mmpack import Reader
from mmpack.data import images

ANSWER = {"from": "gpt", "value": "This."}


def test_the_real_set_reads_whole_and_in_both_forms(shared, realset_rows, realset_samples):
    assert len(realset_samples) == 2109
    for row, sample in zip(realset_rows, realset_samples):
        folder = str(shared / "realset") + "/"
        assert [image.path.removeprefix(folder) for image in sample.images] == row["images"]
    messages = list(Reader().read(shared / "realset" / "realset_messages_200.jsonl"))
    ids = {row["id"]: n for n, row in enumerate(realset_rows)}
    lines = (shared / "realset" / "realset_messages_200.jsonl").read_text().splitlines()
    for line, sample in zip(lines, messages, strict=True):
        assert sample.messages == realset_samples[ids[json.loads(line)["id"]]].messages


def test_llama_factorys_demo_reads_in_both_forms(shared, tmp_path):
    samples = list(Reader(mapping="mllm_demo").read(shared / "mllm_demo"))
    assert [len(sample.images) for sample in samples] == [2, 1, 1, 2, 1, 1]
    (tmp_path / "data").mkdir()  # the newer form's paths begin there
    shutil.copytree(shared / "mllm_demo" / "mllm_demo_data", tmp_path / "data" / "mllm_demo_data")
    parts = list(Reader(media_dir=tmp_path).read(shared / "mllm_demo" / "v1_multimodal_demo.jsonl"))
    assert len(parts) > 0
    assert all(sample.images for sample in parts)
    first, other = samples[0].messages, parts[0].messages
    assert [m.role for m in first] == [m.role for m in other]


def test_qwens_own_demo(shared, tmp_path):
    folder = shared / "qwen_finetune_demo"
    samples = list(Reader().read(folder / "readme_examples.json"))
    assert [(s.row, len(s.images)) for s in samples] == [(0, 1), (1, 2), (2, 1), (2, 1)]
    with pytest.raises(ValueError, match="demo/images/10095.png does not exist; fix the path or"):
        list(Reader().read(folder / "single_images.json"))
    shutil.copytree(folder / "images", tmp_path / "demo" / "images")
    shipped = list(Reader(media_dir=tmp_path).read(folder / "single_images.json"))
    assert [s.messages[0].content[-1].path for s in shipped][0].endswith("demo/images/10095.png")


def test_the_real_set_converted(shared, realset_rows, realset_samples, tmp_path):
    """The same rows as CSV, Parquet, Arrow (both layouts), a `datasets` set and Alpaca."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    import csv

    rows = [{k: row.get(k) for k in ("conversations", "images", "system")} for row in realset_rows]
    expected = [s.messages for s in realset_samples]
    folder = shared / "realset"

    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["conversations", "images", "system"])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list) else v or "" for k, v in row.items()}
            )
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=50)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "alpaca.json").write_text(json.dumps([alpaca(row) for row in rows]))

    for name in ("rows.csv", "rows.parquet", "stream.arrow", "file.arrow", "saved", "alpaca.json"):
        samples = list(Reader(media_dir=folder).read(tmp_path / name))
        assert [sample.messages for sample in samples] == expected, name
    in_memory = list(Reader(media_dir=folder).read(datasets.Dataset.from_list(rows)))
    assert [sample.messages for sample in in_memory] == expected


def alpaca(row):
    values = [turn["value"] for turn in row["conversations"]]
    pairs = list(zip(values[::2], values[1::2]))
    (question, answer), history = pairs[-1], pairs[:-1]
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "history": history,
        "system": row["system"],
        "images": row["images"],
    }


def test_images_of_a_datasets_set_give_the_same_pixels(shared, realset_samples, vision):
    datasets = pytest.importorskip("datasets")
    sample = next(s for s in realset_samples if len(s.images) == 2)
    paths = [image.path for image in sample.images]
    row = {
        "conversations": [{"from": "human", "value": "<image><image>?"}, ANSWER],
        "images": paths,
    }
    features = datasets.Features(
        {
            "conversations": datasets.List(
                {"from": datasets.Value("string"), "value": datasets.Value("string")}
            ),
            "images": datasets.List(datasets.Image()),
        }
    )
    (decoded,) = Reader().read(datasets.Dataset.from_list([row], features=features))
    for image, expected in zip(decoded.images, sample.images):
        assert image.size == expected.size
        grid = vision.image_grid(*image.size)
        ours, theirs = (images.load_patches(i, grid, vision) for i in (image, expected))
        assert np.array_equal(ours, theirs)
