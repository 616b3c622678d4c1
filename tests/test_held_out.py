"""Rows held out of training: as many as asked, apart by image, the same whatever the plan; their loss by
source."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import SMALL_SPEC, encoded, small_config, tiny_config, tiny_model
from PIL import Image
from test_evaluation import mean_loss, trainer_of

from mmpack import Encoder, PackedDataset, PackStream
from mmpack.cli.demo import write_data
from mmpack.cli.main import main
from mmpack.hf import patch_model
from mmpack.packing.held_out import held_out, part_of, within_limits
from mmpack.packing.mixed_dataset import joined
from mmpack.packing.split_documents import split_samples
from mmpack.store.encoded_store import write_store
from mmpack.types import ImageRef, VideoRef


def samples_of(count, images=()):
    """Text samples; `images` are (row, names of its images)."""
    samples = [
        replace(encoded(SMALL_SPEC, 1, [2] * (3 + n % 7)), source="rows.json", row=n)
        for n in range(count)
    ]
    for row, names in images:
        media = tuple(ImageRef(name) for name in names)
        samples[row] = replace(samples[row], media=media)
    return samples


@pytest.mark.parametrize("size", [1, 7, 99, 0.1, 0.5, 0.001])
def test_as_many_rows_as_asked(size):
    found = held_out(samples_of(100), size)
    assert found.sum() == max(1, round(100 * size) if size < 1 else size)


def test_rows_that_share_an_image_are_on_one_side(tmp_path):
    """Directly, or through a third row; by path, by content, as frames of a video, or as one row of the file; the
    same ones of a store, whose columns are read."""
    rng = np.random.default_rng(0)
    images = [
        (n, {f"{x}.png" for x in rng.integers(0, 150, rng.integers(1, 3))}) for n in range(120)
    ]
    samples = samples_of(150, images)
    picture = Image.new("RGB", (3, 3))
    samples[120] = replace(samples[120], media=(ImageRef("a", b"bytes"),))
    samples[121] = replace(samples[121], media=(ImageRef("b", b"bytes"),))
    samples[122] = replace(samples[122], media=(ImageRef("c", picture), ImageRef("0.png")))
    samples[123] = replace(samples[123], media=(ImageRef("d", picture.copy()),))
    samples[124] = replace(samples[124], media=(VideoRef("v", frames=(ImageRef("1.png"),)),))
    samples[126] = replace(samples[126], row=125)
    samples[127] = replace(samples[127], media=(VideoRef("w.mp4"), ImageRef("2.png")))
    samples[128] = replace(samples[128], media=(VideoRef("w.mp4", b"bytes"), ImageRef("3.png")))
    samples[129] = replace(samples[129], media=(VideoRef("w.mp4"),))
    store = write_store(tmp_path / "store", samples, SMALL_SPEC)
    limits = {"rows.json": (40, 120)}
    assert (within_limits(samples, limits) == within_limits(store, limits)).all()
    for size in (10, 20, 0.3):
        found = held_out(samples, size)
        assert (held_out(store, size) == found).all()
        sides = {}
        for number, sample in enumerate(samples):
            keys = {one.path for one in sample.media if isinstance(one, ImageRef) and not one.data}
            keys |= {frame.path for one in sample.media for frame in getattr(one, "frames", ())}
            for key in keys | {("row", sample.row)}:
                assert sides.setdefault(key, found[number]) == found[number]
        assert found[120] == found[121] == found[128]
        assert found[127] == found[129]
        assert found[122] == found[123]
        assert 0 < found.sum() <= (size if size >= 1 else 45)


def test_rows_of_equal_number_in_files_of_one_name_are_not_one_row():
    """As of Hub folders, each with a train-00000-of-00001.parquet; samples of one row are next to each other."""
    one = [samples_of(20), samples_of(20)]
    found = held_out([*one[0], *one[1]], 1)
    assert found.sum() == 1


def test_rows_that_share_images_are_held_out_as_often_as_others():
    samples = samples_of(4_000, [(n, {f"{n // 4}.png"}) for n in range(2_000)])
    found = held_out(samples, 0.2)
    assert found[:2_000].mean() == pytest.approx(0.2, abs=0.04)
    assert found[2_000:].mean() == pytest.approx(0.2, abs=0.04)


def test_the_same_rows_are_held_out_when_others_come():
    """And whatever the capacity and the seed of the plan are, of which the choice knows nothing."""
    few, more = samples_of(100), samples_of(110)
    first = set(np.flatnonzero(held_out(few, 0.2)))
    second = set(np.flatnonzero(held_out(more, 0.2)))
    assert len(first & second) >= 15


def test_the_pieces_of_a_document_are_on_one_side():
    samples = [
        replace(encoded(SMALL_SPEC, 1, [2] * (10 + 30 * n % 170)), source="docs", row=n)
        for n in range(30)
    ]
    pieces = split_samples(samples, 40)
    found = held_out(pieces, 6)
    assert len(pieces) > 40
    rows = {int(n) for n in pieces.sample_of[found]}
    assert len(rows) == 6
    assert not rows & {int(n) for n in pieces.sample_of[~found]}


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (
            0,
            r"--val-size \(val_size\) must be a number of rows, or a share above 0 and below 1, got 0",
        ),
        (1.5, "got 1.5"),
        (-1, "got -1"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
        (10, "asks for 10 of 10 rows, and none would be left to train on"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size, reason):
    with pytest.raises(ValueError, match=reason):
        held_out(samples_of(10), size)


def test_rows_that_all_share_an_image_cannot_be_held_out():
    samples = samples_of(10, [(n, {"a.png"}) for n in range(10)])
    with pytest.raises(
        ValueError, match="none of 10 rows can be held out, .* that share images has 10"
    ):
        held_out(samples, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of which three and three share an image, a tokenizer, a config, and a store with rows held out."""
    folder = tmp_path_factory.mktemp("held out")
    write_data(folder, 4)
    rows = []
    for n in range(30):
        Image.new("RGB", (56, 56), (n, 0, 0)).save(folder / f"{n}.png")
        asked = {"from": "human", "value": "<image>What is it?" if n < 18 else f"How {n}?"}
        answer = {"from": "gpt", "value": "Six bars. " * (1 + n % 5)}
        images = {"images": [f"{n // 3}.png"]} if n < 18 else {}
        rows.append({"conversations": [asked, answer], **images})
    (folder / "rows.json").write_text(json.dumps(rows[:20]))
    (folder / "more.json").write_text(json.dumps(rows[20:]))
    vision = Encoder.from_folder(folder / "tokenizer").vision
    tiny_config(4096, vision=vision).to_json_file(folder / "config.json")
    assert pack(folder, "packed", "--val-size", "6") == 0
    return folder


def pack(folder, name, *words, capacity=120):
    files = [str(folder / name) for name in ("rows.json", "more.json")]
    words = ["--tokenizer", str(folder / "tokenizer"), "--capacity", str(capacity), *words]
    return main(["pack", *files, "--out", str(folder / name), *words])


def places(dataset):
    packs = [dataset[n] for n in range(len(dataset))]
    return Counter((one.source, one.row) for pack in packs for one in pack)


def test_a_store_has_two_plans_of_all_rows(folder, capsys):
    train = PackedDataset.from_store(folder / "packed")
    val = PackedDataset.from_store(folder / "packed", split="val")
    assert places(val).total() == 6
    assert places(train).total() == 24
    assert not places(train) & places(val)
    images = [
        {
            ref.path
            for pack in (data[n] for n in range(len(data)))
            for one in pack
            for ref in one.media
        }
        for data in (train, val)
    ]
    assert not images[0] & images[1]
    train.set_epoch(3)
    assert not places(train) & places(val)
    assert "6 not in this plan" in repr(train.plan)
    assert train.fingerprint() != val.fingerprint()
    assert pack(folder, "other", "--val-size", "0.2", "--plan-seed", "5") == 0
    assert "held out: 6 rows of them, in" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["inspect", f"{folder}/packed:val", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(s["source"], s["row"]) for s in shown["segments"]] == [
        (s.source, s.row) for s in val[0]
    ]
    held = next(iter(val[0]))
    assert main(["inspect", f"{folder}/packed", "--row", f"{held.source}:{held.row}"]) == 1
    assert (
        "is in no pack; was it refused, dropped or held out (FOLDER:val)" in capsys.readouterr().err
    )
    other = PackedDataset.from_store(folder / "other", split="val")
    assert places(other) == places(val)
    assert pack(folder, "whole") == 0
    with pytest.raises(
        ValueError, match="whole has no rows that are held out; pack again with --val-size"
    ):
        PackedDataset.from_store(folder / "whole", split="val")
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        PackedDataset.from_store(folder / "whole", split="test")


def test_folder_val_means_one_thing_everywhere(folder, tmp_path):
    val = PackedDataset.from_store(folder / "packed", split="val")
    for given, options in (
        (f"{folder}/packed:val", {}),
        (Path(f"{folder}/packed:val"), {"split": "val"}),
    ):
        assert PackedDataset.from_store(given, **options).fingerprint() == val.fingerprint()
    mixed = PackedDataset.mixed({"held out": (f"{folder}/packed:val", 1)})
    assert places(mixed).total() == places(val).total() == 6
    with pytest.raises(
        ValueError, match="packed:val are the rows held out of .*packed, but split is 'train'"
    ):
        PackedDataset.from_store(f"{folder}/packed:val", split="train")
    with pytest.raises(ValueError, match="none:val has no finished store .there is no such folder"):
        PackedDataset.from_store(f"{folder}/none:val")
    for name in ("a", "a:val"):
        shutil.copytree(folder / "packed", tmp_path / name)
    own = PackedDataset.from_store(tmp_path / "a:val")  # a folder of that name
    assert places(own) == places(PackedDataset.from_store(folder / "packed"))
    assert places(PackedDataset.from_store(tmp_path / "a:val:val")) == places(val)


def test_changing_the_size_encodes_nothing(folder, capsys):
    assert pack(folder, "again", "--val-size", "6") == 0
    assert pack(folder, "again", "--val-size", "6") == 0
    assert "nothing encoded anew" in capsys.readouterr().out
    assert pack(folder, "again", "--val-size", "3") == 1
    assert "val_size changed since" in capsys.readouterr().err
    assert pack(folder, "again", "--overwrite") == 0
    assert "nothing encoded anew" in capsys.readouterr().out
    assert not (folder / "again" / "val.json").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda plan: plan.write_text("{}")])
def test_a_plan_of_held_out_rows_that_is_missing_or_damaged_is_made_again(folder, capsys, damage):
    """What the error of mmpack train says helps."""
    name = "unplanned"
    assert pack(folder, name, "--val-size", "6", "--overwrite") == 0
    damage(folder / name / "val.json")
    with pytest.raises(ValueError, match="has no rows that are held out|damaged"):
        PackedDataset.from_store(folder / name, split="val")
    capsys.readouterr()
    assert pack(folder, name, "--val-size", "6") == 1
    assert "--overwrite it: " in capsys.readouterr().err
    assert pack(folder, name, "--val-size", "6", "--overwrite") == 0
    whole, again = (PackedDataset.from_store(folder / one, split="val") for one in ("packed", name))
    assert again.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("words", [("--group-images",), ("--patch-capacity", "16"), ()])
def test_rows_that_are_cut_are_on_both_sides(folder, words):
    """A plan has the length of a cut row, also if the other plan has the row."""
    words = ("--on-overflow", "truncate", "--val-size", "9", "--overwrite", *words)
    assert pack(folder, "cut", *words, capacity=40) == 0
    sides = [PackedDataset.from_store(folder / "cut", split=split) for split in ("train", "val")]
    for side in sides:
        assert side.plan.num_truncated
        for number in range(len(side)):
            tokens = sum(sample.num_tokens for sample in side[number])
            assert tokens == side.plan.pack_tokens[number] <= 40
    assert not places(sides[0]) & places(sides[1])


def test_parts_hold_out_the_rows_of_the_whole(folder):
    for number in (1, 2):
        name = f"part{number}"
        assert pack(folder, name, "--val-size", "6", "--shard", f"{number}/2") == 0
    parts = [str(folder / f"part{number}") for number in (1, 2)]
    assert main(["merge", str(folder / "merged"), *parts]) == 0
    for split in ("train", "val"):
        whole = PackedDataset.from_store(folder / "packed", split=split)
        merged = PackedDataset.from_store(folder / "merged", split=split)
        assert merged.fingerprint() == whole.fingerprint()


def train(folder, capsys, *words):
    code = main(
        ["train", *words, "--config", str(folder / "config.json"), "--output_dir", str(folder / "run"), "--steps", "2",
         "--save_strategy", "no", "--eval_strategy", "steps", "--eval_steps", "2", "--json", "--use_cpu"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    return code, out, err


def test_training_evaluates_held_out_rows_where_asked(folder, capsys):
    store = str(folder / "packed")
    code, out, err = train(folder, capsys, "--data", store, "--eval-data", f"{store}:val")
    assert code == 0, err
    assert json.loads(out)["eval_loss"] > 0
    assert "eval_loss/rows.json" in err and "eval_loss/more.json" in err, err
    code, _, err = train(folder, capsys, "--data", f"{store}:val")
    assert code == 1
    assert "packed:val are the rows held out for evaluation; pass the folder" in err
    both = [f"{store}:val", str(folder / "whole")]
    pack(folder, "whole")
    code, out, err = train(folder, capsys, "--data", store, "--eval-data", *both)
    assert code == 0, err
    assert "eval_loss/packed" in err and "eval_loss/whole" in err


@pytest.mark.parametrize("size", [1, 3])
def test_the_loss_of_each_source(tmp_path, size):
    """Of the rows of a source alone; not where there is one source."""
    samples = []
    for n in range(21):
        one = encoded(SMALL_SPEC, 1, n + 3, range(20, 24 + 5 * n % 13))
        one.labels[: 1 + n % 5] = -100
        samples.append(replace(one, source=["a.json", "b.json"][n % 2]))
    model = patch_model(tiny_model(small_config()))
    options = {"per_device_eval_batch_size": size}
    data = PackedDataset.from_samples(samples, 40)
    found = trainer_of(tmp_path, data, data, model, **options).evaluate()
    for name in ("a.json", "b.json"):
        own = [one for one in samples if one.source == name]
        assert found[f"eval_loss/{name}"] == pytest.approx(mean_loss(model, own), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(mean_loss(model, samples), rel=1e-5)
    alone = PackedDataset.from_samples(samples[::2], 40)
    found = trainer_of(tmp_path, data, alone, model, **options).evaluate()
    assert not [name for name in found if name.startswith("eval_loss/")]
    both = joined({"one": alone, "other": PackedDataset.from_samples(samples[1::2], 40)})
    trainer = trainer_of(tmp_path, data, {"x": both}, model, **options)
    found = trainer.evaluate()
    own = mean_loss(model, samples[1::2])
    assert found["eval_x_loss/other"] == pytest.approx(own, rel=1e-5)
    assert both.id_range() == data.id_range()


# num_samples and max_samples of dataset_info.json


def with_info(folder, **entry):
    """The folder of two files, of which `rows.json` has an entry."""
    info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def limited(folder):
    yield folder
    (folder / "dataset_info.json").unlink()


def rows_in(dataset, source="rows.json"):
    return {row for file, row in places(dataset) if file == source}


def test_an_entry_limits_its_rows_when_packs_are_planned(limited, capsys):
    folder = limited
    with_info(folder)
    assert pack(folder, "limits") == 0
    whole = PackedDataset.from_store(folder / "limits")
    assert rows_in(whole) == set(range(20))
    capsys.readouterr()
    found = {}
    for name, entry, count in (
        ("max", {"max_samples": 7}, 7),
        ("num", {"num_samples": 5}, 5),
        ("both", {"num_samples": 5, "max_samples": 7}, 5),
    ):
        with_info(folder, **entry)
        assert pack(folder, "limits") == 1
        assert (
            "num_samples or max_samples of a dataset_info.json changed since"
            in capsys.readouterr().err
        )
        assert pack(folder, "limits", "--overwrite", "--val-size", "4") == 0
        assert "nothing encoded anew" in capsys.readouterr().out
        train, val = (
            PackedDataset.from_store(folder / "limits", split=s) for s in ("train", "val")
        )
        found[name] = rows_in(train) | rows_in(val)
        assert not rows_in(train) & rows_in(val)
        assert len(found[name]) == count
        assert len(rows_in(train, "more.json") | rows_in(val, "more.json")) == 10
        assert places(val).total() == 4
    assert found["max"] == set(range(7))
    assert found["both"] < set(range(7))
    assert found["num"] - set(range(7))


def test_python_and_training_honour_limits_too(limited, capsys, caplog):
    folder = limited
    with_info(folder, num_samples=5)
    encoder = Encoder.from_folder(folder / "tokenizer")
    files = [folder / "rows.json", folder / "more.json"]
    dataset = PackedDataset.from_files(files, encoder, 120)
    assert len(rows_in(dataset)) == 5
    assert "15 not in this plan" in repr(dataset)
    mixed = PackedDataset.mixed({"a": (dataset, 1)})
    assert mixed.report()[0]["samples"] == 15
    code, _, err = train(
        folder, capsys, "--data", str(files[0]), "--tokenizer", str(folder / "tokenizer"),
        "--capacity", "120", "--eval-data", str(files[1]),
    )  # fmt: skip
    assert code == 0, err
    with_info(folder, num_samples=50)
    assert len(rows_in(PackedDataset.from_files(files[0], encoder, 120))) == 20
    assert (
        "num_samples of rows.json is 50, but 20 samples are there; each is used once" in caplog.text
    )
    assert len(list(encoder.read(files[0]))) == 20
    assert "num_samples and max_samples of its entry apply when packs are planned" in caplog.text
    for value in (0, 1 << 31):
        with_info(folder, num_samples=value)
        with pytest.raises(
            ValueError,
            match=f"num_samples of a dataset_info.json entry is {value}, not an integer fr",
        ):
            PackedDataset.from_files(files[0], encoder, 120)
    with_info(folder, max_samples=(1 << 31) - 1)
    assert pack(folder, "limits", "--overwrite") == 0
    assert rows_in(PackedDataset.from_store(folder / "limits")) == set(range(20))
    mapping = {"formatting": "sharegpt", "max_samples": 2}
    rows = json.loads(files[1].read_text())
    few = PackedDataset.from_files(rows, replace(encoder, mapping=mapping), 120)
    assert rows_in(few, "rows") == {0, 1}
    with pytest.raises(
        ValueError, match="of a mapping are for plans, and a stream has none; remove"
    ):
        PackStream(rows, replace(encoder, mapping=mapping), 120)


def test_rows_that_are_cut_may_be_beyond_a_limit(limited):
    folder = limited
    with_info(folder, max_samples=9)
    assert pack(folder, "limits", "--on-overflow", "truncate", "--overwrite", capacity=40) == 0
    dataset = PackedDataset.from_store(folder / "limits")
    assert dataset.plan.num_truncated
    assert rows_in(dataset) <= set(range(9))
    assert rows_in(dataset, "more.json")


@pytest.mark.parametrize("limits", [({"max_samples": 2}, {}), ({"num_samples": 2},) * 2])
def test_a_limit_of_files_that_share_their_name_is_refused(tmp_path, folder, limits):
    """Rows are known by the name of their file, so the limit would be that of both entries."""
    info = {}
    for name, entry in zip("ab", limits):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text((folder / "more.json").read_text())
        info[name] = {"file_name": f"{name}/train.json", "formatting": "sharegpt", **entry}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    encoder = Encoder.from_folder(folder / "tokenizer", mapping="a,b")
    assert len(list(encoder.read(tmp_path))) == 20
    with pytest.raises(
        ValueError,
        match="by the name of its file, but 2 files of several entries are train.json; ren",
    ):
        PackedDataset.from_files(tmp_path, encoder, 120)
    alone = PackedDataset.from_files(tmp_path, replace(encoder, mapping="a"), 120)
    assert len(rows_in(alone, "train.json")) == 2


def grouped(count=12):
    samples = samples_of(count)
    for n in range(count):
        one = encoded(SMALL_SPEC, 3, n, (4, 4), [4] * 5)
        samples[n] = replace(one, media=(ImageRef(f"{n // 2}.png"),), source="rows.json", row=n)
    return PackedDataset.from_samples(samples, 64, group_images=True)


def test_rows_planned_together_are_held_out_together():
    data = grouped()
    found = held_out(data.samples, 4)
    for own in (found, ~found):
        plan = part_of(data.plan, own)
        assert sorted(plan.sample_index) == np.flatnonzero(own).tolist()


def test_rows_beyond_a_limit_may_be_longer_than_a_pack(folder, tmp_path, capsys):
    folder = shutil.copytree(folder, tmp_path / "copy")
    rows = json.loads((folder / "rows.json").read_text())
    for turns in (rows[2]["conversations"], rows[15]["conversations"]):
        turns[1]["value"] = "long " * 200
    (folder / "rows.json").write_text(json.dumps(rows))
    with_info(folder, max_samples=2)
    assert pack(folder, "few") == 0
    assert (
        "18 rows of them are not used, beyond num_samples or max_samples" in capsys.readouterr().out
    )
    encoder = Encoder.from_folder(folder / "tokenizer")
    dataset = PackedDataset.from_files(folder / "rows.json", encoder, 120)
    assert rows_in(dataset) == {0, 1}
    with_info(folder, max_samples=3)
    assert pack(folder, "few", "--overwrite") == 1
    assert "1 of 13 samples; the longest, row 2 of rows.json" in capsys.readouterr().err


def test_long_rows_of_both_plans_are_counted_and_listed(folder, capsys):
    words = ["--val-size", "0.4", "--on-overflow", "drop", "--json"]
    assert pack(folder, "long", *words, capacity=60) == 0
    report = json.loads(capsys.readouterr().out)
    sides = [PackedDataset.from_store(folder / "long", split=s).plan for s in ("train", "val")]
    assert all(plan.num_dropped for plan in sides)
    assert report["dropped"] == sum(plan.num_dropped for plan in sides)
    listed = (folder / "long" / "overflow.jsonl").read_text().splitlines()
    assert len(listed) == report["dropped"]
    assert "unused" not in report
