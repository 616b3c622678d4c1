"""What is left out, and what there is twice: never silently, never most of the data."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from mmpack import Encoder, PackedDataset, Reader
from mmpack.cli.demo import write_data
from mmpack.cli.main import main
from mmpack.errors import Skip, count_reason
from mmpack.hf import PackCollator
from mmpack.types import ImageRef

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
TOO_MANY = r"rows were left out, at most 5\.0% may be: .* x image \.\.\. does not exist"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's tokenizer and config; rows.json: 1,200 rows, the images of every tenth are gone."""
    folder = tmp_path_factory.mktemp("left_out")
    write_data(folder, 4)
    rows = [{"conversations": TEXT} for _ in range(1200)]
    for number in range(0, 1200, 10):
        rows[number] = {"conversations": TURNS, "images": [f"gone/{number}.png"]}
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "short.json").write_text(json.dumps(rows[:900]))
    return folder


# -- one rule


@pytest.mark.filterwarnings("ignore:left out")
def test_reading_stops_where_too_many_are_skipped(folder):
    rows = folder / "rows.json"
    with pytest.raises(ValueError, match="100 of 1,000 " + TOO_MANY) as info:
        list(Reader(on_error="skip").read(rows))
    assert "for example row 0 of rows.json: image" in str(info.value)
    assert "--max-bad (max_bad)" in str(info.value)
    assert len(list(Reader(on_error=Skip(max_bad=0.12)).read(rows))) == 1080
    assert len(list(Reader(on_error="skip").read(folder / "short.json"))) == 810
    bad_rows = []
    assert (
        len(list(Reader(on_error=bad_rows).read(rows))) == 1080
    )  # a list is the caller's to judge
    assert len(bad_rows) == 120
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="max-bad .* must be a share from 0 to 1"):
            Skip(max_bad=wrong)


@pytest.mark.filterwarnings("ignore:left out")
def test_the_last_bad_row_may_come_before_the_first_that_counts(folder):
    rows = [{"conversations": TURNS}] * 100 + [{"conversations": TEXT}] * 1000
    with pytest.raises(ValueError, match=r"100 of 1,000 rows .*100 x \.\.\. <image> markers but"):
        list(Reader(on_error="skip").read(rows))


@pytest.mark.filterwarnings("ignore:left out")
def test_encoding_stops_by_the_same_rule(folder):
    encoder = Encoder.from_folder(folder / "tokenizer", on_error="skip")
    samples = list(Reader().read([{"conversations": TEXT}] * 1200))
    gone = [{"conversations": TURNS, "images": [Image.new("RGB", (60, 60))]}]
    (picture,) = Reader().read(gone)
    question, answer = picture.messages
    lost = type(question)("user", (ImageRef(str(folder / "gone.png")), "What?"))
    samples[:100] = [type(picture)((lost, answer), "x", n) for n in range(100)]
    with pytest.raises(ValueError, match=r"100 of 1,\d+ " + TOO_MANY):
        list(encoder.encode(samples))
    shared = Skip()
    encoder = replace(encoder, on_error=shared)
    rows = encoder.read([{"conversations": TEXT}] * 600)
    assert len(list(encoder.encode(rows))) == 600
    assert max(shared._seen.values()) == 600  # a row counts once, though two stations see it


def test_packing_stops_and_leaves_nothing(folder, tmp_path, capsys):
    arguments = [
        "pack",
        folder / "rows.json",
        "--tokenizer",
        folder / "tokenizer",
        "--capacity",
        512,
    ]
    arguments += ["--on-error", "skip", "--quiet", "--jobs", 1, "--out", tmp_path / "out"]
    arguments = [str(argument) for argument in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert " rows were left out, at most 5.0% may be: " in error
    assert " x image ... does not exist (for example row 0 of rows.json: image" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--max-bad", "2"]) == 1
    assert "--max-bad (max_bad) must be a share" in capsys.readouterr().err
    assert main([*arguments, "--max-bad", "0.12"]) == 0
    assert len((tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()) == 120


def test_merging_judges_all_parts_as_packing_would_have(folder, tmp_path, capsys):
    """Each part has fewer rows than are judged."""
    arguments = ["pack", folder / "rows.json", "--tokenizer", folder / "tokenizer", "--jobs", 1]
    arguments += ["--capacity", 512, "--on-error", "skip", "--quiet"]
    assert main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 1
    refused = capsys.readouterr().err
    assert "rows were left out, at most 5.0% may be: " in refused
    parts = [str(tmp_path / number) for number in "12"]
    for part in parts:
        shard = ["--out", part, "--shard", f"{part[-1]}/2"]
        assert main([*map(str, arguments), *shard]) == 0
    merge = ["merge", str(tmp_path / "out"), *parts, "--quiet"]
    assert main(merge) == 1
    assert capsys.readouterr().err == refused
    assert not (tmp_path / "out").exists()
    # What was packed with another share is merged with it: the least of all parts' is meant.
    for part, code in zip(parts, (1, 0)):
        shard = ["--out", part, "--shard", f"{part[-1]}/2", "--max-bad", "0.12"]
        assert main([*map(str, arguments), *shard]) == 1
        assert "--overwrite it: max_bad changed since" in capsys.readouterr().err
        assert main([*map(str, arguments), *shard, "--overwrite"]) == 0
        assert main(merge) == code
    assert len((tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()) == 120
    merge.append("--overwrite")
    assert main([*merge, "--max-bad", "0.05"]) == 1
    assert " rows were left out, at most 5.0% may be: " in capsys.readouterr().err


def test_training_on_rows_stops(folder, tmp_path, capsys):
    arguments = ["train", "--data", folder / "rows.json", "--tokenizer", folder / "tokenizer"]
    arguments += ["--config", folder / "config.json", "--capacity", 512, "--on-error", "skip"]
    arguments += ["--quiet", "--output_dir", tmp_path, "--use_cpu"]
    assert main([str(argument) for argument in arguments]) == 1
    assert "100 of 1,000 rows were left out" in capsys.readouterr().err


def many_pictures(folder, num_rows, every):
    """Samples whose images are gone, one in `every`, the others text."""
    import dataclasses

    from test_workers import SPEC, encoded

    picture = encoded(SPEC, 1, (2, 2), 2, 3)
    picture = dataclasses.replace(
        picture, media=(ImageRef(str(folder / "gone.png"), size=(28, 28)),)
    )
    text = encoded(SPEC, 1, 2, 3)
    return [picture if n % every == 0 else text for n in range(num_rows)]


def collate_all(dataset):
    for item in dataset:
        PackCollator()([item])


def test_a_training_does_not_go_on_without_its_images(tmp_path, caplog):
    dataset = PackedDataset.from_samples(many_pictures(tmp_path, 2000, 10), 40)
    dataset.on_bad_image = "drop"
    with pytest.raises(
        ValueError, match=r"\d+ of 1\d\d rows with images or videos were left out"
    ) as info:
        collate_all(dataset)
    assert " x image ... does not exist" in str(info.value)
    other = PackedDataset.from_samples(many_pictures(tmp_path, 2000, 10), 40)
    other.on_bad_image, other.max_bad = "drop", 1.0
    collate_all(other)
    assert other.num_dropped_segments == 200


def test_a_few_lost_images_stop_nothing(tmp_path, caplog):
    """20 images of 2,000 samples are gone, all that there are: a share of so few says little."""
    dataset = PackedDataset.from_samples(many_pictures(tmp_path, 2000, 100), 40)
    dataset.on_bad_image = "drop"
    collate_all(dataset)
    assert dataset.num_dropped_segments == 20


def test_workers_count_together(tmp_path):
    from test_workers import loader

    dataset = PackedDataset.from_samples(many_pictures(tmp_path, 1600, 5), 40)
    dataset.on_bad_image = "drop"
    with pytest.raises(ValueError, match="rows with images or videos were left out"):
        list(loader(dataset))
    assert 50 < dataset.num_dropped_segments < 320


def test_equal_reasons_meet():
    from collections import Counter

    reasons = Counter()
    for error in (
        "image /a/b/c.png does not exist",
        "image /a/my pictures/9.png does not exist",
        "1 <image> marker but 3 images",
        "2 <image> markers but 1 image",
    ):
        count_reason(reasons, error)
    assert reasons == {
        "image ... does not exist": 2,
        "... <image> markers but ... images": 2,
    }
    for number in range(3000):
        count_reason(reasons, f"{'x' * (number % 100)}{chr(256 + number)}")
    assert len(reasons) <= 1001
    assert sum(reasons.values()) == 3004


# -- folders


def test_a_loop_of_links_in_a_folder_is_refused(folder, tmp_path, capsys):
    shutil.copy(folder / "short.json", tmp_path / "a.json")
    os.symlink(tmp_path / "c.json", tmp_path / "c.json")
    assert main(["check", str(tmp_path)]) == 1
    assert "c.json: Too many levels" in capsys.readouterr().err
    (tmp_path / "c.json").unlink()
    os.symlink(tmp_path / "nothing", tmp_path / "README")  # not named like data: left alone
    assert len(list(Reader(media_dir=folder, on_error=[]).read(tmp_path))) == 810


def test_a_file_that_may_not_be_read_is_refused(folder, tmp_path, monkeypatch, capsys):
    shutil.copy(folder / "short.json", tmp_path / "a.json")
    shutil.copy(folder / "short.json", tmp_path / "b.json")
    (tmp_path / "b.json").chmod(0)
    if os.geteuid() == 0:  # who may read all
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("b.json"))
    assert main(["check", str(tmp_path)]) == 1
    assert "b.json may not be read" in capsys.readouterr().err


def test_check_tells_what_is_there_twice(tmp_path, capsys):
    rows = [{"conversations": TEXT, "id": n} for n in (1, 2, 3)]
    (tmp_path / "a.json").write_text(json.dumps([*rows, rows[1]]))
    other = [{"id": 3, "conversations": TEXT}, {"conversations": TEXT, "id": 4}]
    (tmp_path / "b.json").write_text(json.dumps(other))
    os.symlink(tmp_path / "a.json", tmp_path / "c.json")
    assert main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        f"1 file is the same as another, read twice ({tmp_path / 'c.json'} is {tmp_path / 'a.json'})"
        in out
    )
    assert "6 rows equal an earlier one (row 3 of a.json equals row 1 of a.json)" in out
    assert main(["check", str(tmp_path / "b.json"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert (summary["rows_again"], summary["files_twice"]) == (0, 0)
    picture = Image.new("RGB", (40, 40))
    from mmpack import Reader
    from mmpack.cli.check import Summary, check_rows

    seen = Summary()
    in_memory = [{"conversations": TURNS, "images": [p]} for p in (picture, picture.copy())]
    in_memory.append({"conversations": TURNS, "images": [Image.new("RGB", (40, 40), "red")]})
    in_memory.append({"conversations": TEXT, 1: 2})
    for checked in check_rows(Reader().groups(in_memory), Reader()):
        seen.add(checked)
    assert seen.num_again == 1
