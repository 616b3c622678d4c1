"""Entries of dataset_info.json, and the folder that a data set's images are looked up in."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from mmpack import Reader
from mmpack.cli.main import main
from mmpack.store.build import made_from

OPENAI = {"formatting": "openai", "columns": {"messages": "messages", "images": "images"}}


def picture(path: Path, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(path)


def row(image: str) -> dict:
    turns = [("user", "<image>What?"), ("assistant", "That.")]
    return {"messages": [{"role": r, "content": c} for r, c in turns], "images": [image]}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def info(folder: Path, **entries: dict) -> None:
    (folder / "dataset_info.json").write_text(
        json.dumps({name: {**OPENAI, **entry} for name, entry in entries.items()})
    )


@pytest.fixture
def folder(tmp_path):
    """Two data sets whose images have the same names in two folders, of sides 60 and 90."""
    for name, side in (("A", 60), ("B", 90)):
        picture(tmp_path / name / "0.png", side)
        write(tmp_path / f"{name}.jsonl", [row("0.png")])
    picture(tmp_path / "B" / "only.png", 120)
    return tmp_path


def sides(samples) -> list[int]:
    return [image.size[0] for sample in samples for image in sample.images]


def test_a_name_in_two_media_folders_is_refused_and_both_are_named(folder):
    reader = Reader(media_dir=[folder / "A", folder / "B"])
    both = f"0.png is ambiguous: {folder / 'A/0.png'} and {folder / 'B/0.png'} exist"
    with pytest.raises(ValueError, match=both):
        list(reader.read([folder / "A.jsonl", folder / "B.jsonl"]))
    # One that only one folder has is found, and a path without doubt always was.
    names = ["only.png", str(folder / "A/0.png"), "../A/0.png"]
    write(folder / "C.jsonl", [row(name) for name in names[:2]])
    assert sides(reader.read(folder / "C.jsonl")) == [120, 60]
    with pytest.raises(ValueError, match="A/none.png does not exist, nor in .*B; fix"):
        list(reader.read(write(folder / "D.jsonl", [row("none.png")])))


def test_the_same_file_through_two_folders_is_no_doubt(folder):
    (folder / "link").symlink_to(folder / "A")
    reader = Reader(media_dir=[folder / "A", folder / "link"])
    assert sides(reader.read(folder / "A.jsonl")) == [60]


def test_each_entry_has_its_own_root(folder):
    info(
        folder,
        a={"file_name": "A.jsonl", "media_dir": "A"},
        b={"file_name": "B.jsonl", "media_dir": "B"},
    )
    assert sides(Reader(mapping=["a", "b"]).read(folder)) == [60, 90]
    assert sides(Reader(mapping="b,a,b").read(folder)) == [90, 60, 90]
    assert sides(Reader().read([folder / "B.jsonl", folder / "A.jsonl"])) == [90, 60]
    # Its own root first and only, whatever --media-dir says.
    picture(folder / "C/only.png", 30)
    write(folder / "A.jsonl", [row("only.png")])
    with pytest.raises(ValueError, match="A/only.png does not exist"):
        list(Reader(mapping="a", media_dir=folder / "C").read(folder))


def test_a_root_outside_needs_the_users_word(folder):
    inner = folder / "inner"
    write(inner / "A.jsonl", [row("0.png")])
    for media_dir in ("../A", str(folder / "A")):
        info(inner, a={"file_name": "A.jsonl", "media_dir": media_dir})
        with pytest.raises(ValueError, match="media_dir of A.jsonl .* is outside .*--media-dir"):
            list(Reader(mapping="a").read(inner))
        assert sides(Reader(mapping="a", media_dir=folder / "A").read(inner)) == [60]
    (inner / "link").symlink_to(folder / "A")
    info(inner, a={"file_name": "A.jsonl", "media_dir": "link"})
    with pytest.raises(ValueError, match="is outside"):
        list(Reader(mapping="a").read(inner))


def test_paths_start_from_the_folder_of_dataset_info(folder):
    """As in LLaMA-Factory, whose media_dir is dataset_dir if it is not given."""
    write(folder / "sub/c.jsonl", [row("A/0.png")])
    info(folder, c={"file_name": "sub/c.jsonl"}, all={"file_name": "sub"})
    assert sides(Reader(mapping="c").read(folder)) == [60]
    assert sides(Reader(mapping="all").read(folder)) == [60]
    with pytest.raises(ValueError, match="sub/A/0.png does not exist"):
        list(Reader().read(folder / "sub/c.jsonl"))


def test_a_file_of_two_entries_is_ambiguous(folder):
    info(folder, x={"file_name": "A.jsonl", "media_dir": "A"}, y={"file_name": "./A.jsonl"})
    with pytest.raises(ValueError, match=r"2 entries of .* name A.jsonl: \['x', 'y'\].*--dataset"):
        list(Reader().read(folder / "A.jsonl"))
    assert sides(Reader(mapping="x").read(folder)) == [60]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "a/b"}, "entry with 'hf_hub_url' is not supported"),
        ({"split": "test"}, "entry with 'split' is not supported"),
        (
            {"columns": {"message": "m"}},
            r"'columns' of .* has \['message'\], which have no meaning",
        ),
        ({"tags": {"role": "r"}}, r"'tags' of .* has \['role'\].*role_tag"),
        ({"media_dir": 3}, "media_dir of A.jsonl must be a folder, got 3"),
    ],
)
def test_an_entry_means_what_it_says(folder, entry, message):
    info(folder, a={"file_name": "A.jsonl", "media_dir": "A", **entry})
    with pytest.raises(ValueError, match=message):
        list(Reader(mapping="a").read(folder))


def test_keys_of_an_entry_that_are_not_read_are_named(folder, caplog):
    info(folder, a={"file_name": "A.jsonl", "media_dir": "A", "split": "train", "licence": "MIT"})
    with caplog.at_level(logging.WARNING, "mmpack"):
        assert sides(Reader(mapping="a").read(folder)) == [60]
    assert "keys that are not read: ['licence']" in caplog.text


def test_a_folder_laid_out_as_on_the_hub(folder):
    write(folder / "hub/data/train-00000-of-00002.jsonl", [row("0.png")])
    write(folder / "hub/data/train-00001-of-00002.jsonl", [row("only.png")])
    (folder / "hub/README.md").write_text("A data set")
    reader = Reader(media_dir=folder / "B")
    assert sides(reader.read(folder / "hub")) == [90, 120]
    write(folder / "hub/data/test-00000-of-00001.jsonl", [row("0.png")])
    with pytest.raises(ValueError, match=r"several splits \['test', 'train'\]; name the ones"):
        list(reader.read(folder / "hub"))


def test_the_command_line_takes_every_dataset(folder, capsys):
    info(
        folder,
        a={"file_name": "A.jsonl", "media_dir": "A"},
        b={"file_name": "B.jsonl", "media_dir": "B"},
    )
    for words in (["--dataset", "a", "--dataset", "b"], ["--dataset", "a,b"]):
        assert main(["check", str(folder), *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]["rows"] == 2


def test_limited_entries_with_files_of_one_name_are_told_before_packing(folder, capsys):
    """By `check`, too, in the words of `pack`."""
    for name in "AB":
        write(folder / name / "rows.jsonl", [row("0.png")])
    info(
        folder,
        a={"file_name": "A/rows.jsonl", "media_dir": "A", "num_samples": 1},
        b={"file_name": "B/rows.jsonl", "media_dir": "B"},
    )
    assert main(["check", str(folder), "--dataset", "a,b"]) == 1
    error = capsys.readouterr().err
    assert "by the name of its file, but 2 files of several entries are rows.jsonl; rename" in error
    assert main(["check", str(folder), "--dataset", "a"]) == 0


def test_a_store_knows_both_readings_of_a_file(folder, encoder):
    """The same file through two entries: each counts, so a change of either is a change."""
    info(
        folder,
        x={"file_name": "A.jsonl", "media_dir": "A"},
        y={"file_name": "A.jsonl", "media_dir": "B"},
    )
    parts = [
        made_from(Reader(mapping=mapping).groups(folder), encoder)
        for mapping in ("x,y", "y,x", "x", "y")
    ]
    assert len({json.dumps(one) for one in parts}) == 4
