"""More than 500 rows, each with one key more than a row that is known to be good: the key acts, is refused by its
name, or is named as unread. No key is passed over in silence."""

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmpack import Encoder, VideoSpec
from mmpack.data.file_formats import Row
from mmpack.data.media_paths import MediaFolders
from mmpack.data.readers import RowGroup, RowReader
from mmpack.data.row_keys import LOSS_KEYS, PART_KEYS, ROW_KEYS, ROW_WEIGHT_KEYS, TURN_KEYS
from mmpack.errors import RowError

TEMPLATE = Path(__file__).parent / "templates" / "qwen3_vl.jinja"  # writes tools and their calls
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
# Key -> values that ask for something. Keys of the tables that are not here have the value "given".
MEANT = {
    "loss": [False, 0, 0.5, "no"],
    "weight": [0, 0.0, 0.25, 2],
    "loss_weight": [0, 0.5],
    "sample_weight": [0, 0.5, "much"],
    "loss_scale": [0, 2.5, "last_round"],
    "train": [False],
    "training": [False],
    "train_detail": [[{"begin_offset": 0, "end_offset": 3, "train": False}]],
    "mask": [True, False, [0, 1]],
    "loss_mask": [[0, 1]],
    "prefix": [True],
    "channel": ["analysis", "chat"],
    "objects": [{"ref": ["a"], "bbox": [[1, 2, 3, 4]]}],
    "bbox": [[1, 2, 3, 4], [[1, 2]]],
    "ref": ["a sheep", ["a"]],
    "rejected": ["No.", [{"role": "assistant", "content": "No."}]],
    "rejected_response": ["No."],
    "rejected_messages": [[{"role": "assistant", "content": "No."}]],
    "rejected_images": [["0.png"]],
    "chosen_response": ["Yes."],
    "chosen": ["Yes."],
    "label": [True, False, 0, 1, "cat"],
    "kto_tag": [True, False],
    "margin": [0.5],
    "reasoning_content": ["Hm."],
    "reasoning": ["Hm."],
    "thinking": ["Hm."],
    "thought": ["Hm."],
    "audio": ["a.wav"],
    "audios": [["a.wav"]],
    "input_audio": [{"data": "AAAA", "format": "wav"}],
    "max_pixels": [28 * 28 * 4],
    "min_pixels": [28 * 28 * 900],
    "total_pixels": [28 * 28 * 16],
    "resized_height": [56],
    "resized_width": [56],
    "fps": [1.0],
    "sample_fps": [1.0],
    "raw_fps": [30.0],
    "nframes": [2],
    "min_frames": [8],
    "max_frames": [2],
    "video_start": [1.0],
    "video_end": [1.0],
    "detail": ["low", "high"],
    "enable_thinking": [True],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "system": ["Be brief."],
    "tools": [[TOOL], json.dumps([TOOL])],
    "images": [["1.png"]],
    "image": ["1.png"],
    "videos": [[["1.png", "1.png"]]],
    "video": ["clip.mp4"],
    "imgs": [["1.png"], "1.png"],
    "image_path": ["1.png"],
    "picture": [{"bytes": b"x", "path": None}],
    "function_call": [{"name": "add", "arguments": "{}"}],
    "tool_calls": [[{"function": {"name": "add", "arguments": {"a": 1}}}]],
}
# Keys of media that act alone on a picture and a list of frames.
OF_MEDIA = ("max_pixels", "min_pixels", "total_pixels", "fps", "sample_fps")
UNKNOWN = (
    "id",
    "name",
    "metadata",
    "timestamp",
    "cache_control",
    "score",
    "language",
    "tool_call_id",
)
QUESTION, ANSWER = "<image>What?", "This."


def messages(role, content, user, assistant):
    turns = [("system", "S"), (user, QUESTION), (assistant, "First."), (user, "?")]
    return [{role: who, content: text} for who, text in [*turns, (assistant, ANSWER)]]


IMAGES = {"images": ["0.png"]}
OPENAI = messages("role", "content", "user", "assistant")
FRAMES = {"type": "video", "video": ["0.png", "1.png", "0.png", "1.png"]}
PARTS = [{"type": "image", "image": "0.png"}, FRAMES, {"type": "text", "text": "What?"}]
IN_PARTS = [{"role": "user", "content": PARTS}, OPENAI[2]]
ROWS = {  # shape -> (row, where its turns are, where its parts are)
    "messages": ({"messages": OPENAI} | IMAGES, ("messages",), None),
    "parts": ({"messages": IN_PARTS}, ("messages",), ("messages", 0, "content")),
    "sharegpt": (
        {"conversations": messages("from", "value", "human", "gpt")} | IMAGES,
        ("conversations",),
        None,
    ),
    "alpaca": ({"instruction": QUESTION, "input": "?", "output": ANSWER} | IMAGES, None, None),
    "query": ({"query": QUESTION, "response": ANSWER} | IMAGES, None, None),
    "completion": ({"prompt": OPENAI[:4], "completion": OPENAI[4:]} | IMAGES, ("prompt",), None),
    "texts": ({"texts": [{"user": "What?", "assistant": ANSWER}]} | IMAGES, ("texts",), None),
    "document": ({"text": QUESTION} | IMAGES, None, None),
    "told": (
        {"messages": [{"role": "assistant", "content": QUESTION}]} | IMAGES,
        ("messages",),
        None,
    ),
}
DOCUMENTS = ("document", "told")


def at(row, path):
    for key in path:
        row = row[key]
    return row


def holders(shape):
    """(level, path) of the row, its turns and its parts."""
    row, turns, parts = ROWS[shape]
    yield "row", ()
    for level, path in (("turn", turns), ("part", parts)):
        for number in range(0 if path is None else len(at(row, path))):
            yield level, (*path, number)


def generated():
    """(shape, path, key, value) of each row: every key at every level of every shape."""
    tables = {"row": ROW_KEYS, "turn": TURN_KEYS, "part": PART_KEYS}
    for shape in ROWS:
        for level, path in holders(shape):
            there = at(ROWS[shape][0], path)
            for key in dict.fromkeys((*MEANT, *tables[level], *UNKNOWN)):
                if key not in there:
                    for value in MEANT.get(key, ["given"]):
                        yield shape, path, key, value


class Outcome:
    """What becomes of rows: the ids, labels and grids, or why a row is refused; and what is named."""

    def __init__(self, encoders, folder):
        self.encoders = encoders
        self.folders = MediaFolders([folder])

    def of(self, shape, row):
        encoder = self.encoders[shape in DOCUMENTS]
        reader = RowReader(encoder, RowGroup((), None, self.folders))
        try:
            samples = reader.samples(Row("rows", 0, row))
            (sample,) = encoder.encode(samples)
        except RowError as error:
            return str(error), set(reader.unread)
        except ValueError as error:  # while encoding
            return str(error), set(reader.unread)
        arrays = (sample.input_ids, sample.labels, sample.grid_thw)
        arrays += (sample.temporal_step, sample.weights)
        found = tuple(None if array is None else array.tolist() for array in arrays)
        return found, set(reader.unread)


@pytest.fixture
def outcome(small_set, tmp_path):
    for number in range(2):
        Image.new("RGB", (280, 280), (number, 0, 0)).save(tmp_path / f"{number}.png")
    budget = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 100}
    video = VideoSpec(**budget, tokens_per_second=4)  # positions by time, so that `fps` acts
    encoders = []
    for stage in ("sft", "pretrain"):
        encoder = Encoder.from_folder(small_set / "tokenizer", stage=stage)
        encoder.tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
        vision = dataclasses.replace(encoder.vision, video=video)
        encoders.append(dataclasses.replace(encoder, vision=vision))
    return Outcome(encoders, tmp_path)


def test_no_key_is_passed_over_in_silence(outcome):
    usual = {shape: outcome.of(shape, copy.deepcopy(row)) for shape, (row, _, _) in ROWS.items()}
    assert [found for found, _ in usual.values() if isinstance(found, str)] == []
    assert {bool(unread) for _, unread in usual.values()} == {False}
    fates, silent, honoured = Counter(), [], set()
    for shape, path, key, value in generated():
        row = copy.deepcopy(ROWS[shape][0])
        at(row, path)[key] = value
        found, unread = outcome.of(shape, row)
        if isinstance(found, str):
            named = any(word in found for word in (key, key.rstrip("s"), key.replace("_", " ")))
            fate = "refused" if named or "no token of the row is supervised" in found else "silent"
        elif found != usual[shape][0]:
            fate = "honoured"
            honoured.add(key)
        else:
            fate = "named" if any(name.split(" of ")[0] == key for name in unread) else "silent"
        if fate == "silent" and asks_for_nothing(shape, path, key, value):
            fate = "no request"
        fates[fate] += 1
        if fate == "silent":
            silent.append((shape, path, key, value, found if isinstance(found, str) else "used"))
    assert not silent, "\n".join(map(repr, silent))
    assert fates["honoured"] >= 40
    assert honoured == {
        *LOSS_KEYS,
        *ROW_WEIGHT_KEYS,
        *OF_MEDIA,
        "system",
        "tools",
        "tool_calls",
        "videos",
    }
    assert fates["refused"] >= 500
    assert fates["named"] >= 100
    assert fates["no request"] < 60


def asks_for_nothing(shape, path, key, value):
    """Whether a turn that has no loss is marked as such."""
    if key not in ("loss", "weight", "loss_weight") or value != 0 or not path:
        return False
    turn = at(ROWS[shape][0], path)
    return turn.get("role") != "assistant" and turn.get("from") != "gpt" or shape == "completion"
