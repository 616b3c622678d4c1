"""Pretraining documents: read, encoded without a template, split at text tokens, packed, trained on."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from builders import (
    QUIET,
    collator,
    encoded,
    loss_and_grads,
    small_config,
    small_spec,
    tiny_config,
    tiny_model,
    with_noise,
    worst_difference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Trainer, TrainingArguments

from mmpack import Encoder, PackedDataset, Reader, VisionSpec
from mmpack.cli.check import check_rows
from mmpack.cli.main import main
from mmpack.hf import PackCollator, PackingCallback, patch_model
from mmpack.packing.cost import costs_of
from mmpack.packing.split_documents import image_capacity, piece_of, split_bounds, split_samples
from mmpack.store.encoded_store import write_store

SPEC = VisionSpec(min_pixels=1, max_pixels=1)
END = 151643  # <|endoftext|>


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (56, 56)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture(scope="session")
def documents(shared, tokenizer, vision):
    """Every real document, encoded."""
    encoder = Encoder(tokenizer, vision, stage="pretrain")
    return list(encoder.encode(encoder.read(shared / "realset" / "realset_pretrain.jsonl")))


def content_of(row, folder, **options):
    (sample,) = Reader(stage="pretrain", media_dir=folder, **options).read([row])
    (message,) = sample.messages
    assert message.role == "document"
    return [p if isinstance(p, str) else p.path[-5:] for p in message.content]


def test_the_shapes_a_document_comes_in(folder):
    expected = ["One ", "a.png", " two", "b.png"]
    images = ["a.png", "b.png"]
    text = "One <image> two<image>"
    assert content_of({"text": text, "images": images}, folder) == expected
    mapping = {"columns": {"prompt": "body", "images": "pictures"}}
    row = {"body": text, "pictures": images, "text": "another field"}
    assert content_of(row, folder, mapping=mapping) == expected
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
    assert content_of({"messages": turns, "images": images}, folder) == expected
    assert content_of({"messages": turns[1:], "images": images}, folder) == expected
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": text}]
    assert content_of({"conversations": turns, "images": images}, folder) == expected
    parts = [
        {"type": "text", "text": "One "},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": " two"},
        {"type": "image", "image": "b.png"},
    ]
    assert content_of({"text": parts}, folder) == expected
    assert content_of({"text": "<image>", "images": ["a.png"]}, folder) == ["a.png"]
    assert content_of({"text": "a <video> tag"}, folder) == ["a <video> tag"]  # videos are not read
    row = {"text": "below", "images": ["a.png"]}
    assert content_of(row, folder, missing_marker="prepend") == ["a.png", "below"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": " \n"}, "row 0 of rows: the document is empty; drop the row"),
        ({"body": "a"}, "no field 'text'; the row has .*map it as the prompt"),
        ({"text": "<image>"}, "1 <image> marker but 0 images"),
        ({"text": 3}, "the text of the document must be a string, got 3"),
        ({"text": "a", "videos": ["v.mp4"]}, "the row has 'videos'"),
        ({"text": [{"type": "video", "video": "v.mp4"}]}, "the document has a video; remove it"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]},
            r"2 turns have content \(roles: user assistant\), only the assistant's may.*--stage sft",
        ),
        ({"messages": [{"role": "assistant", "content": ""}]}, "the document is empty"),
    ],
)
def test_rows_that_are_no_documents(row, error):
    with pytest.raises(ValueError, match=error):
        list(Reader(stage="pretrain").read([row]))


def test_instructions_are_no_documents():
    mapping = {"columns": {"prompt": "text", "response": "answer"}}
    with pytest.raises(ValueError, match=r"the row has \['answer'\] beside the document in 'text'"):
        list(Reader(stage="pretrain", mapping=mapping).read([{"text": "a", "answer": "b"}]))


def test_ids_and_labels_of_a_document(folder, tokenizer, vision):
    typed = "One <image> two <|im_end|><image>\n"
    row = {"text": typed, "images": ["a.png", "b.png"]}
    encoder = Encoder(tokenizer, vision, stage="pretrain", media_dir=folder)
    (sample,) = encoder.encode(encoder.read([row]))
    run = "<|vision_start|><|image_pad|><|vision_end|>"
    text, middle, last = typed.split("<image>")
    plain = tokenizer(middle, split_special_tokens=True).input_ids  # a typed control token is text
    expected = tokenizer(text + run).input_ids + plain + tokenizer(run + last).input_ids + [END]
    assert sample.input_ids.tolist() == expected
    in_run = np.isin(expected, tokenizer(run).input_ids)
    assert sample.labels.tolist() == np.where(in_run, -100, expected).tolist()


def test_every_real_document_is_as_long_as_transformers_says(shared, documents):
    lengths = json.loads((shared / "realset" / "lengths.json").read_text())["pretrain"]
    for sample, row in zip(documents, lengths, strict=True):
        assert sample.num_tokens == row["text_tokens"] + row["image_tokens"]
        assert sample.grid_thw.tolist() == row["grid_thw"]
        assert sample.input_ids[-1] == sample.labels[-1] == END


def test_check_reads_documents(shared):
    reader = Reader(stage="pretrain")
    groups = reader.groups(shared / "realset" / "realset_pretrain.jsonl")
    checked = list(check_rows(groups, reader))
    assert len(checked) == 244
    assert not any(row.bad for row in checked)


def is_text(sample):
    spec = sample.vision
    ids = (spec.image_token_id, spec.vision_start_token_id, spec.vision_end_token_id)
    return ~np.isin(sample.input_ids, ids)


def assert_split(sample, capacity, patch_capacity=None):
    """Pieces fit, tile the document, and supervise every text token but the very first once."""
    bounds = split_bounds(sample, capacity, patch_capacity)
    pieces = [piece_of(sample, *bound) for bound in bounds]
    text = is_text(sample)
    seen = np.zeros(len(sample.input_ids), dtype=int)
    end = 0
    for (start, stop), piece in zip(bounds, pieces):
        assert piece.num_tokens <= capacity
        assert patch_capacity is None or piece.num_patches <= patch_capacity
        assert start == end or (start == end - 1 and text[start] and text[end])
        seen[start + 1 : stop] += piece.labels[1:] >= 0  # a segment's first token has no loss
        end = stop
    assert end == len(sample.input_ids)
    assert np.array_equal(seen[1:], (sample.labels[1:] >= 0).astype(int))
    assert np.array_equal(np.concatenate([p.grid_thw for p in pieces]), sample.grid_thw)
    assert sum((p.media for p in pieces), ()) == sample.media
    return pieces


parts = st.lists(
    st.one_of(st.integers(1, 1000), st.sampled_from([(2, 2), (2, 4), (6, 4)])), min_size=1
)


@settings(max_examples=300, deadline=None)
@given(parts=parts, capacity=st.integers(9, 60), patch_capacity=st.none() | st.integers(24, 60))
def test_any_document_is_split_without_loss(parts, capacity, patch_capacity):
    """Runs take 3 to 8 tokens here, so that every image fits with a token of text."""
    sample = encoded(SPEC, *parts, END)
    pieces = assert_split(sample, capacity, patch_capacity)
    # No piece could be longer: what follows it, up to the next place to cut, does not fit.
    if patch_capacity is None:
        for piece, after in zip(pieces, pieces[1:]):
            is_repeated = is_text(after)[0]
            following = 1 if is_repeated else int(after.grid_thw[0].prod()) // 4 + 2
            follower = is_text(after)[3] if not is_repeated and len(after.input_ids) > 3 else False
            assert piece.num_tokens + following + follower > capacity


def test_an_image_that_fits_nowhere_is_an_error_with_its_row():
    sample = dataclasses.replace(encoded(SPEC, 1, (6, 4), 2), source="docs.jsonl", row=4)
    for capacity, patches in ((8, None), (100, 20)):
        with pytest.raises(
            ValueError, match="row 4 of docs.jsonl: an image of 6 tokens does not fit"
        ):
            split_samples([sample], capacity, patches)
    assert len(split_samples([sample], 9)) == 2


def test_real_documents_lose_nothing(documents):
    for sample in documents:
        assert_split(sample, 4096)
    split = split_samples(documents, 4096)
    assert split.num_split == sum(sample.num_tokens > 4096 for sample in documents) > 20
    for n in range(len(split)):
        piece = split[n]
        sizes = (piece.num_tokens, piece.num_patches, piece.num_supervised)
        assert sizes == (split.num_tokens[n], split.num_patches[n], split.num_supervised[n])


def test_pieces_of_a_store_are_those_of_a_list(tmp_path):
    spec = small_spec()
    samples = [encoded(spec, *range(1, 30), (4, 6), *range(30, 60)), encoded(spec, 1, (2, 2), 2)]
    samples = [dataclasses.replace(s, media=()) for s in samples]
    in_memory = split_samples(samples, 40)
    images = [dataclasses.replace(s, media=(image(s),) * len(s.grid_thw)) for s in samples]
    store = write_store(tmp_path, images, spec)
    on_disk = split_samples(store, 40)
    on_disk.save(tmp_path)
    on_disk = type(on_disk).load(store, tmp_path)
    assert len(on_disk) == len(in_memory) == 3
    for name in ("sample_of", "bounds", "num_tokens", "num_patches", "num_supervised", "sources"):
        assert np.array_equal(getattr(on_disk, name), getattr(in_memory, name))
    config = tiny_config(100, vision=spec)
    assert np.array_equal(costs_of(on_disk, config), costs_of(list(on_disk), config))


def image(sample):
    from mmpack.types import ImageRef

    return ImageRef("a.png")


def test_images_take_no_more_than_their_share():
    spec = small_spec()
    samples = [encoded(spec, n, (8, 8), *range(1, 20)) for n in range(1, 40)]
    most = image_capacity(0.25, 100, spec)
    assert most == 100
    split = PackedDataset.from_samples(samples, 100, patch_capacity=most, on_overflow="split")
    patches = split.plan.totals(split.samples.num_patches)
    assert patches.max() <= 100
    assert split.samples.num_patches.sum() == 39 * 64
    for share in (0, 1.5):
        with pytest.raises(
            ValueError, match=r"--max-image-share \(share\) must be above 0 and at most 1"
        ):
            image_capacity(share, 100, spec)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_pack_of_pieces_is_its_pieces(family):
    """The theorem: text-only, image-only and mixed pieces together, and each in the stock model."""
    spec = small_spec(family)
    document = encoded(spec, (4, 4), (4, 4), 5, 6, (2, 2), 7, 8, (4, 6), *range(10, 30))
    pieces = assert_split(document, 10)
    kinds = {(len(p.grid_thw) > 0, p.is_supervised) for p in pieces}
    assert kinds == {(True, True), (True, False), (False, True)}
    packs = [with_noise([piece], n) for n, piece in enumerate(pieces)]
    collate = collator(family)
    stock = []
    for alone in (collate([pack]) for pack in packs):
        names = ("input_ids", "labels", "pixel_values", "image_grid_thw")
        inputs = {name: alone[name] for name in names if name in alone}
        stock.append({**inputs, "mm_token_type_ids": (alone["input_ids"] == 90).int()})
    num_items = sum(piece.num_supervised for piece in pieces)
    assert num_items == document.num_supervised
    model = tiny_model(small_config(family))
    loss, grads = loss_and_grads(model, stock, num_items)
    ours, our_grads = loss_and_grads(patch_model(model), [collate(packs)], num_items)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert worst_difference(our_grads, grads)[0] < 1e-5


def write_documents(folder):
    rows = [{"text": f"Report {n}: " + "words of text " * 40 * (n % 5)} for n in range(30)]
    for n, row in enumerate(rows[::2]):
        Image.new("RGB", (112, 56), (n, 0, 0)).save(folder / f"{n}.png")
        row |= {"text": "<image>" + row["text"] + "<image>", "images": [f"{n}.png"] * 2}
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "docs.jsonl"


def pack(*options):
    return main(["pack", *map(str, options)])


@pytest.fixture
def command(tmp_path, shared):
    data = write_documents(tmp_path)
    tokenizer = ("--tokenizer", shared / "tokenizer" / "qwen2_vl", "--capacity", 128)
    return (data, *tokenizer, "--out", tmp_path / "packed", "--jobs", 1)


def test_pack_and_train_on_documents(command, tmp_path, capsys):
    png = tmp_path / "mix.png"
    assert pack(*command, "--stage", "pretrain", "--json", "--png", png) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 30
    assert report["pieces"] > 30 > report["split"] > 5
    assert 0 < report["sources"][command[0].name]["images"] < 0.5
    assert Image.open(png).width > 500
    assert pack(*command, "--stage", "pretrain", "--max-image-share", 0.1, "--overwrite") == 0
    said = capsys.readouterr().out
    assert "nothing encoded anew" in said
    assert "documents longer than a pack are in" in said
    dataset = PackedDataset.from_store(tmp_path / "packed")
    features = dataset.plan.totals(dataset.samples.num_patches) // 4
    assert 0 < features.max() <= 12
    args = TrainingArguments(str(tmp_path / "run"), max_steps=3, **QUIET)
    model = patch_model(tiny_model(tiny_config()))
    trainer = Trainer(model, args, PackCollator(), dataset)
    PackingCallback(dataset).attach(trainer)
    assert trainer.train().global_step == 3
    assert all(np.isfinite(e["loss"]) for e in trainer.state.log_history if "loss" in e)


def test_what_contradicts_the_stage(command, capsys):
    for options, error in (
        (("--on-overflow", "split"), "a conversation cannot be split"),
        (("--stage", "pretrain", "--mask-history"), "documents have no turns"),
        (("--stage", "pretrain", "--on-overflow", "error"), "too long for a pack of 128 tokens"),
        (("--stage", "pretrain", "--max-image-share", 1.2), "at most 1, got 1.2"),
        ((), "row 0 of .*no field 'conversations'"),
    ):
        assert pack(*command, *options) == 1
        import re

        assert re.search(error, capsys.readouterr().err)


@pytest.mark.slow
def test_real_documents_train_for_20_steps(shared, documents, tmp_path):
    dataset = PackedDataset.from_samples(documents, 4096, on_overflow="split")
    model = patch_model(tiny_model(tiny_config()))
    args = TrainingArguments(str(tmp_path), max_steps=20, **QUIET)
    trainer = Trainer(model, args, PackCollator(), dataset)
    PackingCallback(dataset).attach(trainer)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(losses) == 20
    assert torch.tensor(losses).isfinite().all()
