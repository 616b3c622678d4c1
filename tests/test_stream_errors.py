"""Bad rows of a stream: left out, counted once, listed, however often it is stopped; too many of them end it."""

import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from builders import SMALL_SPEC, encoded
from PIL import Image
from test_stream import delivered, sharegpt
from test_stream import encoder as encoder  # a fixture
from torch.utils.data import DataLoader

import mmpack.errors
from mmpack import PackStream, Skip
from mmpack.hf import PackCollator
from mmpack.packing.left_out import BadRowFile
from mmpack.types import ImageRef

KINDS = (
    {"conversations": "no turns"},  # cannot be read
    {**sharegpt(0, True), "images": ["gone.png"]},  # its image is missing
    {**sharegpt(0, True), "images": [Image.new("RGB", (900, 3))]},  # cannot be encoded
)


def rows_of(count, every):
    """Rows that say their number; every `every`-th is bad."""
    for number in range(count):
        if number % every == every // 2:
            yield KINDS[number // every % 3]
        else:
            row = sharegpt(number, False)
            row["conversations"][0]["value"] += f"#{number}#"
            yield row


def numbers_in(pack, encoder):
    text = "".join(encoder.tokenizer.decode(sample.input_ids) for sample in pack)
    return [int("".join(number.split())) for number in re.findall("#([0-9 ]+)#", text)]


@pytest.fixture(scope="module")
def numbering():
    """An encoder whose tokenizer knows digits."""
    from mmpack import Encoder, VisionSpec
    from mmpack.cli.demo import _tokenizer

    tokenizer = _tokenizer(["0 1 2 3 4 5 6 7 8 9 # q w a"])
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    spec = VisionSpec(min_pixels=784, max_pixels=784 * 16, **dict(zip(keys, ids)))
    return Encoder(tokenizer, spec)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("count", [1_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_one_row_in_a_hundred_is_bad(count, numbering, tmp_path, caplog):
    """With workers, as under Trainer: all good rows once, and counts that are exact."""
    bad_rows = []
    stream = PackStream(
        lambda: rows_of(count, 100), numbering, 400, buffer=50, on_error=Skip(into=bad_rows)
    )
    stream.bad_rows_file = tmp_path / "run" / "bad.jsonl"
    seen = Counter()
    for pack in DataLoader(stream, None, num_workers=2, collate_fn=list_of):
        samples, resume = pack
        seen.update(numbers_in(samples, numbering))
        stream.consume(resume)
    expected = set(range(50, count, 100))
    assert seen == Counter(set(range(count)) - expected)
    assert stream.num_bad_rows == len(expected) == stream.on_error.num_bad
    lines = lines_of(stream.bad_rows_file)
    assert {line["row"] for line in lines} == expected
    assert len(lines) == len(bad_rows) == len(expected)
    assert {(bad.row, bad.error) for bad in bad_rows} == {(x["row"], x["error"]) for x in lines}
    assert stream.on_error.reasons.total() == len(expected)
    assert {line["pass"] for line in lines} == {0}
    assert "no turns" in json.dumps(lines[0]["content"])


def list_of(pack):
    return list(pack), pack.resume


def test_in_this_process_rows_are_listed_as_their_pack_is_made(numbering, tmp_path, caplog):
    bad_rows = []
    stream = PackStream(rows_of(60, 10), numbering, 200, buffer=1, on_error=bad_rows)
    packs = list(stream)
    assert sorted(sum((numbers_in(pack, numbering) for pack in packs), [])) == [
        number for number in range(60) if number % 10 != 5
    ]
    assert [bad.row for bad in bad_rows] == [5, 15, 25, 35, 45, 55]
    assert bad_rows[0].content is KINDS[0]
    # each of the first three, then those that double their number
    told = [message for message in caplog.messages if message.startswith("left out row")]
    assert len(told) == 4
    assert told[3].startswith("left out row 35 of the stream: ")
    assert told[3].endswith("; 4 rows left out so far")
    with pytest.raises(ValueError, match="row 5 of the stream: .*list of turns"):
        list(
            PackStream(rows_of(60, 10), replace(numbering, on_error="skip"), 200, on_error="raise")
        )
    with pytest.raises(ValueError, match="on_error must be 'raise', 'skip', a Skip or a list"):
        PackStream([], numbering, 200, on_error="drop")


def test_bad_rows_after_the_last_good_one_are_counted(numbering):
    rows = [sharegpt(0, False), *KINDS]
    for buffer in (1, 2):
        bad_rows = []
        stream = PackStream(rows, numbering, 200, buffer=buffer, on_error=bad_rows)
        for pack in stream:
            stream.consume(pack.resume)
        assert [bad.row for bad in bad_rows] == [1, 2, 3]
        assert stream.num_bad_rows == 3


@pytest.mark.parametrize(
    "case", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 40))]
)
def test_a_stopped_stream_counts_and_lists_each_bad_row_once(case, numbering, tmp_path):
    """Stopped at a random pack, with others made ahead; over two passes, in this process and in workers."""
    rng = random.Random(case)
    rows = list(rows_of(rng.randint(20, 60), rng.choice([3, 5, 7])))
    workers, buffer, total = rng.choice([0, 1, 2]), rng.choice([1, 3, 9]), 24

    def make(file):
        stream = PackStream(rows, numbering, 120, buffer=buffer, on_error=Skip(1))
        stream.bad_rows_file = tmp_path / file
        stream.endless = True
        return stream

    def train(stream, count, ahead=0):
        packs = delivered(stream, workers)
        for number, pack in enumerate(itertools.islice(packs, count + ahead)):
            if number < count:
                stream.consume(pack.resume)
        return stream

    whole = train(make("whole"), total)
    first = train(make("stopped"), rng.randint(1, total - 1), ahead=rng.randint(0, 5))
    done = sum(place["packs"] for place in first._consumed.values())
    with open(tmp_path / "stopped", "a") as file:
        file.write('{"source": "the str')  # the process was killed as it wrote
    second = make("stopped")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.num_bad_rows == first.num_bad_rows
    number = next(
        n for n in range(total + 1) if train(make("other"), n).state_dict() == first.state_dict()
    )
    train(second, total - number, ahead=0)
    assert second.state_dict() == whole.state_dict()
    assert second.num_bad_rows == whole.num_bad_rows
    assert done
    BadRowFile(tmp_path / "stopped").write([])  # which removes the line that was cut off
    keys = [(line["pass"], line["row"]) for line in lines_of(tmp_path / "stopped")]
    assert len(set(keys)) == len(keys)
    assert set(keys) >= {(line["pass"], line["row"]) for line in lines_of(tmp_path / "whole")}


def test_a_worker_whose_rows_are_all_bad_says_so(numbering, caplog):
    """It has no pack that could carry them. In this process they are listed."""
    rows = [sharegpt(0, False), KINDS[0]] * 3
    bad_rows = []
    stream = PackStream(rows, numbering, 200, on_error=bad_rows)
    assert len(list(delivered(stream, 2))) == 1
    assert bad_rows == []
    assert "worker 1 left out all of its rows, 3, and has no pack to list them with" in caplog.text
    assert list(PackStream(KINDS, numbering, 200, on_error=bad_rows)) == []
    assert [bad.row for bad in bad_rows] == [0, 1, 2]


def test_too_many_bad_rows_end_the_stream_with_their_reasons(numbering, monkeypatch):
    """Also in a resumed one, whose bad rows came before."""
    monkeypatch.setattr(mmpack.errors, "_JUDGED_FROM", 100)
    rows = [*rows_of(60, 10), *itertools.repeat(sharegpt(0, False), 50)]
    stream = PackStream(rows, numbering, 100, buffer=5, on_error="skip")
    reason = r"6 of 100 rows were left out, at most 5.0% may be: 2 x .*row 5 of the stream"
    with pytest.raises(ValueError, match=reason):
        for pack in stream:
            stream.consume(pack.resume)
    assert stream.num_bad_rows == 6
    again = PackStream(rows, numbering, 100, buffer=5, on_error="skip")
    again.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match=reason):
        list(again)
    assert len(list(PackStream(rows, numbering, 100, on_error=Skip(0.06)))) > 0


def test_images_that_broke_are_listed_and_counted_after_a_stop(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")

    def make():
        samples = []
        for number in range(20):
            image = ImageRef(
                str(tmp_path / ("b.png" if number % 4 == 1 else "a.png")), size=(28, 28)
            )
            one = encoded(SMALL_SPEC, 1, 2, (2, 2), [3] * 9)
            samples.append(replace(one, media=(image,), source="rows.json", row=number))
        stream = PackStream(samples, None, 32, buffer=4)
        stream.on_bad_image = "drop"
        stream.bad_rows_file = tmp_path / "bad.jsonl"
        return stream

    def train(stream, count):
        loader = DataLoader(stream, 1, num_workers=1, collate_fn=PackCollator())
        for batch in itertools.islice(loader, count):
            stream.consume(batch["mmpack"]["resume"])
        return stream

    first = train(make(), 4)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.num_dropped_segments == first._images[2] > 0
    train(second, 100)
    assert second.num_dropped_segments == 5
    assert second._images == [20, 20, 5]
    lines = lines_of(tmp_path / "bad.jsonl")
    assert sorted(line["row"] for line in lines) == [1, 5, 9, 13, 17]
    assert all("b.png" in line["error"] for line in lines)


def test_a_document_that_cannot_be_split_is_a_bad_row():
    long = encoded(SMALL_SPEC, 1, 2, 3, [4] * 60)
    long.labels[:20] = -100
    fine = encoded(SMALL_SPEC, 1, 2, 3)
    with pytest.raises(ValueError, match="row 1 of the stream: a conversation cannot be split"):
        list(PackStream([fine, long], None, 40, on_overflow="split"))
    bad_rows = []
    (pack,) = PackStream([fine, long], None, 40, on_overflow="split", on_error=bad_rows)
    assert len(pack) == 1
    assert [str(bad).partition(";")[0] for bad in bad_rows] == [
        "row 1 of the stream: a conversation cannot be split"
    ]
