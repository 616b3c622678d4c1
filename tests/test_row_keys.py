"""Keys of rows, turns and content parts: honoured, refused by name, or named as unread; none in silence."""

import copy
import dataclasses
import json
import logging

import pytest
from PIL import Image

from mmpack import PackedDataset, PackStream, Reader, render_prompt
from mmpack.cli.main import main
from mmpack.data.row_keys import (
    LOSS_KEYS,
    PART_KEYS,
    ROW_KEYS,
    THOUGHT_KEYS,
    TURN_KEYS,
    unread_line,
)
from mmpack.hf import PackCollator

TWO_ANSWERS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "A poor answer."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "A good answer."},
    ]
}
# Arrow and pandas add such keys.
NO_MEANING = [None, "", [], {}, [None], {"ref": None, "bbox": []}, float("nan")]


def with_turn(number, **keys):
    row = copy.deepcopy(TWO_ANSWERS)
    row["messages"][number] |= keys
    return row


def with_part(**keys):
    row = copy.deepcopy(TWO_ANSWERS)
    row["messages"][1]["content"] = [{"type": "text", "text": "One?", **keys}]
    return row


def refusal(row, **options):
    """The text of a row's error, without "row 0 of rows: "."""
    with pytest.raises(ValueError, match=r"^row 0 of rows: ") as error:
        list(Reader(**options).read([row]))
    return str(error.value).removeprefix("row 0 of rows: ")


def encoded(encoder, row):
    (sample,) = encoder.encode(encoder.read([row]))
    return sample


def supervised(encoder, row):
    sample = encoded(encoder, row)
    inner = getattr(encoder.tokenizer, "tokenizer", encoder.tokenizer)
    return inner.decode(sample.labels[sample.labels >= 0])


def places(encoder, row):
    """Whether each token is supervised."""
    return (encoded(encoder, row).labels >= 0).tolist()


# ---------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("key", sorted(LOSS_KEYS))
@pytest.mark.parametrize("no", [False, 0, 0.0])
def test_a_turn_marked_without_loss_is_not_supervised(small_encoder, key, no):
    both = supervised(small_encoder, TWO_ANSWERS)
    end = both[len("A poor answer.") : both.index("A good")]
    assert both == f"A poor answer.{end}A good answer.{end}"
    assert supervised(small_encoder, with_turn(2, **{key: no})) == f"A good answer.{end}"
    assert supervised(small_encoder, with_turn(4, **{key: no})) == f"A poor answer.{end}"
    before, after = (encoded(small_encoder, r) for r in (TWO_ANSWERS, with_turn(2, **{key: no})))
    assert before.input_ids.tolist() == after.input_ids.tolist()


def test_a_mark_that_asks_for_the_usual_changes_nothing(small_encoder):
    usual = encoded(small_encoder, TWO_ANSWERS).labels.tolist()
    for keys in ({"loss": True}, {"weight": 1}, {"weight": 1.0, "loss": True}, {"loss_weight": 1}):
        assert encoded(small_encoder, with_turn(4, **keys)).labels.tolist() == usual
    for number in (0, 1):
        row = with_turn(number, loss=False, weight=0)
        assert encoded(small_encoder, row).labels.tolist() == usual
    for value in NO_MEANING[:-1]:  # NaN would be a weight of 1, see tests/test_weights.py
        assert encoded(small_encoder, with_turn(4, weight=value)).labels.tolist() == usual


def test_marks_and_the_options_of_loss(small_encoder):
    last = dataclasses.replace(small_encoder, mask_history=True)
    assert supervised(last, with_turn(2, loss=False)) == supervised(last, TWO_ANSWERS)
    with pytest.raises(ValueError, match="no token of the row is supervised"):
        encoded(last, with_turn(4, loss=False))
    everything = dataclasses.replace(small_encoder, train_on_prompt=True)
    all_text = places(everything, TWO_ANSWERS)
    for number in (1, 2):  # a question, an answer: without it and what ends it
        some = places(everything, with_turn(number, loss=False))
        left_out = [n for n, (a, b) in enumerate(zip(all_text, some)) if a and not b]
        assert left_out == list(range(left_out[0], left_out[-1] + 1))
        ids = encoded(everything, TWO_ANSWERS).input_ids[left_out]
        inner = getattr(everything.tokenizer, "tokenizer", everything.tokenizer)
        said = TWO_ANSWERS["messages"][number]["content"]
        assert said in inner.decode(ids)
        assert inner.decode(ids).endswith(("<|im_end|>", said))
        assert not [n for n, (a, b) in enumerate(zip(all_text, some)) if b and not a]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            with_turn(2, weight=-0.5),
            "turn 2 has 'weight' -0.5; a weight of the loss is true, false",
        ),
        (with_turn(2, loss="no"), "turn 2 has 'loss' 'no'; a weight of the loss is true, false"),
        (with_turn(1, loss=True), "turn 1 is the user's and asks for a loss with 'loss'; remove"),
        (with_turn(0, weight=1), "turn 0 is the system's and asks for a loss with 'weight'"),
        (with_turn(1, tool_calls=[{}]), "turn 1 is the user's and has 'tool_calls'"),
        (with_turn(2, weight=1, loss=False), "turn 2 has 'loss' and 'weight' that differ"),
        (
            {"messages": [with_turn(1, loss_scale=2)["messages"][1], TWO_ANSWERS["messages"][2]]},
            "turn 0 has 'loss_scale', a weight of the loss in ms-swift",
        ),
    ],
)
def test_marks_that_cannot_be_honoured_are_refused(row, message):
    assert refusal(row).startswith(message)


def test_a_row_without_any_loss_is_refused(small_encoder):
    row = with_turn(2, loss=False)
    row["messages"][4]["loss"] = False
    with pytest.raises(ValueError, match="no token of the row is supervised"):
        encoded(small_encoder, row)
    chat = {"messages": [{"role": "assistant", "content": "A text.", "loss": False}]}
    assert refusal(chat, stage="pretrain").startswith("the document's turn is marked as")


# ---------------------------------------------------------------------------------------- refused


PLACES = {
    "the row": (ROW_KEYS, lambda **keys: TWO_ANSWERS | keys),
    "turn 2": (TURN_KEYS, lambda **keys: with_turn(2, **keys)),
    "the text part of turn 1": (PART_KEYS, with_part),
}
READ_IN_TEXT_PARTS = ("text", "value")


@pytest.mark.parametrize("where", PLACES)
def test_keys_that_mean_something_elsewhere_are_refused(where):
    table, make = PLACES[where]
    assert len(table) >= 30
    for key, meaning in table.items():
        if where == "the text part of turn 1" and key in READ_IN_TEXT_PARTS:
            continue
        if where == "turn 2" and key in THOUGHT_KEYS:  # read in the assistant's turns
            continue
        text = refusal(make(**{key: "given"}))
        assert text.startswith(f"{where} has {key!r}") or text.startswith(f"the row has {key!r}")
        assert "; " in text  # an advice
        for value in (*NO_MEANING, *meaning.neutral):
            assert len(list(Reader().read([make(**{key: value})]))) == 1, (key, value)


def test_families_of_keys_and_their_documents():
    text = refusal(TWO_ANSWERS | {"rejected_images": ["a"]})
    assert text.startswith("the row has 'rejected_images', preference data in TRL")
    assert refusal({"text": "A text.", "label": 1}, stage="pretrain").startswith(
        "the row has 'label'"
    )
    # A row of another shape: what it holds says more than the names it lacks.
    row = {"prompt": "What?", "chosen": "This.", "rejected": "That."}
    assert refusal(row).startswith("the row has 'chosen', preference data")
    part = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
    row = {"messages": [{"role": "user", "content": [part]}]}
    assert refusal(row).startswith("turn 0: 'detail' 'low' of an image is not supported")
    row["messages"][0]["content"] = [{"type": "image", "image": "a.png", "image_url": "b.png"}]
    assert refusal(row).startswith("the image part of turn 0 has 'image' and 'image_url'; keep one")


def test_a_column_that_a_mapping_names_is_read():
    row = {"label": "What?", "rejected": "This.", "ref": "Be brief."}
    columns = {"prompt": "label", "response": "rejected", "system": "ref"}
    (sample,) = Reader(mapping={"columns": columns}).read([row])
    assert [message.content for message in sample.messages] == [
        ("Be brief.",),
        ("What?",),
        ("This.",),
    ]


@pytest.mark.parametrize("text", ["<ref-object>", "at <bbox>", "<ref-object><bbox></bbox>"])
def test_placeholders_of_boxes_are_refused(text):
    message = refusal(with_turn(2, content=text))
    assert message.startswith("turn 2 has the placeholder <")
    assert message.endswith("docs/grounding.md")


def test_an_element_named_bbox_is_text():
    (sample,) = Reader().read([with_turn(2, content="<bbox>1, 2</bbox>")])
    assert sample.messages[2].content == ("<bbox>1, 2</bbox>",)


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "value",
    [
        "0.png",
        "some folder/a picture.JPEG",
        ["0.png", "1.webp"],
        "clip.mp4",
        "https://example.com/a.jpg",
        "data:image/png;base64,AAAA",
        {"bytes": b"x", "path": None},
        [{"bytes": None, "path": "a"}],
        pytest.param(Image.new("RGB", (2, 2)), id="a PIL image"),
        "scan.JFIF",
        "page.ppm",
        "data:video/mp4;base64,AAAA",
        pytest.param([Image.new("RGB", (2, 2))], id="PIL images"),
    ],
    ids=str,
)
def test_pictures_in_a_column_that_is_not_read_are_refused(value):
    message = refusal(TWO_ANSWERS | {"imgs": value})
    assert message.startswith("the row has what looks like images or videos in 'imgs'")
    assert "rename it to 'images' or 'videos', or map it" in message
    with_marker = with_turn(1, content="<image>One?") | {"imgs": value}
    assert refusal(with_marker) == message  # not "add the missing image"
    assert refusal({"text": "A text.", "imgs": value}, stage="pretrain") == message
    in_turn = refusal(with_turn(1, img=value))
    assert in_turn.startswith("turn 1 has what looks like images or videos in 'img'")


@pytest.mark.parametrize(
    "value", ["no", "see a.png\nthen b.png", [], ["0.png", 1], {"path": 1, "width": 2}, 3, b"x"]
)
def test_other_values_are_not_pictures(value):
    assert len(list(Reader().read([TWO_ANSWERS | {"imgs": value}]))) == 1


def test_pictures_beside_those_of_the_row_are_only_named(tmp_path, caplog):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    row = with_turn(1, content="<image>One?") | {"images": ["a.png"], "thumbnail": "b.png"}
    with caplog.at_level("WARNING", "mmpack"):
        assert len(list(Reader(media_dir=tmp_path).read([row]))) == 1
    assert [r.getMessage() for r in caplog.records] == ["rows: unread fields: thumbnail (1 row)"]


# ---------------------------------------------------------------------------------------- named


def noted(number):
    """A row with fields that nobody reads."""
    row = with_turn(1, name="me", tool_call_id=None) | {"id": number, "images": []}
    row["messages"][3]["content"] = [{"type": "text", "text": "Two?", "cache_control": "x"}]
    return row | ({"source": "web"} if number % 2 else {"source": ""})


def line_of(name, rows, turns=True):
    fields = {"id": rows, "cache_control of a part": rows, "name of a turn": rows}
    return unread_line(name, fields | {"source": rows // 2})


@pytest.fixture
def two_files(tmp_path):
    for name, rows in (("a.jsonl", 6), ("b.jsonl", 4)):
        lines = [json.dumps(noted(n)) + "\n" for n in range(rows)]
        (tmp_path / name).write_text("".join(lines))
    return tmp_path


def test_the_line_of_a_file():
    fields = {"id": 2109, "source": 40, "a\nb": 3}
    line = unread_line("train.json", fields)
    assert line == r"train.json: unread fields: id (2,109 rows), source (40), 'a\nb' (3)"
    many = {f"key{n:02}": 1 for n in range(20)}
    assert unread_line("x", many).endswith("key10 (1), key11 (1) and 8 more")


def test_fields_that_are_not_read_are_named_once_per_file(two_files, caplog):
    files = [two_files / name for name in ("a.jsonl", "b.jsonl")]
    with caplog.at_level("WARNING", "mmpack"):
        assert len(list(Reader().read(files))) == 10
    expected = [line_of("a.jsonl", 6), line_of("b.jsonl", 4)]
    assert [record.getMessage() for record in caplog.records] == expected


@pytest.mark.parametrize("jobs", [1, None])
def test_data_sets_name_them(two_files, small_encoder, caplog, jobs):
    with caplog.at_level("WARNING", "mmpack"):
        PackedDataset.from_files([two_files / "a.jsonl"], small_encoder, 512, jobs=jobs)
    assert [record.getMessage() for record in caplog.records] == [line_of("a.jsonl", 6)]


def test_check_and_pack_name_them(two_files, small_set, capsys):
    files = [str(two_files / name) for name in ("a.jsonl", "b.jsonl")]
    expected = {line_of("a.jsonl", 6), line_of("b.jsonl", 4)}
    assert main(["check", *files]) == 0
    assert expected <= set(capsys.readouterr().out.splitlines())
    assert main(["check", *files, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert [found["file"] for found in summary["unread"]] == ["a.jsonl", "b.jsonl"]
    assert summary["unread"][0]["fields"]["id"] == 6
    pack = ["pack", *files, "--tokenizer", str(small_set / "tokenizer"), "--capacity", "512"]
    assert main([*pack, "--out", str(two_files / "out")]) == 0
    assert expected <= set(capsys.readouterr().out.splitlines())
    assert main([*pack, "--out", str(two_files / "json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unread"]["b.jsonl"]["name of a turn"] == 4
    assert main([*pack, "--out", str(two_files / "part"), "--shard", "1/1"]) == 0
    assert expected <= set(capsys.readouterr().out.splitlines())


def test_streams_collators_and_prompts_name_them_once(small_encoder, caplog):
    rows = [noted(n) for n in range(8)]
    with caplog.at_level("WARNING", "mmpack"):
        assert len(list(PackStream(rows, small_encoder, 512, buffer=4))) >= 1
    told = [record.getMessage() for record in caplog.records]
    assert sum("id (" in text for text in told) == 1
    assert sum("source (" in text for text in told) == 1
    assert all(text.startswith("the stream: unread fields: ") for text in told)
    caplog.clear()
    collate = PackCollator(small_encoder)
    with caplog.at_level("WARNING", "mmpack"):
        for _ in range(3):
            collate(rows)
    assert [record.getMessage() for record in caplog.records] == [line_of("rows", 8)]
    caplog.clear()
    with caplog.at_level("WARNING", "mmpack"):
        render_prompt([{"role": "user", "content": "Hi", "name": "me"}], small_encoder)
    assert [record.getMessage() for record in caplog.records] == [
        "messages: unread fields: name of a turn (1 row)"
    ]
    assert logging.getLogger("mmpack").level == logging.NOTSET
    with pytest.raises(ValueError, match="turn 0 has 'thinking'"):
        render_prompt([{"role": "user", "content": "Hi", "thinking": "Hm."}], small_encoder)
