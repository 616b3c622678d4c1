"""Weights of rows and turns: read, encoded token by token, stored, shown; and which are refused."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mmpack import Encoder, Message, PackedDataset, Reader, Sample
from mmpack.cli.main import main
from mmpack.packing.loss_weights import loss_weights

TEMPLATE = Path(__file__).parent / "templates" / "qwen3_vl.jinja"
ROW = {
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "A poor answer."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "A good answer."},
    ]
}
CALLS = {
    "messages": [
        {"role": "user", "content": "One?"},
        {
            "role": "assistant",
            "content": "I look.",
            "weight": 0.25,
            "tool_calls": [{"function": {"name": "look", "arguments": {"at": "one"}}}],
        },
        {"role": "tool", "content": "Bars."},
        {"role": "assistant", "content": "Bars.", "weight": 3},
    ]
}


def row_with(weight=None, turn=None, **keys):
    row = copy.deepcopy(ROW)
    row |= {} if weight is None else {"weight": weight}
    row["messages"][3] |= {} if turn is None else {"weight": turn}
    return row | keys


def encoded(encoder, row):
    (sample,) = encoder.encode(encoder.read([row]))
    return sample


def said(encoder, row):
    """Text of each run of supervised tokens of one weight -> its weight."""
    sample = encoded(encoder, row)
    inner = getattr(encoder.tokenizer, "tokenizer", encoder.tokenizer)
    runs, places = {}, np.flatnonzero(sample.labels >= 0)
    weights = sample.weights[places]
    cuts = np.flatnonzero((np.diff(places) > 1) | (np.diff(weights) != 0)) + 1
    for part in np.split(places, cuts):
        runs[inner.decode(sample.labels[part])] = float(sample.weights[part[0]])
    return runs


# ---------------------------------------------------------------------------------------- read


@pytest.mark.parametrize("key", ["weight", "loss_weight", "sample_weight"])
@pytest.mark.parametrize("value", [2, 2.0, "2", "2.0"])
def test_a_row_has_a_weight(key, value):
    (sample,) = Reader().read([{**ROW, key: value}])
    assert sample.weight == 2
    assert [message.weight for message in sample.messages] == [1] * 4


@pytest.mark.parametrize("value", [None, "", 1, True, 1.0])
def test_a_weight_of_one_changes_nothing(small_encoder, value):
    for row in (row_with(weight=value), row_with(turn=value)):
        assert encoded(small_encoder, row).weights is None


def test_every_shape_has_a_weight(tmp_path):
    alpaca = {"instruction": "One?", "output": "Bars.", "weight": 0.5}
    completion = {"prompt": "One?", "completion": "Bars.", "weight": 0.5}
    pairs = {"texts": [{"user": "One?", "assistant": "Bars."}], "weight": 0.5}
    assert [one.weight for one in Reader().read([alpaca, completion, pairs])] == [0.5] * 3
    (document,) = Reader(stage="pretrain").read([{"text": "Bars.", "weight": 0.5}])
    assert document.weight == 0.5
    (tmp_path / "rows.csv").write_text("instruction,output,weight\nOne?,Bars.,0.25\nTwo?,Eggs.,\n")
    assert [one.weight for one in Reader().read(tmp_path / "rows.csv")] == [0.25, 1]
    mapped = {"columns": {"prompt": "weight", "response": "say"}}  # a column that holds text
    (sample,) = Reader(mapping=mapped).read([{"weight": "One?", "say": "Bars."}])
    assert (sample.weight, sample.messages[0].content) == (1, ("One?",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (row_with(weight=-1), "the row has 'weight' -1; a weight of the loss is true, false, 0 or"),
        (row_with(weight=float("nan")), "the row has 'weight' nan; a weight"),
        (row_with(weight=float("inf")), "the row has 'weight' inf; a weight"),
        (row_with(weight="much"), "the row has 'weight' 'much'; a weight"),
        (row_with(weight="nan"), "the row has 'weight' nan; a weight"),
        (row_with(weight=[1]), "the row has 'weight' a list of 1; a weight"),
        (row_with(weight=2e6), "the row has 'weight' 2000000.0; a weight"),
        (row_with(weight=1e-7), "the row has 'weight' 1e-07; a weight"),
        (row_with(weight=0), "the row has 'weight' 0, so no token of it would be supervised; drop"),
        (row_with(weight=False), "the row has 'weight' 0, so no token"),
        (row_with(weight=2, sample_weight=3), "the row has 'sample_weight' and 'weight' that differ"),
        (row_with(loss=0.5), "the row has 'loss', a weight of the loss in ms-swift and other"),
        (row_with(turn=-0.5), "turn 3 has 'weight' -0.5; a weight"),
        (row_with(turn=float("nan")), "turn 3 has 'weight' nan; a weight"),
        (row_with(turn=float("inf")), "turn 3 has 'weight' inf; a weight"),
        (row_with(turn="0.5"), "turn 3 has 'weight' '0.5'; a weight"),
        ({"messages": [{**ROW["messages"][0], "weight": 0.5}, ROW["messages"][1]]},
         "turn 0 is the user's and asks for a loss with 'weight'"),
        ({"messages": [ROW["messages"][0], {**ROW["messages"][1], "loss": 2, "weight": 3}]},
         "turn 1 has 'loss' and 'weight' that differ"),
        ({"messages": [ROW["messages"][0], {**ROW["messages"][1], "loss": False, "weight": 3}]},
         "turn 1 has 'loss' and 'weight' that differ"),
        ({"prompt": "One?", "chosen": "A", "rejected": "B", "weight": 2}, "the row has 'chosen', preference data"),
    ],
)  # fmt: skip
def test_weights_that_are_none_are_refused_with_the_row(row, message):
    with pytest.raises(ValueError, match=r"^row 0 of rows: ") as error:
        list(Reader().read([row]))
    assert str(error.value).removeprefix("row 0 of rows: ").startswith(message)


@pytest.mark.parametrize(
    "keys",
    [
        {"chosen": "A"},
        {"rejected": "B"},
        {"rejected_response": "B"},
        {"rejected_messages": [{}]},
        {"chosen_score": 1},
        {"margin": 1},
        {"score_chosen": 1},
        {"positive_messages": [{}]},
    ],
)
def test_preference_data_is_refused_in_every_shape(keys):
    for row in (ROW, {"instruction": "One?", "output": "A"}, {"prompt": "a", "completion": "b"}):
        with pytest.raises(
            ValueError, match=f"the row has '{next(iter(keys))}', preference data in TRL"
        ):
            list(Reader().read([{**row, **keys}]))


def test_a_turn_of_a_document_has_no_weight():
    row = {"messages": [{"role": "assistant", "content": "A text.", "weight": 2}]}
    with pytest.raises(
        ValueError,
        match=r"the document's turn has a weight \(loss or loss_weight or weight\); move",
    ):
        list(Reader(stage="pretrain").read([row]))


def test_weights_of_samples_made_by_hand_are_checked(small_encoder):
    turns = (Message("user", ("One?",)), Message("assistant", ("Bars.",), weight=float("nan")))
    with pytest.raises(ValueError, match=r"row 3 of here: a weight of the loss is nan, not from"):
        list(small_encoder.encode([Sample(turns, "here", 3)]))


# ---------------------------------------------------------------------------------------- encoded


def test_a_turns_tokens_have_its_weight(small_encoder):
    both = said(small_encoder, row_with(weight=0.5, turn=4))
    assert list(both.values()) == [0.5, 2.0]
    assert [text.startswith(("A poor", "A good")[n]) for n, text in enumerate(both)] == [True] * 2
    plain, sample = encoded(small_encoder, ROW), encoded(small_encoder, row_with(0.5, 4))
    assert plain.labels.tolist() == sample.labels.tolist()
    assert sample.weights.dtype == np.float32
    assert set(sample.weights[sample.labels < 0]) == {0.5, 2.0}  # what ends the turn, without loss
    # zero is no loss, for the turn alone
    row = row_with(turn=0)
    row["messages"][1]["weight"] = 3
    only = said(small_encoder, row)
    assert list(only.values()) == [3.0]
    assert next(iter(only)).startswith("A poor")


def test_all_text_has_a_loss_and_an_answer_its_weight(small_encoder):
    everything = dataclasses.replace(small_encoder, train_on_prompt=True)
    runs = said(everything, row_with(turn=0.5))
    assert [weight for weight in runs.values()][-3:] == [1.0, 0.5, 1.0]
    assert [text for text, weight in runs.items() if weight == 0.5] == [
        "assistant\nA good answer.<|im_end|>"
    ]


def test_calls_have_their_turns_weight(tokenizer, small_encoder, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.read_text())  # writes tool calls
    encoder = Encoder(tokenizer, small_encoder.vision)
    runs = said(encoder, CALLS)
    assert list(runs.values()) == [0.25, 3.0]
    first, last = runs
    assert "I look." in first and "look" in first.split("I look.")[1]
    assert last.startswith("Bars.")


# ---------------------------------------------------------------------------------------- stored


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory, small_set):
    file = tmp_path_factory.mktemp("weights") / "rows.json"
    rows = [ROW, row_with(weight=0.5, turn=4), row_with(turn=0.125), *[ROW] * 5]
    file.write_text(json.dumps(rows))
    return file


def test_a_store_holds_weights(rows_file, small_set, tmp_path, capsys):
    words = f"pack {rows_file} --tokenizer {small_set}/tokenizer --capacity 64 --out {tmp_path}/p"
    assert main([*words.split(), "--quiet"]) == 0
    stored = PackedDataset.from_store(tmp_path / "p")
    encoder = Encoder.from_folder(small_set / "tokenizer")
    fresh = PackedDataset.from_files(rows_file, encoder, 64)
    for kept, made in zip(stored.samples, fresh.samples, strict=True):
        assert (kept.weights is None) == (made.weights is None)
        if made.weights is not None:
            assert kept.weights.tolist() == made.weights.tolist()
    assert [one.weights is None for one in stored.samples] == [True, False, False, *[True] * 5]
    assert stored.fingerprint() == fresh.fingerprint()
    for item, other in zip(stored, fresh):
        for reduction in ("token", "sample"):
            ours, theirs = loss_weights(item, reduction), loss_weights(other, reduction)
            assert (ours is None) == (theirs is None)
            assert ours is None or np.array_equal(ours, theirs)
    capsys.readouterr()
    pack = next(n for n, item in enumerate(stored) for one in item if one.row == 1)
    assert main(["inspect", str(tmp_path / "p"), "--pack", str(pack)]) == 0
    assert " x 0.5 to 2" in capsys.readouterr().out


def test_a_store_with_other_weights_is_another(rows_file, small_set):
    encoder = Encoder.from_folder(small_set / "tokenizer")
    samples = list(encoder.encode(encoder.read(rows_file)))
    first = PackedDataset.from_samples(samples, 64).fingerprint()
    samples[1] = dataclasses.replace(samples[1], weights=2 * samples[1].weights)
    changed = PackedDataset.from_samples(samples, 64).fingerprint()
    assert [n for n in first if first[n] != changed[n]] == ["checksum of the samples"]


def test_check_counts_weights(rows_file, capsys):
    assert main(["check", str(rows_file)]) == 0
    assert "weights of the loss  2 rows, from 0.125 to 4; 1 elsewhere" in capsys.readouterr().out
    assert main(["check", str(rows_file), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert (figures["rows_weighted"], figures["weights"]) == (2, [0.125, 4])
