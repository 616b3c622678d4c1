import json
import re
import shutil

import numpy as np
import pytest
from builders import encoded, small_spec
from PIL import Image
from transformers import AutoTokenizer

from mmpack import VideoSpec, VisionSpec
from mmpack.cli import inspect
from mmpack.cli.main import main
from mmpack.packing.dataset import PackedDataset
from mmpack.types import EncodedSample, ImageRef, VideoRef

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def rows(small_set):
    return json.loads((small_set / "train.json").read_text())


def looked_at(small_set, capsys, *options):
    assert main(["inspect", str(small_set / "packed"), *map(str, options)]) == 0
    return capsys.readouterr()


def test_what_is_supervised_are_the_answers(small_set, rows, capsys):
    """Every row of every pack: its supervised text is its answers, the rest of it is not, and its images
    stand where its markers do."""
    seen = []
    for pack in range(PackedDataset.from_store(small_set / "packed").plan.num_packs):
        found = json.loads(looked_at(small_set, capsys, "--pack", pack, "--json").out)
        assert sum(s["end"] - s["begin"] for s in found["segments"]) == found["tokens"]
        for segment in found["segments"]:
            row = rows[segment["row"]]
            answers = [t["value"] for t in row["conversations"] if t["from"] == "gpt"]
            spans = segment["spans"]
            supervised = [span["text"] for span in spans if span["supervised"]]
            assert supervised == [answer + "<|im_end|>" for answer in answers]
            edges = [spans[0]["begin"], *(span["end"] for span in spans)]
            assert edges == [*(span["begin"] for span in spans), segment["end"]]
            text = "".join(span.get("text", "<image>") for span in spans)
            for turn in row["conversations"]:
                start = "<|im_start|>" + {"human": "user", "gpt": "assistant"}[turn["from"]]
                value = turn["value"].replace("<image>", "<|vision_start|><image><|vision_end|>")
                assert f"{start}\n{value}<|im_end|>\n" in text
            paths = [str(small_set / image) for image in row["images"]]
            assert [medium["path"] for medium in segment["media"]] == paths
            names = [span["medium"] for span in spans if "medium" in span]
            assert names == [f"image {n}" for n in range(1, len(paths) + 1)]
            sizes = [span["end"] - span["begin"] for span in spans if "medium" in span]
            assert sizes == [medium["tokens"] for medium in segment["media"]]
            assert sizes == [np.prod(medium["grid_thw"]) // 4 for medium in segment["media"]]
            seen.append(segment["row"])
    assert sorted(seen) == list(range(24))


def test_a_special_token_is_told_from_the_same_text(small_set, tmp_path, capsys):
    shutil.copytree(small_set / "tokenizer", tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|box_start|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    asked = {"from": "human", "value": "Grö\u00dfe <|im_end|>?"}
    said = {"from": "gpt", "value": "<|box_start|>(1,2) or <|im_end|>"}
    data, packed = str(tmp_path / "rows.json"), str(tmp_path / "packed")
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": [asked, said]}]))
    options = [data, "--tokenizer", str(tmp_path / "tokenizer")]

    assert main(["check", *options]) == 0
    table = capsys.readouterr().out
    assert "special tokens in rows that stay text  <|im_end|>: 2\n" in table
    assert "special tokens in rows that become their ids  <|box_start|>: 1\n" in table
    assert main(["check", *options, "--typed-tokens", "text", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert (summary["typed_text"], summary["typed_ids"]) == (
        {"<|im_end|>": 2, "<|box_start|>": 1},
        {},
    )

    assert main(["pack", *options, "--capacity", "512", "--out", packed, "--quiet"]) == 0
    assert main(["inspect", packed]) == 0
    text = capsys.readouterr().out
    question, answer = re.findall(r"(?:user|assistant)\n(.*)\n", text)[-2:]
    dotted = re.compile(r"<\u00b7?\|.*\u00b7.*\|\u00b7?>")  # as the tokenizer splits it
    assert question.endswith("<|im_end|>")
    assert question.startswith("Grö\u00dfe ")
    assert dotted.fullmatch(question.removeprefix("Grö\u00dfe ").removesuffix("?<|im_end|>"))
    assert answer.startswith("[[<|box_start|>(1,2) or ")
    spelled = answer.removeprefix("[[<|box_start|>(1,2) or ").removesuffix("<|im_end|>]]")
    assert spelled.replace("\u00b7", "") == "<|im_end|>"
    assert dotted.fullmatch(spelled)
    assert main(["inspect", packed, "--json"]) == 0
    (segment,) = json.loads(capsys.readouterr().out)["segments"]
    ((span,),) = [[s for s in segment["spans"] if s["supervised"]]]
    assert span["text"] == said["value"] + "<|im_end|>"
    assert span["special"] == [[span["begin"], "<|box_start|>"], [span["end"] - 1, "<|im_end|>"]]


def test_the_terminal_shows_the_same(small_set, capsys):
    dataset = PackedDataset.from_store(small_set / "packed")
    view = inspect.view_pack(dataset, 0)
    decode, note = inspect.find_tokenizer(dataset, None)
    assert note == ""
    text = looked_at(small_set, capsys).out
    head, *_ = text.splitlines()
    assert head.startswith(
        f"pack 0 of {dataset.plan.num_packs}: {len(view.pack.input_ids):,} of 2,048"
    )
    for segment, sample in enumerate(view.samples):
        plain = inspect.text(view, segment, decode, color=False)
        assert plain in text
        assert plain.startswith(f"--- segment {segment}: row {sample.row} of train.json, tokens ")
        (found,) = inspect.as_dict(view, decode, [segment])["segments"]
        supervised = [span["text"] for span in found["spans"] if span["supervised"]]
        assert re.findall(r"\[\[(.*?)\]\]", plain, re.DOTALL) == supervised
        colored = inspect.text(view, segment, decode, color=True)
        assert "\x1b[30;42m" in colored
        bare = plain.replace("[[", "").replace("]]", "")
        assert ANSI.sub("", colored).replace("\u21b5\n", "\n") == bare
        for n, (_, height, width) in enumerate(sample.grid_thw.tolist(), start=1):
            assert f"<image {n}: {height}x{width} patches, {height * width // 4} tokens>" in plain
            assert (
                f"image {n}: {height}x{width} patches of 14 ({width * 14} x {height * 14}" in text
            )
    chosen = looked_at(small_set, capsys, "--segment", 1).out
    assert "--- segment 1: " in chosen
    assert "--- segment 0: " not in chosen


def test_a_row_is_found(small_set, capsys):
    dataset = PackedDataset.from_store(small_set / "packed")
    for row in range(24):
        ((pack, segment),) = inspect.find_row(dataset, f"train.json:{row}")
        assert dataset[pack][segment].row == row
        assert inspect.find_row(dataset, str(row)) == [(pack, segment)]
    text = looked_at(small_set, capsys, "--row", 5).out
    assert re.findall("--- segment .*: row (\\d+) of", text) == ["5"]


def test_rows_of_several_files(small_set, tmp_path, capsys):
    rows = json.loads((small_set / "train.json").read_text())
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([row for row in rows if not row["images"]][:2]))
    arguments = ["pack", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--capacity", "64"]
    arguments += ["--tokenizer", str(small_set / "tokenizer"), "--out", str(tmp_path / "packed")]
    assert main([*arguments, "--on-overflow", "truncate", "--quiet"]) == 0
    assert main(["inspect", str(tmp_path / "packed"), "--row", "1"]) == 1
    assert "row 1 is in a.json and b.json; pass --row a.json:1" in capsys.readouterr().err
    assert ": row 1 of b.json" in looked_at(tmp_path, capsys, "--row", "b.json:1").out


def test_without_the_tokenizer_there_are_ids(small_set, tmp_path, capsys):
    shutil.copytree(small_set / "tokenizer", tmp_path / "gone")
    pack = ["pack", str(small_set / "train.json"), "--tokenizer", str(tmp_path / "gone")]
    assert main([*pack, "--capacity", "2048", "--out", str(tmp_path / "packed"), "--quiet"]) == 0
    shutil.rmtree(tmp_path / "gone")
    shown = looked_at(tmp_path, capsys)
    assert f"is not at {tmp_path / 'gone'}; showing token ids, --tokenizer FOLDER" in shown.err
    view = inspect.view_pack(PackedDataset.from_store(tmp_path / "packed"), 0)
    first = view.spans[0]
    ids = view.pack.input_ids[first.begin : first.end].tolist()
    assert " ".join(map(str, ids)) in shown.out
    given = looked_at(tmp_path, capsys, "--tokenizer", small_set / "tokenizer")
    assert "<|im_start|>user" in given.out
    assert given.err == ""


def test_another_tokenizer_is_told(small_set, shared, capsys):
    other = shared / "tokenizer" / "qwen2_vl"
    shown = looked_at(small_set, capsys, "--tokenizer", other)
    assert f"{other} is not the tokenizer this was packed with" in shown.err


def test_a_row_does_nothing_to_the_terminal():
    assert (
        inspect.printable("a\x1b[2Jb\r\u202ec\ud800\n\t\u00e9")
        == "a\\x1b[2Jb\\r\\u202ec\\ud800\n\t\u00e9"
    )


def dataset_of(*samples):
    return PackedDataset.from_samples(samples, 64)


def test_frames_are_the_pixels_the_model_is_given(tmp_path):
    spec = VisionSpec(
        min_pixels=1, max_pixels=10**6, video=VideoSpec(min_pixels=1, max_pixels=10**6)
    )
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 56, 84, 3), dtype=np.uint8)
    refs = []
    for n, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{n}.png")
        refs.append(ImageRef(str(tmp_path / f"{n}.png")))
    ids = [1, spec.image_token_id, 2, spec.video_token_id, 3]
    clip = VideoRef(refs[1].path, frames=tuple(refs[1:]), num_frames=4)
    sample = EncodedSample(
        np.array(ids, dtype=np.int32), np.array([-100, -100, -100, -100, 3], dtype=np.int32),
        np.array([[1, 4, 6], [2, 4, 6]], dtype=np.int32), (refs[0], clip), spec,
    )  # fmt: skip
    view = inspect.view_pack(dataset_of(sample), 0)
    still, video = view.media
    assert (still.name, video.name, video.grid_thw) == ("image 1", "video 1", (2, 4, 6))
    assert np.array_equal(inspect.frames(still, spec), pictures[:1])
    assert np.array_equal(inspect.frames(video, spec), pictures[1::2])
    assert "<video 1: 2x4x6 patches, 12 tokens>" in inspect.text(view, 0, None, color=False)


def test_a_video_with_timestamps_is_in_parts():
    spec = small_spec("qwen3_vl")
    sample = encoded(spec, 1, 2, 3)
    ids = np.array([1, 91, 2, 91, 3], dtype=np.int32)
    frames = tuple(ImageRef(f"{n}.png") for n in range(4))
    clip = VideoRef("0.png", frames=frames, num_frames=4)
    grids = np.array([[1, 2, 2], [1, 2, 2]], dtype=np.int32)
    video = EncodedSample(ids, np.where(ids == 3, 3, -100).astype(np.int32), grids, (clip,), spec)
    view = inspect.view_pack(dataset_of(video, sample), 0)
    (medium,) = view.media
    assert (medium.name, medium.grid_thw, view.num_tokens(medium)) == ("video 1", (2, 2, 2), 2)
    text = inspect.text(view, medium.segment, None, color=False)
    assert "<video 1, part 1 of 2: 2x2 patches, 1 tokens>2 <video 1, part 2 of 2: 2x2 " in text


def test_cut_rows_and_pieces_of_documents_are_shown_as_trained(small_set, tmp_path, capsys):
    words = "one two three four five six seven eight nine ten"
    (tmp_path / "docs.json").write_text(json.dumps([{"text": " ".join([words] * 5)}]))
    arguments = ["pack", str(tmp_path / "docs.json"), "--stage", "pretrain", "--capacity", "64"]
    arguments += ["--tokenizer", str(small_set / "tokenizer"), "--out", str(tmp_path / "packed")]
    assert main([*arguments, "--quiet"]) == 0
    dataset = PackedDataset.from_store(tmp_path / "packed")
    num_packs = dataset.plan.num_packs
    assert num_packs > 1
    assert sorted(inspect.find_row(dataset, "0")) == [(pack, 0) for pack in range(num_packs)]
    assert "continued in pack" in looked_at(tmp_path, capsys, "--row", 0).err
    text = ""
    for pack in range(num_packs):
        found = json.loads(looked_at(tmp_path, capsys, "--pack", pack, "--json").out)
        pieces = sorted(found["segments"], key=lambda segment: segment["begin"])
        text += "".join(span["text"] for p in pieces for span in p["spans"] if span["supervised"])
    whole = len(words.replace(" ", "")) * 5 + len("<|endoftext|>")
    assert whole - len("one") <= len(text.replace(" ", "")) < whole  # all but the first token


def pixels_like(path, color):
    """Pixels of a picture that are nearly of a colour."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return int((np.abs(pixels - color).max(axis=-1) < 8).sum())


def test_the_picture_has_the_images_in_their_places(small_set, tmp_path, tmp_path_factory, capsys):
    pytest.importorskip("matplotlib")
    Image.new("RGB", (140, 112), (255, 0, 255)).save(tmp_path / "pink.png")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Pink."}]
    row = {"conversations": turns, "images": ["pink.png"]}
    (tmp_path / "rows.json").write_text(
        json.dumps([row, {"conversations": [{**turns[0], "value": "?"}, turns[1]]}])
    )
    arguments = ["pack", str(tmp_path / "rows.json"), "--capacity", "256", "--quiet"]
    arguments += ["--tokenizer", str(small_set / "tokenizer"), "--out", str(tmp_path / "packed")]
    assert main(arguments) == 0
    png = tmp_path / "pack.png"
    looked_at(tmp_path, capsys, "--png", png)
    assert pixels_like(png, (255, 0, 255)) > 1000
    assert pixels_like(png, (0x22, 0x22, 0x22)) > 500  # supervised
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "pink.png"
    (tmp_path / "pink.png").rename(elsewhere)
    (tmp_path / "pink.png").symlink_to(elsewhere)  # a link that now leads out of the media folder
    looked_at(tmp_path, capsys, "--png", png)
    assert pixels_like(png, (255, 0, 255)) == 0
    (tmp_path / "pink.png").unlink()
    looked_at(tmp_path, capsys, "--png", png)  # which says so in its place
    assert pixels_like(png, (255, 0, 255)) == 0
