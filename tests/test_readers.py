import gzip
import json
import shutil

import pytest
from PIL import Image

from mmpack import Reader
from mmpack.data import images
from mmpack.types import ImageRef, Message

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]
SIZE = (30, 40)  # height, width of every picture below


@pytest.fixture(autouse=True)
def pictures(tmp_path):
    for name in ("a.png", "b.png", "0.png", "1.png", "2.png"):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / name)


def ref(folder, name):
    return ImageRef(str(folder / name), None, SIZE)


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read_one(tmp_path, row, **options):
    (sample,) = Reader(**options).read(write(tmp_path / "train.json", [row]))
    return sample


def test_sharegpt_row(tmp_path):
    sample = read_one(tmp_path, {"conversations": TURNS, "images": ["a.png"]})
    image = ref(tmp_path, "a.png")
    assert sample.messages == (Message("user", (image, "What?")), Message("assistant", ("This.",)))
    assert sample.images == (image,)
    assert (sample.source, sample.row) == ("train.json", 0)


def test_openai_row(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A <image> and <image>?"},
        {"role": "assistant", "content": "Yes."},
    ]
    other = tmp_path / "pictures"
    other.mkdir()
    for name in ("a.png", "b.png"):
        shutil.move(tmp_path / name, other / name)
    sample = read_one(tmp_path, {"messages": turns, "images": ["a.png", "b.png"]}, media_dir=other)
    assert sample.messages[0] == Message("system", ("Be brief.",))
    user = ("A ", ref(other, "a.png"), " and ", ref(other, "b.png"), "?")
    assert sample.messages[1].content == user


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "value": "a.png"},
        {"type": "image"},
    ],
)
def test_content_parts(tmp_path, part):
    content = ["See ", part, {"type": "text", "text": "and say what <image> means."}]
    answer = {"role": "assistant", "content": [{"type": "text", "value": "A marker."}]}
    row = {"messages": [{"role": "user", "content": content}, answer]}
    if len(part) == 1:  # the picture comes from the row's list
        row["images"] = ["a.png"]
    sample = read_one(tmp_path, row)
    # Beside a part that is a picture, <image> in a text is text.
    assert sample.messages[0].content == (
        "See ",
        ref(tmp_path, "a.png"),
        "and say what <image> means.",
    )
    assert sample.messages[1].content == ("A marker.",)


def test_alpaca_row(tmp_path):
    row = {
        "instruction": "<image>Count.",
        "input": "In German.",
        "output": "Drei.",
        "history": [["Hi", "Hello"], ["Ready?", "Yes"]],
        "system": "Be brief.",
        "images": ["a.png"],
    }
    sample = read_one(tmp_path, row)
    assert [(m.role, m.content) for m in sample.messages] == [
        ("system", ("Be brief.",)),
        ("user", ("Hi",)),
        ("assistant", ("Hello",)),
        ("user", ("Ready?",)),
        ("assistant", ("Yes",)),
        ("user", (ref(tmp_path, "a.png"), "Count.\nIn German.")),
        ("assistant", ("Drei.",)),
    ]


TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}


def test_tools_and_calls_are_kept_as_the_row_has_them(tmp_path):
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Three."},
        ],
        "tools": json.dumps([TOOL]),
    }
    call = {"type": "function", "function": CALL}
    openai = {
        "messages": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": TOOL,
    }
    for row in (sharegpt, openai):
        sample = read_one(tmp_path, row)
        assert sample.tools == (TOOL,)
        assert sample.messages == (
            Message("user", ("1+2?",)),
            Message("assistant", (), (call,)),
            Message("tool", ("3",)),
            Message("assistant", ("Three.",)),
        )
    assert read_one(tmp_path, {**openai, "tools": "[]"}).tools == ()
    (sample,) = Reader().read([{**openai, "tools": float("nan")}])  # CSV by pandas
    assert sample.tools == ()
    text = {**CALL, "arguments": '{"a":1}'}
    openai["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [text]}
    assert read_one(tmp_path, openai).messages[1] == Message("assistant", ("",), (text,))


def test_a_system_turn_outranks_the_system_column(tmp_path):
    row = {"conversations": TURNS, "images": ["a.png"], "system": "column"}
    assert read_one(tmp_path, row).messages[0] == Message("system", ("column",))
    row["conversations"] = [{"from": "system", "value": "turn"}, *TURNS]
    assert read_one(tmp_path, row).messages[0] == Message("system", ("turn",))


@pytest.mark.parametrize("given", [{}, {"images": None}, {"images": []}, {"images": ""}])
def test_rows_without_images(tmp_path, given):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert read_one(tmp_path, {"conversations": turns, **given}).images == ()


@pytest.mark.parametrize(
    "given",
    [
        {"images": ["a.png"]},
        {"images": "a.png"},
        {"images": '["a.png"]'},
        {"image": "a.png"},
        {"image": ["a.png"]},
        {"images": [{"path": "a.png", "bytes": None}]},
        {"images": [".\\a.png"]},
        {"images": ["nested/../a.png"]},
    ],
)
def test_ways_to_name_an_image(tmp_path, given):
    sample = read_one(tmp_path, {"conversations": TURNS, **given})
    assert sample.images == (ref(tmp_path, "a.png"),)


def test_images_inside_the_row(tmp_path):
    data = (tmp_path / "a.png").read_bytes()
    picture = Image.open(tmp_path / "a.png")
    spec_rows = [
        {"images": [data]},
        {"images": [{"bytes": data, "path": "x/a.png"}]},
        {"image": picture},
    ]
    for row in spec_rows:
        (sample,) = Reader().read([{"conversations": TURNS, **row}])
        assert sample.images[0].size == SIZE
        pixels = images.load_patches(sample.images[0], *grid_of(sample.images[0]))
        assert (pixels == 0).all()


def grid_of(image):
    from mmpack import VisionSpec

    vision = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 16)
    return vision.image_grid(*image.size), vision


def test_data_uris_are_read_where_allowed(tmp_path):
    import base64

    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    row = {"conversations": TURNS, "images": [uri]}
    assert read_one(tmp_path, row, media_dir=["data:"]).images[0].size == SIZE
    with pytest.raises(ValueError, match=r"data:image/png;base64,\.\.\. is a data URI") as error:
        read_one(tmp_path, row)
    assert len(str(error.value)) < 300
    for broken in ("data:image/png,abc", "data:image/png;base64,a?b"):
        with pytest.raises(ValueError, match="base64"):
            read_one(tmp_path, {**row, "images": [broken]}, media_dir=[tmp_path, "data:"])


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_file_types_give_the_same_samples(tmp_path, name, compression):
    rows = [{"conversations": TURNS, "images": [f"{n}.png"]} for n in range(3)]
    data = write(tmp_path / name, rows).read_bytes()
    (tmp_path / name).unlink()
    if compression == ".gz":
        data = gzip.compress(data)
    elif compression == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    name += compression
    (tmp_path / name).write_bytes(data)
    samples = list(Reader().read(tmp_path / name))
    assert [s.row for s in samples] == [0, 1, 2]
    assert [s.images[0].path for s in samples] == [str(tmp_path / f"{n}.png") for n in range(3)]


def test_folders_and_lists_of_files(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    row = {"conversations": TURNS, "images": ["a.png"]}
    for name in ("b.jsonl", "a.jsonl"):
        write(folder / name, [row, row])
    (folder / "dataset_info.json").write_text("{}")
    (folder / "notes.txt").write_text("not data")
    by_folder = list(Reader(media_dir=tmp_path).read(folder))
    assert [(s.source, s.row) for s in by_folder] == [
        ("a.jsonl", 0),
        ("a.jsonl", 1),
        ("b.jsonl", 0),
        ("b.jsonl", 1),
    ]
    by_list = list(Reader(media_dir=tmp_path).read([folder / "a.jsonl", folder / "b.jsonl"]))
    assert by_list == by_folder
    write(folder / "c.json", [row])
    with pytest.raises(ValueError, match=r"files of several types \['.json', '.jsonl'\]; name"):
        list(Reader().read(folder))


def test_a_nested_row_is_several_samples(tmp_path):
    row = {"conversations": TURNS, "image": "a.png"}
    samples = list(Reader().read(write(tmp_path / "t.json", [row, [row, row]])))
    assert [sample.row for sample in samples] == [0, 1, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": TURNS, "images": ["a.png", "b.png"]},
            "1 <image> marker but 2 images; add a marker",
        ),
        (
            {"conversations": TURNS, "images": []},
            "1 <image> marker but 0 images; add the missing image",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "<Image>?"}, TURNS[1]],
                "images": ["a.png"],
            },
            "0 <image> markers but 1 image; write markers as <image>",
        ),
        ({}, r"the row has \[\]; a Trainer removes .* remove_unused_columns=False"),
        ({"conversation": TURNS}, r"no field 'conversations', .*; the row has \['conversation'\]"),
        ({"conversations": "text"}, "must be a list of turns, got 'text'"),
        ({"conversations": []}, "must be a list of turns, got a list of 0"),
        (
            {"conversations": TURNS[1:]},
            r"all turns are the assistant's \(roles: assistant\); .* --stage pretrain",
        ),
        ({"conversations": TURNS[:1]}, "last turn must be the assistant's"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "unknown role 'narrator'; use one of",
        ),
        (
            {"conversations": [{"value": "x"}]},
            r"turn 0 needs 'from' and 'value', got \['value'\]",
        ),
        ({"conversations": [{"from": "human"}]}, "text of turn 0 must be a string, got None"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "turn 1 is empty"),
        ({"conversations": TURNS, "images": [5]}, "must be a path, bytes or a PIL image, got int"),
        ({"conversations": TURNS, "images": [{}]}, "needs 'path' or 'bytes', got"),
        (
            {"conversations": TURNS, "images": ["a.png"], "image": "b.png"},
            "both 'images' and 'image'",
        ),
        (
            {"conversations": TURNS, "images": ["a.png"], "videos": ["v.mp4"]},
            "0 <video> markers but 1 video",
        ),
        ({"instruction": "x", "output": None}, "no field 'output'"),
        (
            {"instruction": "x", "output": "y", "history": [["one"]]},
            "'history' must be a list of pairs",
        ),
        ({"instruction": "x", "output": "y", "history": 0}, "'history' must be a list of pairs"),
        ({"instruction": 0, "output": "y"}, "text of the instruction must be a string, got 0"),
        (
            {"instruction": "Is it even?", "input": 0, "output": "Yes."},
            "text of the instruction must be a string, got 0",
        ),
        ({"conversations": TURNS, "images": ["a.png"], "system": 0}, "the system prompt must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "content part of type 'audio'; use text, image or video parts",
        ),
        (
            {"conversations": [TURNS[0], {"from": "function_call", "value": "add(1, 2)"}]},
            "turn 1 has a function call without name and arguments",
        ),
        ("text", "a row must be an object, got str"),
    ],
)
def test_a_bad_row_is_named_counted_and_advised(tmp_path, row, message):
    good = {"conversations": TURNS, "images": ["a.png"]}
    path = write(tmp_path / "train.json", [good, row, good])
    with pytest.raises(ValueError, match=r"^row 1 of train\.json: ") as error:
        list(Reader().read(path))
    assert error.match(message)
    bad_rows = []
    assert [s.row for s in Reader(on_error=bad_rows).read(path)] == [0, 2]
    (bad,) = bad_rows
    assert (bad.source, bad.row, bad.content) == ("train.json", 1, row)
    assert bad.error
    assert bad.advice
    with pytest.warns(UserWarning, match=r"left out row 1 of train\.json"):
        assert len(list(Reader(on_error="skip").read(path))) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"x": 1}', r"must hold a JSON array of rows, got an object with \['x'\]"),
        ("a.json", '{"x": 1}\n{"x": 2}', "rename the file to .jsonl"),
        ("a.json", "[1, 2", "a.json is not a JSON array"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.jsonl", '[{"x": 1}]', "holds a JSON array, not lines; rename it to .json"),
        ("a.txt", "", "has none of the suffixes .json, .jsonl"),
        ("a.json", b"[\xff\xfe]", "a.json is not UTF-8"),
        ("a.json", b"\x1f\x8b\x08", "a.json is gzip data"),
        ("a.parquet", "PAR", "a.parquet is not a Parquet file"),
        ("a.arrow", "ARROW", "a.arrow is not an Arrow file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):  # a row can be skipped, a broken file cannot
        list(Reader(on_error=[]).read(path))


def test_a_bad_line_is_a_bad_row(tmp_path):
    good = json.dumps({"conversations": TURNS, "images": ["a.png"]})
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n{good[:20]}\n{good}\n")
    bad_rows = []
    assert [s.row for s in Reader(on_error=bad_rows).read(tmp_path / "a.jsonl")] == [0, 2]
    assert str(bad_rows[0]).startswith("row 1 of a.jsonl: line 3 is not JSON")


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_csv(tmp_path, compression):
    pyarrow = pytest.importorskip("pyarrow")
    data = 'instruction,output\n"Hi, you",Ho\n'.encode("utf-8-sig")
    codec = {"gz": "gzip", "zst": "zstd"}[compression]
    (tmp_path / f"a.csv.{compression}").write_bytes(pyarrow.compress(data, codec, asbytes=True))
    (sample,) = Reader().read(tmp_path / f"a.csv.{compression}")
    assert [m.content for m in sample.messages] == [("Hi, you",), ("Ho",)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst"])
def test_what_is_not_compressed_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(ValueError, match=name):
        list(Reader().read(tmp_path / name))


def test_csv_rows_of_another_width_are_bad(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\nHi,Ho\nHi,Ho,Hu\nHi\nHi,Ho\n")
    bad_rows = []
    assert [s.row for s in Reader(on_error=bad_rows).read(tmp_path / "a.csv")] == [0, 3]
    assert [bad.error for bad in bad_rows] == [
        "line 3 does not have the 2 fields of the first line",
        "line 4 does not have the 2 fields of the first line",
    ]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nothing.json"):
        list(Reader().read(tmp_path / "nothing.json"))


def test_options_are_checked(tmp_path):
    path = write(tmp_path / "t.json", [{"conversations": TURNS[1:]}])
    for option in ("on_error", "missing_marker", "verify"):
        with pytest.raises(ValueError, match=f"{option} must be"):
            list(Reader(**{option: "maybe"}).read(path))


def test_a_missing_marker_is_put_in_front_if_asked(tmp_path):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Which is larger?"},
        {"from": "gpt", "value": "The first."},
    ]
    row = {"conversations": turns, "images": ["a.png", "b.png"]}
    with pytest.raises(ValueError, match="0 <image> markers but 2 images; add a marker"):
        read_one(tmp_path, row)
    sample = read_one(tmp_path, row, missing_marker="prepend")
    images_then_text = (ref(tmp_path, "a.png"), ref(tmp_path, "b.png"), "Which is larger?")
    assert sample.messages[1].content == images_then_text
    turns[2]["value"] = "<image>"  # one marker anywhere, and the rule does not apply
    with pytest.raises(ValueError, match="1 <image> marker but 2 images"):
        read_one(tmp_path, row, missing_marker="prepend")


def test_dataset_info_maps_fields(tmp_path, caplog):
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "images": "pictures"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry, "other": {}}))
    chat = [
        {"who": "system", "says": "Hm."},  # a tag the entry leaves out keeps its default
        {"who": "me", "says": "<image>?"},
        {"who": "it", "says": "!"},
    ]
    rows = [{"chat": chat, "pictures": ["a.png"], "system": text} for text in ("", "Hm.", "Hm.")]
    rows[1]["chat"] = rows[2]["chat"] = chat[1:]
    write(tmp_path / "rows.json", rows)
    with caplog.at_level("WARNING", "mmpack"):
        by_name = list(Reader(mapping="mine").read(tmp_path))
    notes = [record.getMessage() for record in caplog.records]
    assert notes[0].startswith(
        "the mapping of rows.json leaves fields out; using defaults system_tag='sys"
    )
    name = "the mapping of rows.json does not name the column 'system'"  # said where it is read
    assert notes[1:] == [f"{name}, which row 1 has; it is read"]
    beside = list(Reader().read(tmp_path / "rows.json"))
    explicit = list(Reader(mapping=entry).read(tmp_path / "rows.json"))
    assert by_name == beside == explicit
    assert by_name[0].messages[1] == Message("user", (ref(tmp_path, "a.png"), "?"))
    with pytest.raises(
        ValueError, match=r"no dataset 'yours' in .*; use one of \['mine', 'other'\]"
    ):
        list(Reader(mapping="yours").read(tmp_path))
    with pytest.raises(ValueError, match="no dataset 'other'|no file_name"):
        list(Reader(mapping="other").read(tmp_path))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"formatting": "rlhf"}, "formatting 'rlhf' is not supported"),
        ({"ranking": True}, "with 'ranking'"),
    ],
)
def test_what_a_dataset_info_asks_too_much(tmp_path, entry, message):
    path = write(tmp_path / "rows.json", [{"instruction": "a", "output": "b"}])
    with pytest.raises(ValueError, match=message):
        list(Reader(mapping=entry).read(path))


def test_the_dataset_info_of_datasets_is_not_mistaken(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"features": {}, "citation": ""}')
    path = write(tmp_path / "rows.json", [{"instruction": "a", "output": "b"}])
    assert len(list(Reader().read(path))) == 1
