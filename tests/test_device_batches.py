"""PackCollator(assemble="device"): what the hook makes is what the host would have made."""

import dataclasses

import pytest
import torch
from builders import (
    FAMILIES,
    QUIET,
    SMALL_SPEC,
    collator,
    encoded,
    made_up_rows,
    packed,
    small_config,
    small_spec,
    tiny_model,
    to,
)
from transformers import Trainer, TrainingArguments

from mmpack import Encoder, PackedDataset, PackStream
from mmpack.hf import PackCollator, PackingCallback, patch_model
from mmpack.hf.forward_kwargs import assemble_on_device

TEXT = [encoded(SMALL_SPEC, 1, 2, 3), encoded(SMALL_SPEC, 4, 5)]
IMAGES = [encoded(SMALL_SPEC, 1, 2, (4, 6), 3, (10, 2), 4), encoded(SMALL_SPEC, 8, (6, 14), 9)]


def completed(batch, side=None):
    """A compact batch as the hook completes it, on the host."""
    batch, pack = assemble_on_device(batch, batch["mmpack"], side)
    return to(torch.device("cpu"), {**batch, "mmpack": pack})


def without_patches(batch):
    """A batch of text alone, without what the host makes of no patches."""
    pack = {name: x for name, x in batch["mmpack"].items() if not is_of_patches(name, x)}
    return {**batch, "mmpack": pack}


def is_of_patches(name, value):
    return (
        name.startswith("vision_")
        and name != "vision_grid_thw"  # from the host either way
        and isinstance(value, torch.Tensor)
    )


def assert_same(ours, theirs, path="batch"):
    """Equal all the way down, in dtype, order of dimensions and value; a `Batch` is a dict."""
    if isinstance(ours, dict):
        assert isinstance(theirs, dict), path
        assert ours.keys() == theirs.keys(), path
        for name in ours:
            assert_same(ours[name], theirs[name], f"{path}.{name}")
    elif isinstance(ours, torch.Tensor):
        assert isinstance(theirs, torch.Tensor), path
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path
    else:
        assert type(ours) is type(theirs), path
        assert ours == theirs, path


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_makes_the_hosts_batch(family, device):
    """Images and videos, text alone, and a filler at the end."""
    host, side = made_up_rows(family)[0], collator(family).tower.table_side
    made = to(device, made_up_rows(family, assemble_on="device")[0])
    assert_same(completed(made, side), host)
    model = patch_model(tiny_model(small_config(family)))
    for rows in (TEXT, IMAGES):
        samples = [dataclasses.replace(row, vision=small_spec(family)) for row in rows]
        done = packed(samples, family)
        for options in ({"pad_to": 64}, {"full_logits": True}):
            host = PackCollator(model=model, pixels="uint8", **options)([done])
            collate = PackCollator(model=model, pixels="uint8", assemble="device", **options)
            made = to(device, collate([done]))
            host = host if rows is IMAGES else without_patches(host)
            assert_same(completed(made, side), host)


def test_what_goes_to_the_device_is_small():
    """Bytes of a text-only and of an image batch, pixels and what is supervised aside."""
    either_way = ("pixel_values", "labels", "shift_labels", "logits_to_keep")

    def num_bytes(batch):
        own = {name: x for name, x in batch.items() if name not in either_way}
        del batch["mmpack"]["supervised_index"]
        tensors = [
            *own.values(),
            *batch["mmpack"].values(),
            *batch["mmpack"].get("compact", {}).values(),
        ]
        return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))

    rows = [encoded(SMALL_SPEC, range(60)), encoded(SMALL_SPEC, 1, (28, 28), range(40))]
    for samples, factor in ((rows[:1], 8), (rows[1:], 40)):
        pack = packed(samples)
        on_host = num_bytes(collator()([pack]))
        assert num_bytes(collator("qwen2_vl", "device")([pack])) * factor < on_host


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_no_question_to_the_device(family):
    """Forward and backward on the meta device."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's turn")
    batch = made_up_rows(family, assemble_on="device")[0]
    model = patch_model(tiny_model(small_config(family)))
    if family == "qwen3_vl_moe":
        model.to(torch.bfloat16)  # the one dtype of torch's grouped products on the meta device
    batch = to(torch.device("meta"), batch)
    loss = model.to("meta")(**batch, num_items_in_batch=torch.tensor(3)).loss
    loss.backward()
    assert loss.is_meta


def test_a_stock_trainer(tmp_path, device):
    """The same losses as assembled on the host, with the callback's log, in workers and without."""
    if device.type == "cuda":
        pytest.skip("QUIET is for the CPU")
    samples = [encoded(SMALL_SPEC, *range(n, n + 9 + n % 5)) for n in range(3, 30, 3)]

    def losses(assemble, **options):
        dataset = PackedDataset.from_samples(samples, capacity=30, cost=small_config())
        model = patch_model(tiny_model(small_config()))
        collate = PackCollator(model=model, assemble=assemble)
        args = TrainingArguments(output_dir=tmp_path, max_steps=4, **{**QUIET, **options})
        trainer = Trainer(model, args, collate, dataset)
        PackingCallback(dataset).attach(trainer)
        trainer.train()
        assert trainer.state.log_history[0]["pack/utilization"] > 0.5
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses("host")
    assert losses("device") == expected
    assert losses("device", dataloader_num_workers=1) == expected
    assert losses("device", per_device_train_batch_size=2)[0] > 0


def test_a_model_that_is_not_patched_refuses():
    batch = collator("qwen2_vl", "device")(TEXT)
    with pytest.raises((IndexError, RuntimeError)):
        tiny_model(small_config())(**batch)
    for model, told in (
        (None, "no model was passed"),
        (tiny_model(small_config()), "is not patched"),
    ):
        with pytest.raises(
            ValueError, match=f"assemble='device' needs a patched model, but .*{told}"
        ):
            PackCollator(model=model, assemble="device")

    with pytest.raises(ValueError, match="assemble must be 'host' or 'device', got 'gpu'"):
        PackCollator(assemble="gpu")


def test_a_cut_batch_is_noticed():
    batch = collator("qwen2_vl", "device")(TEXT)
    batch["input_ids"] = batch["input_ids"][:, :-1]
    with pytest.raises(ValueError, match=r"the pack has \(1, 5\); do not slice"):
        patch_model(tiny_model(small_config()))(**batch)


def test_encoded_samples_and_processor_outputs_are_left_to_the_device_too():
    host, device = collator(), collator("qwen2_vl", "device")
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    batch = device(TEXT)
    assert batch["input_ids"].dtype == torch.int32
    assert_same(completed(batch), without_patches(host(TEXT)))
    model, encoder = patch_model(tiny_model(small_config())), Encoder(None, SMALL_SPEC)
    expected = without_patches(PackCollator(encoder)([row]))
    batch = PackCollator(encoder, model=model, assemble="device")([row])
    assert_same(completed(batch), expected)


def test_streams_leave_packs_to_the_device_too():
    rows = [encoded(SMALL_SPEC, *range(n, n + 9)) for n in range(3, 60, 3)]
    for pack in PackStream(rows, None, 30, buffer=8):
        batch = collator("qwen2_vl", "device")([pack])
        assert batch["mmpack"]["resume"] == pack.resume
        assert_same(completed(batch), without_patches(collator()([pack])))
