"""Rows of TRL (prompt and completion), ms-swift (query and response) and FineVision (texts), and null images."""

import dataclasses
import json

import pytest
from PIL import Image

from mmpack import Encoder, Reader
from mmpack.cli.main import main
from mmpack.hf import PackCollator

SIZE = (40, 30)


@pytest.fixture(autouse=True)
def pictures(tmp_path):
    for number in range(3):
        Image.new("RGB", SIZE).save(tmp_path / f"{number}.png")


@pytest.fixture(scope="module")
def small_encoder(small_set):
    return Encoder.from_folder(small_set / "tokenizer")


def read_one(row, folder, **options):
    (sample,) = Reader(media_dir=folder, **options).read([row])
    return sample


def turns(sample):
    """(role, content) of each turn, images by name."""
    names = [[p if isinstance(p, str) else p.path[-5:] for p in m.content] for m in sample.messages]
    return [(message.role, *content) for message, content in zip(sample.messages, names)]


def supervised(encoder, row):
    (sample,) = encoder.encode(encoder.read([row]))
    inner = getattr(encoder.tokenizer, "tokenizer", encoder.tokenizer)
    return inner.decode(sample.labels[sample.labels >= 0])


def user(*content):
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


IMAGE, WHAT = {"type": "image"}, {"type": "text", "text": "What?"}
PROMPTS = [
    {"prompt": "<image>What?", "completion": "A chart."},
    {"prompt": [user("<image>What?")], "completion": [assistant("A chart.")]},
    {"prompt": [user(IMAGE, WHAT)], "completion": "A chart."},
    {
        "prompt": json.dumps([user("<image>What?")]),
        "completion": json.dumps([assistant("A chart.")]),
    },
]


@pytest.mark.parametrize("row", PROMPTS, ids=["texts", "turns", "parts", "csv"])
def test_a_prompt_and_its_completion(row, tmp_path, small_encoder):
    row = row | {"images": ["0.png"], "system": "Be brief."}
    sample = read_one(row, tmp_path)
    said = [("system", "Be brief."), ("user", "0.png", "What?"), ("assistant", "A chart.")]
    assert turns(sample) == said
    encoder = dataclasses.replace(small_encoder, media_dir=tmp_path)
    as_messages = {"messages": [user("<image>What?"), assistant("A chart.")]}
    as_messages |= {"images": ["0.png"], "system": "Be brief."}
    ours, theirs = (next(encoder.encode(encoder.read([r]))) for r in (row, as_messages))
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    assert ours.labels.tolist() == theirs.labels.tolist()
    assert ours.grid_thw.tolist() == theirs.grid_thw.tolist()


def test_only_the_completion_has_a_loss(small_encoder):
    prompt = [user("One?"), assistant("First."), user("Two?")]
    row = {"prompt": prompt, "completion": [assistant("Second."), user("?"), assistant("Third.")]}
    text = supervised(small_encoder, row)
    end = text[len("Second.") : text.index("Third.")]
    assert text == f"Second.{end}Third.{end}"
    every = {"messages": [*prompt, *row["completion"]]}
    assert supervised(small_encoder, every) == f"First.{end}{text}"
    # `train_on_prompt` supervises all of it, as in a list of messages.
    everything = dataclasses.replace(small_encoder, train_on_prompt=True)
    assert supervised(everything, row) == supervised(everything, every)
    prompt[1]["loss"] = False
    assert "First." not in supervised(everything, row)
    prompt[1]["loss"] = True
    with pytest.raises(ValueError, match="turn 1 is the prompt's and asks for a loss"):
        supervised(small_encoder, row)


def test_a_collator_of_raw_rows_takes_them(small_encoder, tmp_path):
    """TRL's SFTTrainer gives the collator rows like these, without a mapping."""
    collate = PackCollator(dataclasses.replace(small_encoder, media_dir=tmp_path))
    batch = collate([PROMPTS[1] | {"images": ["0.png"]}, PROMPTS[0] | {"images": ["1.png"]}])
    same = [{"messages": [user("<image>What?"), assistant("A chart.")], "images": ["0.png"]}] * 2
    expected = collate(same)
    for name in ("input_ids", "labels", "image_grid_thw"):
        assert batch[name].tolist() == expected[name].tolist()


def test_query_and_response(tmp_path):
    row = {"query": "<image>What?", "response": "A chart.", "images": ["0.png"]}
    said = [("user", "0.png", "What?"), ("assistant", "A chart.")]
    assert turns(read_one(row, tmp_path)) == said
    row |= {"history": [["Hi", "Ho"]], "system": "Be brief."}
    before = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]
    assert turns(read_one(row, tmp_path)) == [*before, *said]


def pairs(*texts):
    return [{"user": u, "assistant": a} for u, a in texts]


def test_texts_of_pairs_take_the_images_first(tmp_path):
    row = {"texts": pairs(("What?", "A chart."), ("Sure?", "Yes."))}
    row["images"] = [(tmp_path / "0.png").read_bytes(), {"path": "1.png", "bytes": None}]
    first, *rest = turns(read_one(row, tmp_path))
    assert first == ("user", "bytes", "1.png", "What?")
    assert rest == [("assistant", "A chart."), ("user", "Sure?"), ("assistant", "Yes.")]
    row["texts"] = pairs(("What?", "A chart."), ("<image>And <image>?", "Yes."))
    row["images"] = ["0.png", "1.png"]
    *_, user, _ = turns(read_one(row, tmp_path))
    assert user == ("user", "0.png", "And ", "1.png", "?")
    row["texts"][1]["user"] = "<image>?"
    with pytest.raises(ValueError, match="1 <image> marker but 2 images"):
        read_one(row, tmp_path)
    row |= {"images": None, "texts": pairs(("Hi", "Ho"))}
    assert turns(read_one(row, tmp_path)) == [("user", "Hi"), ("assistant", "Ho")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "What?"}, r"no field 'conversations', .* the row has \['prompt'\]"),
        ({"prompt": [], "completion": "x"}, "'prompt' must be a text or a list of turns, got a l"),
        ({"prompt": "x", "completion": {"a": 1}}, "'completion' must be a text or a list of turns"),
        ({"prompt": "x", "completion": [user("y")]}, "the last turn must be the assistant's"),
        ({"query": "x", "response": ["y", "z"]}, "text of the output must be a string, got a list"),
        ({"query": "x", "response": "y", "history": [["z"]]}, "'history' must be a list of pairs"),
        ({"query": "x", "response": "y", "history": [["z", ["a"]]]}, "text of history 0 must be a"),
        ({"texts": []}, "'texts' must be a list of turns, got a list of 0"),
        ({"texts": ["x"]}, "pair 0 of 'texts' needs 'user' and 'assistant', got str"),
        ({"texts": [{"user": "x"}]}, r"pair 0 of 'texts' needs .*, got \['user'\]"),
        ({"texts": [{"user": "x", "assistant": None}]}, "text of pair 0 of 'texts' must be a str"),
        ({"texts": [{"user": "x", "assistant": "y", "loss": False}]}, "has 'loss', a weight of"),
        ({"texts": [{"user": "x", "assistant": "y", "system": "z"}]}, "has 'system', a system pro"),
        ({"question": "x", "answer": "y"}, r'map them: {"columns": {"prompt": "question", "resp'),
    ],
)
def test_what_is_wrong_with_such_rows(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_one(row, tmp_path)


def test_question_and_answer_can_be_mapped(tmp_path):
    mapping = {"columns": {"prompt": "question", "response": "answer"}}
    sample = read_one({"question": "What?", "answer": "This."}, tmp_path, mapping=mapping)
    assert turns(sample) == [("user", "What?"), ("assistant", "This.")]


@pytest.mark.parametrize("column", ["images", "image", "videos", "video"])
def test_lists_of_nulls_are_no_images(column, tmp_path):
    row = {"messages": [user("Hi"), assistant("Ho")], column: [None, None]}
    assert read_one(row, tmp_path).media == ()


def test_a_null_among_images_is_refused_with_its_place(tmp_path):
    row = {"messages": [user("<image>Hi"), assistant("Ho")], "images": ["0.png", None]}
    with pytest.raises(ValueError, match="image 1 of 2 in the row is null; remove it and its <im"):
        read_one(row, tmp_path)
    row["images"] = [None]
    with pytest.raises(ValueError, match="1 <image> marker but 0 images"):
        read_one(row, tmp_path)


def test_a_file_of_all_shapes_is_packed(tmp_path, small_set, capsys):
    rows = [
        PROMPTS[0] | {"images": ["0.png"]},
        {"query": "What?", "response": "This.", "images": [None]},
        {"texts": pairs(("What?", "A chart.")), "image": "1.png"},
        {"messages": [user("Hi"), assistant("Ho")]},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "all.jsonl").write_text(lines)
    arguments = ["--tokenizer", str(small_set / "tokenizer"), "--json"]
    assert main(["check", str(tmp_path / "all.jsonl"), *arguments]) == 0
    *checked, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["images"] for line in checked] == [1, 0, 1, 0]
    assert summary["summary"]["unread"] == []
