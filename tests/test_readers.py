import json

import pytest

from mmpack import read_samples
from mmpack.types import ImageRef, Message

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read_one(tmp_path, row, **options):
    (sample,) = read_samples(write(tmp_path / "train.json", [row]), **options)
    return sample


def test_sharegpt_row(tmp_path):
    sample = read_one(tmp_path, {"conversations": TURNS, "images": ["a.png"]})
    image = ImageRef(str(tmp_path / "a.png"))
    assert sample.messages == (Message("user", (image, "What?")), Message("assistant", ("This.",)))
    assert sample.images == (image,)
    assert (sample.source, sample.row) == ("train.json", 0)


def test_openai_row(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A <image> and <image>?"},
        {"role": "assistant", "content": "Yes."},
    ]
    sample = read_one(
        tmp_path, {"messages": turns, "images": ["a.png", "b.png"]}, media_dir="/data"
    )
    assert sample.messages[0] == Message("system", ("Be brief.",))
    user = ("A ", ImageRef("/data/a.png"), " and ", ImageRef("/data/b.png"), "?")
    assert sample.messages[1].content == user


def test_a_system_turn_outranks_the_system_column(tmp_path):
    row = {"conversations": TURNS, "images": ["a.png"], "system": "column"}
    assert read_one(tmp_path, row).messages[0] == Message("system", ("column",))
    row["conversations"] = [{"from": "system", "value": "turn"}, *TURNS]
    assert read_one(tmp_path, row).messages[0] == Message("system", ("turn",))


@pytest.mark.parametrize("images", [{}, {"images": None}, {"images": []}])
def test_rows_without_images(tmp_path, images):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert read_one(tmp_path, {"conversations": turns, **images}).images == ()


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_both_file_types_give_the_same_samples(tmp_path, name):
    rows = [{"conversations": TURNS, "images": [f"{n}.png"]} for n in range(3)]
    samples = list(read_samples(write(tmp_path / name, rows)))
    assert [s.row for s in samples] == [0, 1, 2]
    assert [s.images[0].path for s in samples] == [str(tmp_path / f"{n}.png") for n in range(3)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": TURNS, "images": ["a", "b"]},
            "1 <image> markers but 2 images; add a marker",
        ),
        ({"conversations": TURNS, "images": []}, "1 <image> markers but 0 images; add the missing"),
        ({"conversation": TURNS}, r"no field 'conversations'; the row has \['conversation'\]"),
        ({"conversations": "text"}, "must be a list of turns"),
        ({"conversations": []}, "must be a list of turns"),
        ({"conversations": TURNS[1:]}, "found 'assistant' where 'user' should speak"),
        ({"conversations": [TURNS[0], TURNS[0]]}, "found 'user' where 'assistant' should speak"),
        ({"conversations": TURNS[:1]}, "last turn must be the assistant's"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown role 'narrator'"),
        (
            {"conversations": [{"from": "human"}]},
            r"turn 0 needs 'from' and 'value', it has \['from'\]",
        ),
        ({"conversations": [{"from": "human", "value": None}]}, "must be a string, got NoneType"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "turn 1 is empty"),
        ({"conversations": TURNS, "images": "a.png"}, "'images' must be a list of paths"),
        (
            {"conversations": TURNS, "images": ["a"], "videos": ["v.mp4"]},
            "videos are not supported",
        ),
        (["not", "an", "object"], "a row must be an object, got list"),
    ],
)
def test_a_bad_row_is_named_counted_and_advised(tmp_path, row, message):
    good = {"conversations": TURNS, "images": ["a.png"]}
    path = write(tmp_path / "train.json", [good, row, good])
    with pytest.raises(ValueError, match=r"^row 1 of train\.json: ") as error:
        list(read_samples(path))
    assert error.match(message)
    bad_rows = []
    assert [s.row for s in read_samples(path, bad_rows=bad_rows)] == [0, 2]
    assert [(bad.source, bad.row) for bad in bad_rows] == [("train.json", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"x": 1}', r"must hold a JSON array of rows, it holds an object with \['x'\]"),
        ("a.json", '{"x": 1}\n{"x": 2}', "rename the file to .jsonl"),
        ("a.json", "[1, 2", "not a JSON array"),
        ("a.jsonl", '{"x": 1}\n{"x": ', "line 2 of a.jsonl is not JSON"),
        ("a.txt", "", "not a .json or .jsonl file"),
        ("a.json", b"[\xff\xfe]", "not UTF-8"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):  # a row can be skipped, a broken file cannot
        list(read_samples(path, bad_rows=[]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nothing.json"):
        list(read_samples(tmp_path / "nothing.json"))


def test_dataset_info_maps_fields(tmp_path):
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "images": "pictures"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry, "other": {}}))
    chat = [{"who": "me", "says": "<image>?"}, {"who": "it", "says": "!"}]
    write(tmp_path / "rows.json", [{"chat": chat, "pictures": ["a.png"]}])
    by_name = list(read_samples(tmp_path, dataset="mine"))
    beside = list(read_samples(tmp_path / "rows.json"))
    explicit = list(read_samples(tmp_path / "rows.json", mapping=entry))
    assert by_name == beside == explicit
    assert by_name[0].messages[0] == Message("user", (ImageRef(str(tmp_path / "a.png")), "?"))
    with pytest.raises(ValueError, match=r"no dataset 'yours' in .*; it has \['mine', 'other'\]"):
        list(read_samples(tmp_path, dataset="yours"))


def test_a_format_that_is_not_read_is_refused(tmp_path):
    path = write(tmp_path / "rows.json", [{"instruction": "a", "output": "b"}])
    with pytest.raises(ValueError, match="supported: sharegpt, openai"):
        list(read_samples(path, mapping={"formatting": "alpaca"}))


def test_the_real_set_reads_whole_and_in_both_forms(shared, realset_rows, realset_samples):
    assert len(realset_samples) == 2109
    for row, sample in zip(realset_rows, realset_samples):
        folder = str(shared / "realset") + "/"
        assert [image.path.removeprefix(folder) for image in sample.images] == row["images"]
    messages = list(read_samples(shared / "realset" / "realset_messages_200.jsonl"))
    ids = {row["id"]: n for n, row in enumerate(realset_rows)}
    lines = (shared / "realset" / "realset_messages_200.jsonl").read_text().splitlines()
    for line, sample in zip(lines, messages, strict=True):
        assert sample.messages == realset_samples[ids[json.loads(line)["id"]]].messages


def test_llama_factorys_demo_reads_by_name(shared):
    samples = list(read_samples(shared / "mllm_demo", dataset="mllm_demo"))
    assert len(samples) == 6
    assert all(sample.images for sample in samples)
