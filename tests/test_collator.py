import copy
import dataclasses
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from accelerate.utils import send_to_device
from builders import item_of, stock_inputs, stock_processor
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from mmpack import Encoder, VisionSpec, assemble
from mmpack.hf import PackCollator
from mmpack.hf.collator import Batch

MAX_PIXELS = 28 * 28 * 16


@pytest.fixture(scope="module")
def processor(tokenizer):
    return stock_processor(tokenizer, MAX_PIXELS)


@pytest.fixture(scope="module")
def rows(realset_rows):
    """Text only, one image, several images, several turns."""
    picks = [
        next(
            n
            for n, row in enumerate(realset_rows)
            if len(row["images"]) == count and turns(row) >= t
        )
        for count, t in ((0, 1), (1, 1), (3, 1), (2, 2))
    ]
    return picks


def turns(row):
    return len(row["conversations"]) // 2


@pytest.fixture(scope="module")
def samples(rows, realset_samples, tokenizer, processor):
    vision = VisionSpec.from_processor(processor)
    return list(Encoder(tokenizer, vision).encode([realset_samples[n] for n in rows]))


@pytest.fixture(scope="module")
def features(rows, realset_rows, shared, processor):
    """The same rows as outputs of transformers' processor."""
    return [stock_inputs(realset_rows[n], shared / "realset", processor) for n in rows]


def test_a_batch_moves_as_one(samples, monkeypatch):
    """By its own `to` and `pin_memory`, which accelerate and torch's DataLoader call."""
    batch = PackCollator()([item_of(samples)])
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    for one, device in (
        (batch.to("meta"), "meta"),
        (send_to_device(batch, torch.device("meta"), non_blocking=True), "meta"),
        (pin_memory(batch), "cpu"),
        (copy.deepcopy(batch), "cpu"),
    ):
        assert type(one) is type(batch) is Batch
        for before, after in ((batch, one), (batch["mmpack"], one["mmpack"])):
            assert before.keys() == after.keys()
            for name, value in before.items():
                if isinstance(value, torch.Tensor):
                    assert (before[name].device.type, after[name].device.type) == ("cpu", device), (
                        name
                    )
                elif name != "mmpack":
                    assert after[name] == value, name
    same_batch(batch, pin_memory(batch))

    @torch.compile(backend="eager", fullgraph=True)
    def both(batch):
        return batch["input_ids"].sum(), batch["mmpack"]["cu_seqlens"].sum()

    assert both(batch) == (batch["input_ids"].sum(), batch["mmpack"]["cu_seqlens"].sum())


def same_batch(one, other):
    """But for how many items made it, and the names of their data."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name in ("items", "sources"):
            continue
        if isinstance(value, dict):
            same_batch(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name
        else:
            assert np.array_equal(value, other[name]), name


@pytest.mark.smoke
def test_the_batch_is_what_transformers_own_processor_gives(samples, features):
    batch = PackCollator()(samples)
    assert torch.equal(batch["input_ids"], torch.cat([f["input_ids"] for f in features], dim=1))
    pixels = torch.cat([f["pixel_values"] for f in features if "pixel_values" in f])
    assert torch.equal(batch["pixel_values"], pixels)
    grids = torch.cat([f["image_grid_thw"] for f in features if "image_grid_thw" in f])
    assert torch.equal(batch["image_grid_thw"], grids)
    labels = torch.cat([f["labels"] for f in features], dim=1)
    assert torch.equal(batch["labels"], labels)


def test_only_names_transformers_knows_are_at_the_top(samples):
    batch = PackCollator()(samples)
    known = inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters
    assert set(batch) - set(known) == {"mmpack", "shift_labels"}  # shift_labels: loss functions
    assert next(iter(batch)) == "input_ids"
    assert batch["use_cache"] is False


def test_supervised_rows(samples):
    batch = PackCollator()(samples)
    keep, shifted = batch["logits_to_keep"], batch["shift_labels"]
    assert (shifted != -100).all()
    assert torch.equal(shifted[0], batch["labels"][0, keep + 1])
    assert len(keep) == (batch["labels"][0, 1:] != -100).sum()


def test_packs_samples_and_processor_outputs_give_one_batch(samples, features, processor):
    expected = PackCollator()(samples)
    same_batch(PackCollator()([item_of(samples[:2]), item_of(samples[2:])]), expected)
    same_batch(PackCollator(processor)(features), expected)
    parts = Encoder(processor.tokenizer, VisionSpec.from_processor(processor))
    same_batch(PackCollator(parts)(features), expected)


def test_padding_of_processor_outputs_is_left_out(features, processor):
    padded = dict(features[1])
    for name, pad in (("input_ids", 0), ("labels", -100)):
        padded[name] = torch.nn.functional.pad(padded[name], (3, 2), value=pad)
    padded["attention_mask"] = torch.nn.functional.pad(
        torch.ones_like(features[1]["labels"]), (3, 2)
    )
    collate = PackCollator(processor)
    same_batch(collate([padded]), collate([features[1]]))


def test_text_only_packs_have_no_vision_keys(samples):
    batch = PackCollator()(samples[:1])
    assert "pixel_values" not in batch
    assert "image_grid_thw" not in batch
    assert batch["mmpack"]["num_patches"] == 0


def test_what_is_missing_or_cut_is_named(features, processor):
    collate = PackCollator(processor)
    whole = features[1]
    n = whole["input_ids"].shape[1]
    in_image = int((whole["input_ids"][0] == processor.image_token_id).int().argmax()) + 2
    cut = {**whole, **{name: whole[name][:, :in_image] for name in ("input_ids", "labels")}}
    cases = [
        ({k: v for k, v in whole.items() if k != "labels"}, "feature 0 has no labels"),
        (cut, "image placeholders?, but .* features from 1 image; was it truncated"),
        (
            {**whole, "pixel_values": whole["pixel_values"][:1]},
            "number of patches is 1 in pixel_values, but",
        ),
        ({**whole, "labels": whole["labels"][:, 1:]}, f"has {n} input_ids but {n - 1} labels"),
        ({**whole, "input_ids": whole["input_ids"].expand(2, n)}, "must be one sample"),
        ({**whole, "pixel_values_videos": torch.zeros(4, 1176)}, "but no video_grid_thw"),
    ]
    for feature, message in cases:
        with pytest.raises(ValueError, match=message):
            collate([feature])
    with pytest.raises(ValueError, match=r"PackCollator\(processor\) or PackCollator\(encoder\)"):
        PackCollator()([whole])


def test_other_things_are_refused(samples):
    with pytest.raises(ValueError, match=r"got \['EncodedSample', 'Pack'\]"):
        PackCollator()([samples[0], assemble(samples[1:])])
    with pytest.raises(ValueError, match=r"got \['EncodedSample', 'dict'\]"):
        PackCollator()([samples[0], {"conversations": []}])
    with pytest.raises(ValueError, match="at least one sample"):
        PackCollator()([])
    with pytest.raises(ValueError, match=r"PackCollator\(processor\) or PackCollator\(encoder\)"):
        PackCollator()([{"conversations": []}])
    with pytest.raises(ValueError, match="1 grid but 0 media to decode"):
        PackCollator()([dataclasses.replace(samples[1], media=())])


def test_raw_rows_are_packed_too(samples, rows, realset_rows, shared, processor, monkeypatch):
    collate = PackCollator(processor)
    monkeypatch.chdir(shared / "realset")  # rows in memory: paths from the current folder
    raw = [realset_rows[n] for n in rows]
    same_batch(collate(raw), PackCollator()(samples))
    pictures = [{**row, "images": [Image.open(path) for path in row["images"]]} for row in raw]
    same_batch(collate(pictures), PackCollator()(samples))
    with pytest.raises(ValueError, match="row 1 of rows: .*no field 'conversations'"):
        collate([raw[0], {"text": "?"}])
    with pytest.raises(ValueError, match="row 1 of rows"):  # a batch is not made smaller
        PackCollator(replace(Encoder.of(processor), on_error="skip"))([raw[0], {"text": "?"}])
    with pytest.raises(ValueError, match="feature 1 has no input_ids, but others do"):
        collate([{"input_ids": [1, 2], "labels": [1, 2]}, raw[0]])
