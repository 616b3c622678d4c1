"""Python is told what the command line cannot get wrong: collators, models, batches, weights, rows left out."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import QUIET, SMALL_SPEC, encoded, small_config, tiny_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, default_data_collator

from mmpack import Encoder, PackedDataset, PackStream, plan_packs
from mmpack.hf import PackCollator, PackingCallback, loss_denominator, patch_model
from mmpack.hf.trainer_checks import tell_weights
from mmpack.packing.overflow import fit_sample

CAPACITY = 40


def sample(row, num_tokens, supervised=True):
    made = encoded(SMALL_SPEC, 1, row + 3, range(20, 18 + num_tokens), supervised=supervised)
    return replace(made, source="train.json", row=row)


def packs():
    return PackedDataset.from_samples([sample(row, 12 + row) for row in range(4)], CAPACITY)


def trainer_of(folder, model=None, collate=None, attach=True, **options):
    others = {
        name: options.pop(name) for name in ("eval_dataset", "compute_metrics") if name in options
    }
    trainer = Trainer(
        model or patch_model(tiny_model(small_config())),
        TrainingArguments(str(folder), **{**QUIET, "max_steps": 1, **options}),
        train_dataset=packs(),
        data_collator=collate or PackCollator(),
        **others,
    )
    if attach:
        PackingCallback(trainer.train_dataset).attach(trainer)
    return trainer


def warned(caplog, name="mmpack"):
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno == logging.WARNING and r.name.startswith(name)
    ]


# Collators and models


@pytest.mark.parametrize("collate", [default_data_collator, DataCollatorForSeq2Seq(None)])
def test_a_collator_of_transformers_is_refused(collate, tmp_path):
    with pytest.raises(ValueError, match=r"data_collator is \w+, .*PackCollator\(model=model\)"):
        trainer_of(tmp_path, collate=collate).train()


def test_without_the_callback_too(tmp_path):
    trainer = trainer_of(tmp_path, collate=default_data_collator, attach=False)
    with pytest.raises(
        TypeError, match="is the samples of one pack, without fields .* with PackCollator"
    ):
        trainer.train()
    with pytest.raises(TypeError, match="make batches of items with PackCollator"):
        packs()[0]["input_ids"]


def test_a_collator_around_ours_passes(tmp_path, caplog):
    ours = PackCollator()
    trainer = trainer_of(tmp_path, collate=lambda items: ours(items))
    trainer.train()
    assert trainer.state.global_step == 1
    assert warned(caplog) == []


def test_a_model_that_is_not_patched_is_told(tmp_path, caplog):
    trainer = trainer_of(tmp_path, tiny_model(small_config()))
    trainer.train()
    (text,) = warned(caplog)
    assert text.startswith("the model is not patched: ")
    assert "call patch_model(model)" in text


@pytest.mark.parametrize("option", [{"pixels": "uint8"}, {"assemble": "device"}])
def test_batches_for_a_patched_model_need_one(option, tmp_path):
    collate = PackCollator(model=patch_model(tiny_model(small_config())), **option)
    trainer = trainer_of(tmp_path, tiny_model(small_config()), collate)
    with pytest.raises(ValueError, match=r"is not patched, but PackCollator\((pixels|assemble)="):
        trainer.train()


def test_a_collator_of_a_patched_model_needs_one(tmp_path):
    """It would hand images that several rows show to the tower once."""
    trainer = trainer_of(
        tmp_path,
        tiny_model(small_config()),
        PackCollator(model=patch_model(tiny_model(small_config()))),
    )
    with pytest.raises(
        ValueError, match="not patched, but its PackCollator was made for a patched"
    ):
        trainer.train()


# Metrics, arguments


def metrics(prediction):
    return {"rows": np.shape(prediction.predictions)[0]}


def test_metrics_need_the_logits_of_every_token(tmp_path):
    options = {"eval_dataset": packs(), "compute_metrics": metrics}
    with pytest.raises(ValueError, match=r"compute_metrics .* PackCollator\(full_logits=True\)"):
        trainer_of(tmp_path, **options)
    assert "eval_rows" not in trainer_of(tmp_path, **options, prediction_loss_only=True).evaluate()
    full = trainer_of(tmp_path, collate=PackCollator(full_logits=True), **options)
    assert full.evaluate()["eval_rows"] == len(packs())
    later = trainer_of(tmp_path, eval_dataset=packs())
    later.compute_metrics = metrics
    with pytest.raises(ValueError, match="compute_metrics would get the labels of every token"):
        later.evaluate()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"auto_find_batch_size": True}, "would change the packs per step"),
        ({"dataloader_in_order": False, "dataloader_num_workers": 1}, "in which workers finish"),
        ({"data_seed": 3}, "data_seed does not apply"),
        ({"dataloader_drop_last": True}, "would leave packs out of an evaluation"),
        ({"train_sampling_strategy": "group_by_length"}, "would reorder planned packs"),
    ],
)
def test_arguments_that_would_train_on_other_packs(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        trainer_of(tmp_path, **options)


def test_layers_without_attention_are_refused():
    with pytest.raises(ValueError, match="attention_layers does not apply without attention_every"):
        PackingCallback(packs(), attention_layers=[0])


# Batches and weights


def test_several_packs_per_batch_are_told(tmp_path, caplog):
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 3}
    trainer_of(tmp_path, eval_dataset={"one": packs()}, **sizes)
    train, evaluation = warned(caplog)
    assert train.startswith(
        "per_device_train_batch_size=8 puts 8 packs, up to 320 tokens, into each"
    )
    assert train.endswith("and gradient_accumulation_steps=8 for as many packs per step")
    assert evaluation.startswith("per_device_eval_batch_size=3 puts 3 packs, up to 120 tokens, ")
    caplog.clear()
    trainer_of(tmp_path, eval_dataset=packs())
    trainer = trainer_of(tmp_path, eval_dataset=[sample(0, 9)], per_device_eval_batch_size=8)
    assert warned(caplog) == []  # samples are no packs
    for _ in range(2):
        trainer.evaluate(packs())
    assert [text.partition(" puts")[0] for text in warned(caplog)] == [
        "per_device_eval_batch_size=8"
    ]


def test_transformers_batch_of_8_is_told(tmp_path, caplog):
    """Its default, also for evaluation."""
    trainer = Trainer(
        patch_model(tiny_model(small_config())),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=packs(),
        eval_dataset=packs(),
        data_collator=PackCollator(),
    )
    PackingCallback(trainer.train_dataset).attach(trainer)
    assert [text.split()[0] for text in warned(caplog)] == [
        "per_device_train_batch_size=8",
        "per_device_eval_batch_size=8",
    ]


def test_weights_of_few_bits_are_told(tmp_path, caplog):
    """As from_pretrained loads a published checkpoint; those that are frozen do not matter."""
    model = patch_model(tiny_model(small_config(), dtype=torch.bfloat16))
    trainer_of(tmp_path, model).train()
    (text,) = warned(caplog)
    number = len(list(model.parameters()))
    assert text.startswith(
        f"{number} of {number} weights to train are bfloat16, which keeps 8 bits"
    )
    assert "dtype=torch.float32 and pass TrainingArguments(bf16=True)" in text
    caplog.clear()
    model.lm_head.float()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("lm_head"))
    tell_weights(model)
    assert warned(caplog) == []


# Samples longer than a pack


def test_what_a_plan_leaves_out_is_told(caplog):
    lengths = [50, 10, 60, 70, 80, 20]
    plan_packs(lengths, CAPACITY, on_overflow="drop")
    plan_packs(lengths, CAPACITY, on_overflow="truncate")
    plan_packs([10, 20], CAPACITY, on_overflow="drop")
    of = "4 of 6 samples, too long for a pack of 40 tokens: sample 0, sample 2, sample 3 and 1 more"
    assert warned(caplog) == [f"left out: {of}", f"planned at the capacity: {of}"]


def long_samples():
    unanswered = replace(sample(2, 60))
    unanswered.labels[:-2] = -100  # its answer does not fit
    return [sample(0, 12), sample(1, 50), unanswered]


def test_what_a_data_set_leaves_out_is_told(caplog):
    kept = PackedDataset.from_samples(long_samples(), CAPACITY, on_overflow="drop")
    assert kept.plan.num_dropped == 2
    room = "too long for a pack of 40 tokens:"
    assert warned(caplog) == [
        f"left out: 2 of 3 samples, {room} row 1 of train.json, row 2 of train.json"
    ]
    caplog.clear()
    PackedDataset.from_samples(long_samples(), CAPACITY, patch_capacity=9, on_overflow="truncate")
    room = "too long for a pack of 40 tokens and 9 patches:"
    assert warned(caplog) == [
        f"left out: 1 of 3 samples, {room} row 2 of train.json",
        f"cut: 1 of 3 samples, {room} row 1 of train.json",
    ]


def test_what_a_stream_leaves_out_is_told(caplog):
    for how, expected in (("drop", ["dropped", "dropped"]), ("truncate", ["cut", "dropped"])):
        caplog.clear()
        list(PackStream(long_samples(), None, CAPACITY, on_overflow=how))
        texts = warned(caplog)
        assert [text.partition(":")[0] for text in texts] == expected
        assert "row 1 of the stream has 50 tokens" in texts[0]


def test_conversations_are_not_split(tmp_path):
    conversation = sample(3, 60)
    conversation.labels[1:9] = -100
    refused = "a conversation cannot be split"
    with pytest.raises(
        ValueError, match=f"row 3 of train.json: {refused}; pass --on-overflow drop"
    ):
        PackedDataset.from_samples([conversation], CAPACITY, on_overflow="split")
    with pytest.raises(ValueError, match=f"row 0 of the stream: {refused}"):
        list(PackStream([conversation], None, CAPACITY, on_overflow="split"))
    encoder = Encoder(None, SMALL_SPEC)
    for make in (
        lambda: PackedDataset.from_files([], encoder, CAPACITY, on_overflow="split"),
        lambda: PackStream([], encoder, CAPACITY, on_overflow="split"),
    ):
        with pytest.raises(ValueError, match=f"{refused}; --on-overflow split .* --stage pretrain"):
            make()
    document = sample(3, 60)
    assert len(fit_sample(document, CAPACITY, None, "split")) == 2
    again = fit_sample(document, CAPACITY, None, "split")[1]  # its first token is context
    assert len(fit_sample(again, 12, None, "split")) > 1


def test_one_batch_is_no_list_of_batches():
    batch = PackCollator()([packs()[0]])
    assert loss_denominator([batch]) > 0
    with pytest.raises(
        ValueError, match=r"takes a list of batches, this is one batch; pass \[batch\]"
    ):
        loss_denominator(batch)


def test_a_callback_for_other_packs_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, attach=False)
    with pytest.raises(
        ValueError, match="PackingCallback is for PackedD.* train_dataset is another"
    ):
        PackingCallback(packs()).attach(trainer)
    with pytest.raises(
        ValueError, match="PackingCallback is for PackStream.* train_dataset is anot"
    ):
        PackingCallback(PackStream([], None, CAPACITY)).attach(trainer)
